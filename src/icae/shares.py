"""Questions shared out among processes of one thread each: two of these answer more on two cores than one with two threads.

Each process loads the model once, and takes some questions in a row at a time; answers come back in the questions' order, and are measured
together, as `qa.qa` does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import Any

from icae.model import ICAE
from icae.qa import Heard, Progress, fitting, merged, qa
from icae.triples import Triple

QUESTIONS = 32
"""In a row, for one process."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

_own: list[ICAE] = []


def qa_side_by_side(
    model: ICAE,
    begin: Callable[[], ICAE],
    triples: Sequence[Triple],
    *,
    jobs: int,
    sides: Sequence[str],
    ratio: int | None = None,
    max_new_tokens: int = 48,
    progress: Progress | None = None,
    heard: Heard | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask questions in `jobs` processes; arguments, results and errors as for `qa.qa`.

    `begin` loads the same model, once in each process, so it must be one that `pickle` knows.
    """
    settings = {"sides": sides, "ratio": ratio, "max_new_tokens": max_new_tokens}
    kept = fitting(model, triples, sides, ratio, max_new_tokens)
    shares = [kept[at : at + QUESTIONS] for at in range(0, len(kept), QUESTIONS)]
    parts: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    with single_threads(), ProcessPoolExecutor(min(jobs, len(shares)), get_context("spawn"), _open, (begin,)) as pool:
        for results, rows in pool.map(partial(_ask, settings), shares):
            parts.append((results, rows))
            if heard is not None:
                for row in rows:
                    heard(row)
            if progress is not None:
                progress(sum(about["n"] for about, _ in parts), len(kept))
    return merged(parts, len(triples) - len(kept), sides)


@contextmanager
def single_threads() -> Iterator[None]:
    """Have the processes that are begun here compute with one thread each."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ |= ONE_THREAD  # what processes inherit
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _open(begin: Callable[[], ICAE]) -> None:
    import torch

    torch.set_num_threads(1)
    _own.append(begin())


def _ask(settings: dict[str, Any], triples: Sequence[Triple]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return qa(_own[0], triples, **settings)
