"""What ends a training run before its last step: its minutes, or Ctrl-C."""

from __future__ import annotations

import signal
import sys
import time
from typing import Any

import torch
from accelerate.utils import gather
from transformers import TrainerCallback

from icae.config import TrainConfig


class Clock(TrainerCallback):
    """Ends a run when its minutes are over, and tells how far it has come by them."""

    def __init__(self, train: TrainConfig) -> None:
        self.steps, self.minutes = train.steps, train.minutes
        self.spent = 0.0
        """Minutes that the run has taken, to a millionth, as all processes read them before their last update."""
        self._before = self._begin = 0.0

    def go_on(self, minutes: float) -> None:
        """Count on from the minutes that the run had spent before it was taken up again."""
        self._before = self.spent = minutes

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count; take this run's steps between logs and checkpoints, where the state that it goes on from has others."""
        state.compute_steps(args, state.max_steps)
        self._begin = time.monotonic()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the time, once an update."""
        spent = round(1e6 * (self._before + (time.monotonic() - self._begin) / 60))
        self.spent = (spent if self.minutes is None else agreed(spent, args.device)) / 1e6

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop, with a checkpoint, where the minutes are over; each checkpoint has a line of the log, which counts what was spent."""
        if self.over:
            control.should_save = control.should_training_stop = True
        control.should_log |= control.should_save

    @property
    def over(self) -> bool:
        """Whether the minutes are."""
        return self.minutes is not None and self.spent >= self.minutes

    @property
    def step(self) -> int:
        """The step that a run is at that takes all its steps in its minutes."""
        return 0 if self.minutes is None else min(self.steps, int(self.steps * self.spent / self.minutes))


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C ends the run after the step under way, with a checkpoint; a second one ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        self.before: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take Ctrl-C over."""
        try:
            self.before = signal.signal(signal.SIGINT, self._ask)
        except ValueError:  # not the main thread: then Ctrl-C is somebody else's
            self.before = None

    def _ask(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("stopping after this step, with a checkpoint; once more to stop at once", file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop, with a checkpoint, where that was asked for, of whichever process."""
        if agreed(self.asked, args.device):
            control.should_log = control.should_save = control.should_training_stop = True

    def give_back(self) -> None:
        """Give Ctrl-C back, however the run ended."""
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
            self.before = None


def agreed(value: int, device: torch.device) -> int:
    """Return the largest value that any process has: they must take the same rate, and end at the same step."""
    if not torch.distributed.is_initialized():
        return value  # alone: an accelerator need not be waited for
    return int(gather(torch.tensor([value], device=device)).max())
