"""Experiments side by side, in processes of one thread each: two of these do more on two cores than one with two threads (docs/log.md).

What shares readings, questions or windows stays together, in one process. What is timed runs afterwards, alone, in the process that asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from icae.experiments import EXPERIMENTS
from icae.experiments.context import Context
from icae.experiments.runner import check, reproduce
from icae.shares import own, processes

GROUPS = (("fig4", "fig5", "table2", "memory"), ("table3", "table6"), ("qa", "table4", "table5"), ("fig6",), ("table1",))
"""The longest first."""


def side_by_side(
    begin: Callable[[], Context], names: Sequence[str] = (), *, out: Path, samples: int | None = None, jobs: int = 2, **settings: Any
) -> dict[str, str]:
    """Run experiments, `jobs` groups at a time.

    Parameters
    ----------
    begin : callable
        Opens a context; called here, and once in each process, so it must be one that `pickle` knows.
    names : sequence of str
        Which experiments; none: all.
    jobs : int
        Processes at once; 1: none but this one.
    out, samples, **settings
        As for `reproduce`.

    Returns
    -------
    dict
        As for `reproduce`.

    Raises
    ------
    ICAEError
        As `begin`, `reproduce` and `processes` do.
    """
    check(names, out, samples)
    context, wanted = begin(), names or tuple(EXPERIMENTS)
    settings |= {"out": out, "samples": samples}
    groups = [chosen for group in GROUPS if (chosen := [n for n in group if n in wanted])]
    if jobs < 2 or len(groups) < 2:
        return reproduce(context, wanted, **settings)
    with processes(min(jobs, len(groups)), begin) as pool:
        outcomes = list(pool.map(partial(_reproduce, settings), groups))
    outcome = {name: how for part in outcomes for name, how in part.items()}
    if alone := [n for n in wanted if n not in outcome]:
        outcome |= reproduce(context, alone, **settings)
    return {name: outcome[name] for name in wanted}


def _reproduce(settings: dict[str, Any], names: Sequence[str]) -> dict[str, str]:
    return reproduce(own[0], names, **settings)
