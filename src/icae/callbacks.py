"""What ends a training run before its last step: its minutes, or Ctrl-C."""

from __future__ import annotations

import signal
import sys
import time
from typing import Any

from transformers import TrainerCallback

from icae.config import TrainConfig


class Clock(TrainerCallback):
    """Ends a run when its minutes are over, and tells how far it has come by them."""

    def __init__(self, train: TrainConfig) -> None:
        self.steps, self.minutes = train.steps, train.minutes
        self.begin: float | None = None

    def step(self) -> int:
        """Return the step that a run is at that takes all its steps in its minutes."""
        if self.minutes is None or self.begin is None:
            return 0
        return min(self.steps, int(self.steps * (time.monotonic() - self.begin) / (60 * self.minutes)))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count."""
        self.begin = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop, with a checkpoint, where the minutes are over."""
        if self.step() == self.steps:
            control.should_save = control.should_training_stop = True


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
        """Stop, with a checkpoint, where that was asked for."""
        if self.asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give Ctrl-C back."""
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
