"""Every command line behind a `$` and the Python block of the README are run as they stand, on the shipped adapter (or, where it trains,
on a tiny base); every other command line of the documents is understood, with all its options and settings."""

import dataclasses
import re
import shlex
import sys
from pathlib import Path

import pytest
import tiny
from typer.main import get_command

from icae import cli
from icae.config import ICAEConfig, TrainConfig

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^\$ (.+)$", README, re.MULTILINE)
SHOWN = {
    line.strip()
    for page in ("README.md", "docs/finetuning.md", "docs/serving.md")
    for line in re.findall(
        r"^(?:\$ | {4})(icae [^|]+?)(?: +#.*)?$", (Path(__file__).parent.parent / page).read_text(encoding="utf-8"), re.MULTILINE
    )
}
MANUAL = "The Marlow 40 is a small mill. Fill the brass cup above its main bearing with linseed oil before the first run.\n"


def run(line: str, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code, (line, capsys.readouterr().err)
    return capsys.readouterr().out


@pytest.mark.real
def test_every_command_of_the_readme_runs(monkeypatch, capsys, tmp_path, real_base):
    assert len(COMMANDS) >= 7
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("icae.checkpoint.load_base", lambda *_, **__: real_base)  # loaded once for all of them
    Path("manual.txt").write_text(MANUAL)
    said = {line: run(line, monkeypatch, capsys) for line in COMMANDS if "pretrain" not in line}
    assert "slots" in said["icae compress manual.txt -o slots.safetensors"]
    assert not [line for line, out in said.items() if not out.strip()]


@pytest.mark.real
def test_the_python_of_the_readme_runs(monkeypatch, capsys, tmp_path, real_base):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("icae.checkpoint.load_base", lambda *_, **__: real_base)
    (code,) = re.findall(r"```python\n(.+?)```", README, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    assert "tokens in" in capsys.readouterr().out


def test_the_training_command_of_the_readme_runs_on_another_base(monkeypatch, capsys, tmp_path, base_folder):
    (line,) = [line for line in COMMANDS if "pretrain" in line]
    config = Path(__file__).parent.parent / line.split()[2]
    monkeypatch.chdir(tmp_path)
    Path("my-texts").mkdir()
    Path("my-texts/a.txt").write_text(" ".join(tiny.LINES * 4))
    line = line.replace(line.split()[2], str(config)).replace("meta-llama/Llama-3.2-1B-Instruct", str(base_folder))
    line = line.replace("device=cuda bf16=true", "device=cpu steps=1 windows=[[0,8]] held_out=null output=run")
    run(line, monkeypatch, capsys)
    assert Path("run/adapter_model.safetensors").exists()


@pytest.mark.parametrize("line", sorted(SHOWN))
def test_every_command_that_is_shown_is_understood(line):
    command, (name, *words) = get_command(cli.app), shlex.split(line)
    while hasattr(command, "commands"):
        command, (name, *words) = command.commands[words[0]], words
    settings = command.make_context(name, [word for word in words if word != "..."]).params
    for setting in settings.get("overrides") or ():
        setting = setting.partition("=")[0]
        config, field = (ICAEConfig, setting[6:]) if setting.startswith("model.") else (TrainConfig, setting)
        assert field in {f.name for f in dataclasses.fields(config)}, setting


def test_many_commands_are_shown():
    assert len(SHOWN) > 30
    assert any("finetune" in line for line in SHOWN)
