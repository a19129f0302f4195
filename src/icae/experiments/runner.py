"""Experiments one after the other, each onto disk as it ends: NAME.json, NAME.md, and its pictures.

A table that is there already is kept where its settings, what it was measured on, and the commit are the same. One experiment that fails is
reported and does not lose the others.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from icae import __version__
from icae.atomic import write_together
from icae.errors import ICAEError
from icae.experiments import EXPERIMENTS
from icae.experiments.context import Context
from icae.experiments.table import Table
from icae.figures import draw
from icae.packed import packed_linear
from icae.report import commit, machine

DONE, KEPT, FAILED = "done", "kept", "failed"


def reproduce(
    context: Context,
    names: Sequence[str] = (),
    *,
    out: str | Path = "results",
    quick: bool = False,
    samples: int | None = None,
    force: bool = False,
    overrides: dict[str, dict[str, Any]] | None = None,
) -> dict[str, str]:
    """Run experiments, one after the other (crew.py: several at a time).

    Parameters
    ----------
    context : Context
        What they are run on.
    names : sequence of str
        Which; none: all.
    out : str or Path
        Folder for tables and pictures.
    quick : bool
        Few and short samples: shows that everything runs.
    samples : int, optional
        Samples a figure is taken over, for all experiments; none: each one's own.
    force : bool
        Measure again what is there already.
    overrides : dict, optional
        Settings by experiment.

    Returns
    -------
    dict
        For each name `done`, `kept` or `failed`.

    Raises
    ------
    ICAEError
        If a name is unknown, or the folder cannot be made.
    """
    out = Path(out)
    check(names, out, samples)
    outcome = {}
    for name in names or EXPERIMENTS:
        module = importlib.import_module(f"icae.experiments.{name}")
        settings = {**_settings(module, quick, samples), **(overrides or {}).get(name, {})}
        outcome[name] = _one(context, name, module, settings, out, force)
    return outcome


def check(names: Sequence[str], out: Path, samples: int | None) -> None:
    """Refuse what `reproduce` could not do, and make its folder; errors as there."""
    for name in names:
        if name not in EXPERIMENTS:
            raise ICAEError(f"no experiment {name!r}; there are {', '.join(EXPERIMENTS)}")
    if samples is not None and samples < 2:
        raise ICAEError(f"samples must be at least 2, got {samples}; an interval needs some")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ICAEError(f"could not make the folder {out}: {error.strerror}") from error


def _settings(module: ModuleType, quick: bool, samples: int | None) -> dict[str, Any]:
    """Return an experiment's settings: the defaults of its `run`, its `QUICK` ones, and the number of samples."""
    defaults = {n: p.default for n, p in inspect.signature(module.run).parameters.items() if p.default is not p.empty}
    settings = {**defaults, **(module.QUICK if quick else {})}
    if samples is not None and "samples" in settings:
        settings["samples"] = samples
    return settings


def _one(context: Context, name: str, module: ModuleType, settings: dict[str, Any], out: Path, force: bool) -> str:
    begin = time.monotonic()
    try:
        settings = json.loads(json.dumps(settings))  # as they will be read back
        origin = {**json.loads(json.dumps(context.identity(module.NEEDS))), "commit": commit(), "version": __version__}
        if not force and _stands(out / f"{name}.json", settings, origin):
            context.say(f"{name}: kept, measured at this commit already")
            return KEPT
        context.say(f"{name}: {EXPERIMENTS[name]} ...")
        run: Callable[..., Table] = module.run
        with packed_linear():
            table = run(context, **settings)
        measured = {"date": datetime.now(UTC).date().isoformat(), "machine": machine(), "seconds": round(time.monotonic() - begin, 1)}
        table = dataclasses.replace(table, settings=settings, provenance={**origin, **measured})
        files = {out / f"{name}.json": table.to_json().encode(), out / f"{name}.md": table.to_markdown().encode()}
        pictures = {out / f"{name}.{kind}": data for kind, data in draw(table).items()}
        write_together({**files, **pictures})
        for stale in {out / f"{name}.{kind}" for kind in ("png", "svg")} - pictures.keys():
            stale.unlink(missing_ok=True)
    except ICAEError as error:
        context.say(f"{name}: failed: {error}")
        return FAILED
    except Exception:  # a defect in one must not lose the hours of the others; its traceback is shown
        context.say(f"{name}: failed\n{traceback.format_exc()}")
        return FAILED
    context.say(f"{name}: done in {measured['seconds']} s")
    return DONE


def _stands(path: Path, settings: dict[str, Any], origin: dict[str, Any]) -> bool:
    """Tell whether a table was made with these settings from these things."""
    try:
        table = Table.load(path)
    except ICAEError:
        return False
    if origin["commit"].endswith("+"):
        return False  # files were changed since the commit, and who knows which
    return table.settings == settings and all(table.provenance.get(n) == value for n, value in origin.items())
