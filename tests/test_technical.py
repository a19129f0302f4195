"""The gatherer of technical text: what it takes, and how it parts training from held-out text."""

import ast
import sys

import pytest
from tiny import load_script


@pytest.fixture
def technical(monkeypatch, tmp_path):
    module = load_script("configs/technical.py")
    texts = [f'"""Module {i}.\n\nIt is\none of many.\n"""\n' + f"x_{i} = 1\n" * 60 for i in range(60)]
    monkeypatch.setattr(module, "modules", lambda: ((ast.parse(t), t) for t in [*texts, texts[0], "short = 1"]))
    monkeypatch.setattr(sys, "argv", ["technical.py", str(tmp_path)])
    module.main()
    return module


def test_every_piece_is_in_one_part_once(technical, tmp_path):
    parts = {part: (tmp_path / part / "source" / "all.txt").read_text() for part in ("train", "dev")}
    assert all(parts.values()) and len(parts["train"]) > 4 * len(parts["dev"])
    for i in range(60):
        assert sorted(parts[part].count(f"Module {i}.") for part in parts) == [0, 1]
    assert not any("short" in text for text in parts.values())


def test_a_docstring_is_what_it_says_without_its_indentation(technical):
    assert next(technical.docstrings()) == "Module 0.\n\nIt is\none of many."


def test_pythons_reference_is_found(technical):
    assert sum("statement" in page for page in technical.reference()) > 20


def test_of_held_out_text_only_what_training_does_not_say_stays(technical, monkeypatch, tmp_path):
    said = " ".join(f"word{n}" for n in range(30))
    own = " ".join(f"other{n}" for n in range(80))
    known = set(technical.runs_of_words(said))
    assert technical.apart(f"{own}\n\nWho says {said.upper()[5:]}!\n  \nThe end.", known) == f"{own}\n\nThe end."
    assert technical.apart(" ".join(f"word{n}" for n in range(11)), known)  # too short a run to tell
    texts = [f"# {n}\n" + f"y_{n} = 1\n" * 60 for n in range(60)]
    monkeypatch.setattr(technical, "modules", lambda: ((ast.parse(t), t) for t in texts))
    monkeypatch.setattr(technical, "readmes", lambda: (f"A readme.\n\n{t}" for t in texts))  # of which other ones are held out
    technical.main()
    parts = {part: [(tmp_path / part / kind / "all.txt").read_text() for kind in ("source", "readmes")] for part in ("train", "dev")}
    trained = [n for n in range(60) if any(f"y_{n} " in text for text in parts["train"])]
    assert len(trained) > 50 and not any(f"y_{n} " in text for n in trained for text in parts["dev"])
