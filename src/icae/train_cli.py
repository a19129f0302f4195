"""`icae pretrain | finetune`: a config and settings over it -> an adapter. Heavy imports inside the commands."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from icae.errors import ICAEError
from icae.terminal import say

if TYPE_CHECKING:
    from icae.config import TrainConfig

Config = Annotated[str, typer.Argument(help="YAML config, such as configs/kv-4x.yaml, or a first name=value.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings over the config's: name=value, or model.name=value.", show_default=False)
]


def pretrain(
    config: Config,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option(help="Begin anew; refused where the output folder holds checkpoints.")] = False,
) -> None:
    """Pretrain an adapter by autoencoding and continuation; goes on from the newest checkpoint in its output folder."""
    _train(config, "pretrain", overrides, fresh)


def finetune(
    config: Config,
    overrides: Overrides = None,
    fresh: Annotated[bool, typer.Option(help="Begin anew; refused where the output folder holds checkpoints.")] = False,
) -> None:
    """Fine-tune an adapter on (context, prompt, response) triples; from the default one, unless `init` or `model.base` says otherwise."""
    _train(config, "instruct", overrides, fresh)


def read_settings(config: str, objective: str, overrides: list[str] | None) -> tuple[TrainConfig, dict[str, Any]]:
    """Return the settings of a run, and those of its adapter that stand under `model`.

    Parameters
    ----------
    config : str
        A YAML file, or a first override.
    overrides : list of str, optional
        `name=value` or `model.name=value`, which count more than the file's.

    Raises
    ------
    ICAEError
        If the file or an override cannot be read, or a setting is unknown or out of range.
    """
    import yaml

    from icae.config import TrainConfig, read_yaml

    if "=" in config and not os.path.exists(config):
        values, overrides = {}, [config, *(overrides or [])]
    else:
        values = read_yaml(config)
    model = values.pop("model", None) or {}
    if not isinstance(model, dict):
        raise ICAEError(f"model in {config} must hold settings of its own, got {model!r}")
    for override in overrides or []:
        name, sign, value = override.partition("=")
        if not sign:
            raise ICAEError(f"override {override!r} is not of the form name=value")
        target, key = (model, name.removeprefix("model.")) if name.startswith("model.") else (values, name)
        try:
            target[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ICAEError(f"override {override!r}: the value is no YAML ({' '.join(str(error).split())})") from error
    if objective == "instruct" and "init" not in values and "base" not in model:
        from icae.checkpoint import DEFAULT

        values["init"] = DEFAULT
    return TrainConfig.from_dict({**values, "objective": objective}), model


def _train(config: str, objective: str, overrides: list[str] | None, fresh: bool) -> None:
    settings, model = read_settings(config, objective, overrides)
    from icae.train import starting_config, train

    if unread := settings.unread():
        say(f"settings of fine-tuning, which pretraining does not read: {', '.join(unread)}")
    folder = train(settings, starting_config(settings.init, model), resume=not fresh)
    say(f"adapter in {folder}")
    if os.environ.get("RANK", "0") != "0":
        return
    state = json.loads((folder / "trainer_state.json").read_text())
    done, spent = state["global_step"], max((line.get("minutes", 0.0) for line in state.get("log_history", [])), default=0.0)
    if done < settings.steps and (settings.minutes is None or spent < settings.minutes):
        say(f"stopped at step {done} of {settings.steps}; the same command goes on from there")
        raise typer.Exit(130)
