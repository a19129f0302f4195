"""One thread that owns the model, and a shared queue before it. Knows no HTTP; a job is a generator, and its events go to a sink.

An iteration of the thread:   forget what was cancelled or is too late
                              take new jobs, one of each tenant in turn, while there is room
                              let one job in preparation do its next piece (a segment, a gradient step on it, 128 tokens of a prompt),
                                  a young one and a long one, which has had many pieces, by turns;
                                  while more jobs wait than generate, one that is ready begins another: they step together the sooner
                              one step of all rows that generate, which guess ahead

So a new request joins the others' batch at the next step, and a long text that is being compressed holds nobody up for longer than
one piece. Long jobs take every second piece, and no room from young ones. (Iteration-level scheduling: Orca, Yu et al., OSDI 2022.)
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from icae.errors import ICAEError, StorageError
from icae.model import ICAE
from icae.server.answer import Answer
from icae.server.batch import Batch

log = logging.getLogger("icae.server")

STORAGE = "what the server keeps is damaged or cannot be written; its log says more"
"""What clients are told of a `StorageError`: its paths and mends are the server's owner's."""
PREPARING = 4
"""Young jobs in preparation at once, at most; and with long ones, as many more than `max_rows`."""
LONG = 16
"""Pieces after which a job in preparation is long, and no longer young."""


@dataclass(frozen=True)
class Token:
    """A row has another token, or several; `ids` are all so far."""

    ids: list[int]


@dataclass(frozen=True)
class Done:
    """A job has ended: `value` is its generator's, or why a row ended (`stop`, `length`)."""

    value: Any


@dataclass(frozen=True)
class Failed:
    """A job has failed, with an HTTP status and a sentence for the client."""

    status: int
    message: str


Event = Token | Done | Failed


class Full(Exception):
    """The queue is full; `retry_after` is a guess, in seconds."""

    def __init__(self, retry_after: int):
        super().__init__(f"too many requests are waiting; try again in {retry_after} s")
        self.retry_after = retry_after


class Closing(Exception):
    """The server is shutting down."""


class Job:
    """Something the model is to do."""

    def __init__(self, work: Generator[None, None, Any], sink: Callable[[Event], None], *, tenant: str = "", timeout: float = 600.0):
        """Make a job.

        Parameters
        ----------
        work : generator
            Yields between its pieces; returns an `Answer`, whose rows then generate with the others, or any other value, and is done.
        sink : callable
            Gets the job's events, in the scheduler's thread; must not block.
        tenant : str
            Whose turn it takes.
        timeout : float
            Seconds, waiting included.
        """
        self.work, self.sink, self.tenant = work, sink, tenant
        self.made = self.looked = time.monotonic()
        self.deadline = self.made + timeout
        self.cancelled = False
        self.pieces = 0
        self.answer: Answer | None = None

    @property
    def long(self) -> bool:
        """Whether it has had many pieces."""
        return self.pieces >= LONG

    def cancel(self) -> None:
        """Have the job forgotten at the next iteration; it gets no further events."""
        self.cancelled = True

    def emit(self, event: Event) -> None:
        """Hand an event on; a sink that is gone cancels the job."""
        if self.cancelled:
            return
        try:
            self.sink(event)
        except Exception:  # the client's loop is closed, or its queue: nobody is there to be told
            self.cancelled = True


class Scheduler:
    """The queue and its thread."""

    def __init__(self, model: ICAE, *, max_rows: int = 16, max_queue: int = 64, guesses: int = 0):
        """Make a scheduler; `start` begins.

        Parameters
        ----------
        model : ICAE
            Owned by the scheduler's thread from `start` on.
        max_rows : int
            Rows under way at once, above which no further job is taken in: those that generate (several for an answer that is begun in
            several ways), and one for each young job in preparation. Of one tenant half as many jobs are in preparation, at most.
        max_queue : int
            Jobs of one tenant that may wait.
        guesses : int
            Tokens that a row guesses ahead at each step, at most.
        """
        self.batch, self.max_rows, self.max_queue = Batch(model, guesses), max_rows, max_queue
        self.waiting: dict[str, deque[Job]] = {}
        self.preparing: deque[Job] = deque()
        self.running: list[Job] = []
        self.longs_turn = False
        self.changed = threading.Condition()
        self.closing = False
        self.steps = self.step_rows = self.finished = 0
        self.seconds = 5.0
        """Running mean of a job's time."""
        self.thread = threading.Thread(target=self._run, name="icae-model", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self.thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs are taken."""
        return self.thread.is_alive() and not self.closing

    @property
    def queued(self) -> int:
        """Jobs that wait."""
        return sum(map(len, list(self.waiting.values())))

    @property
    def active(self) -> int:
        """Jobs under way."""
        return len(self.preparing) + len(self.running)

    def submit(self, job: Job) -> None:
        """Queue a job.

        Raises
        ------
        Full
            If its tenant has `max_queue` jobs waiting.
        Closing
            If the scheduler takes no more.
        """
        with self.changed:
            if self.closing:
                raise Closing("the server is shutting down")
            line = self.waiting.setdefault(job.tenant, deque())
            if len(line) >= self.max_queue:
                raise Full(max(1, round(self.seconds * len(line) / self.max_rows)))
            line.append(job)
            self.changed.notify()

    def close(self, timeout: float = 60.0) -> None:
        """Take no more jobs, finish those that are there, and end the thread; what is left after `timeout` seconds fails."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        if self.thread.is_alive():
            self.thread.join(timeout)
        self._fail_all(503, "the server is shutting down", keep=self.thread.is_alive())

    def _fail_all(self, status: int, message: str, *, keep: bool = False) -> None:
        """Fail whatever is there; `keep` leaves the taking away to the thread, which may be at work on it."""
        with self.changed:
            jobs = [*(job for line in self.waiting.values() for job in line), *self.preparing, *self.running]
            if not keep:
                for line in (self.waiting, self.preparing, self.running):
                    line.clear()
        for job in jobs:
            job.emit(Failed(status, message))
            job.cancel()

    # ---- the thread ----

    def _run(self) -> None:
        while self._wait():
            try:
                self._forget()
                self._admit()
                self._prepare()
                self._step()
            except Exception:  # a defect of ours: better that all who are there are told than that they wait for ever
                log.exception("the scheduler failed")
                self._fail_all(500, "the server made a mistake; it is in its log")
                self.batch.clear()

    def _wait(self) -> bool:
        """Sleep until there is something to do; false when there never will be."""
        with self.changed:
            while not (self.active or self.queued):
                if self.closing:
                    return False
                self.changed.wait()
        return True

    def _forget(self) -> None:
        """Drop jobs that were cancelled or are too late."""
        now = time.monotonic()

        def dead(job: Job) -> bool:
            if not job.cancelled and now > job.deadline:
                job.emit(Failed(504, "the request took too long; ask for less, or try again when the server is less busy"))
                job.cancel()
            return job.cancelled

        with self.changed:
            for tenant, line in list(self.waiting.items()):
                self.waiting[tenant] = deque(j for j in line if not dead(j))
        for job in [j for j in self.preparing if dead(j)]:
            job.work.close()
            self.preparing.remove(job)
        for job in [j for j in self.running if dead(j)]:
            self._leave(job)

    def _admit(self) -> None:
        """Take jobs in, one of each tenant in turn."""
        with self.changed:
            while self._has_room():
                held = Counter(job.tenant for job in self.preparing)
                tenant = next((t for t, line in self.waiting.items() if line and held[t] < max(1, self.max_rows // 2)), None)
                if tenant is None:
                    return
                line = self.waiting.pop(tenant)
                self.preparing.append(line.popleft())
                if line:
                    self.waiting[tenant] = line  # at the end: the others come first

    def _has_room(self) -> bool:
        """Tell whether another job may be prepared; each young one counts as one row, whatever number it will begin with."""
        young = sum(not job.long for job in self.preparing)
        fits = young < PREPARING and young + len(self.batch.rows) < self.max_rows
        return fits and len(self.preparing) < self.max_rows + PREPARING

    def _prepare(self) -> None:
        """Let a job in preparation do its next piece; another as well when that was its last, while more wait than generate."""
        while self._piece() and len(self.preparing) + self.queued > len(self.running):
            self._admit()

    def _piece(self) -> bool:
        """Let the job in preparation whose turn it is do its next piece; tell whether it was its last."""
        if not self.preparing:
            return False
        job = next((job for job in self.preparing if job.long == self.longs_turn), self.preparing[0])
        self.longs_turn = not job.long
        try:
            next(job.work)
            job.pieces += 1
            self.preparing.remove(job)
            self.preparing.append(job)
            return False
        except StopIteration as end:
            self._begin(job, end.value)
        except StorageError as error:
            log.error("%s", error)
            self._finish(job, Failed(500, STORAGE))
        except ICAEError as error:
            self._finish(job, Failed(getattr(error, "status", 400), str(error)))
        except Exception:
            log.exception("a job failed in preparation")
            self._finish(job, Failed(500, "the server made a mistake; it is in its log"))
        self.preparing.remove(job)
        return True

    def _begin(self, job: Job, value: Any) -> None:
        """Let a prepared job generate with the others; one that is no generation is done."""
        if not isinstance(value, Answer):
            self._finish(job, Done(value))
            return
        job.answer = value
        self.running.append(job)
        try:
            for row in value.rows:
                if row.finished is None:
                    self.batch.join(row)
            self._heard(job)
        except Exception:
            self._broken()

    def _step(self) -> None:
        """Generate a token for each row, or several where it guessed right."""
        if not self.running:
            return
        self.steps, self.step_rows = self.steps + 1, self.step_rows + len(self.batch.rows)
        try:
            self.batch.step()
            for job in list(self.running):
                self._heard(job)
        except Exception:
            self._broken()

    def _heard(self, job: Job) -> None:
        """Hand on what an answer says by now, and let those of its rows go that have ended, or did not become the answer."""
        answer = job.answer
        assert answer is not None
        rows = answer.rows
        answer.decide()
        for row in rows:
            if row in self.batch.rows and (row.finished is not None or row not in answer.rows):
                self.batch.leave(row)
        said = answer.row
        if said is not None and said.ids:
            job.emit(Token(list(said.ids)))
        if said is not None and said.finished is not None:
            self.running.remove(job)
            self._finish(job, Done(said.finished))

    def _leave(self, job: Job) -> None:
        self.running.remove(job)
        assert job.answer is not None
        for row in job.answer.rows:
            if row in self.batch.rows:
                self.batch.leave(row)

    def _finish(self, job: Job, event: Event) -> None:
        self.finished += 1
        self.seconds += 0.1 * (time.monotonic() - job.made - self.seconds)
        job.emit(event)

    def _broken(self) -> None:
        """Fail all rows after an error in the batch, which then is empty and sound again."""
        log.exception("a step failed")
        for job in self.running:
            self._finish(job, Failed(500, "the server made a mistake; it is in its log"))
        self.running.clear()
        self.batch.clear()
