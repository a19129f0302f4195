"""Questions shared out among processes of one thread each: two of these answer more on two cores than one with two threads.

Each process loads the model once, and takes some questions in a row at a time; answers come back in the questions' order, and are measured
together, as `qa.qa` does.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import Any

from icae.errors import ICAEError
from icae.model import ICAE
from icae.qa import Heard, Progress, fitting, merged, qa
from icae.triples import Triple

QUESTIONS = 32
"""In a row, for one process."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

own: list[Any] = []
"""What `begin` returned, in a process of `processes`."""


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

    `begin` loads the same model, once in each process, so it must be one that `pickle` knows. Raises `ICAEError` as `processes` does, too.
    """
    settings = {"sides": sides, "ratio": ratio, "max_new_tokens": max_new_tokens}
    kept = fitting(model, triples, sides, ratio, max_new_tokens)
    shares = [kept[at : at + QUESTIONS] for at in range(0, len(kept), QUESTIONS)]
    parts: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    with processes(min(jobs, len(shares)), begin) as pool:
        for results, rows in pool.map(partial(_ask, settings), shares):
            parts.append((results, rows))
            if heard is not None:
                for row in rows:
                    heard(row)
            if progress is not None:
                progress(sum(about["n"] for about, _ in parts), len(kept))
    return merged(parts, len(triples) - len(kept), sides)


@contextmanager
def processes(count: int, begin: Callable[[], Any]) -> Iterator[ProcessPoolExecutor]:
    """Yield a pool of processes of one thread each, in which `begin` is called once; Ctrl-C ends them at once.

    Raises
    ------
    ICAEError
        If one of them was ended from outside.
    """
    try:
        with _single_threads(), ProcessPoolExecutor(count, get_context("spawn"), _open, (begin,)) as pool:
            yield pool
    except BrokenProcessPool as error:
        raise ICAEError("a process ended before its work was done, as happens where memory runs out; lower --jobs") from error


@contextmanager
def _single_threads() -> Iterator[None]:
    """Have the processes that are begun here compute with one thread each."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ |= ONE_THREAD  # what processes inherit
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _open(begin: Callable[[], Any]) -> None:
    import torch

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as in the background of a shell
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # else an interrupt is one task's result, and the next task begins
    torch.set_num_threads(1)
    own.append(begin())


def _ask(settings: dict[str, Any], triples: Sequence[Triple]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return qa(own[0], triples, **settings)
