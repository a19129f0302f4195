"""The one training loop, on Hugging Face Trainer: a learner, its samples and a `TrainConfig` -> checkpoints, a log, what was learned.

What learns says itself what is trained, how it is saved and what of its past it fits (`Learner`). Runs alone, or under `accelerate
launch` / `torchrun`; goes on from its newest checkpoint, to the sample.
"""

from __future__ import annotations

import atexit
import json
import logging
import sys
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from transformers import Trainer, TrainerState, TrainingArguments, get_scheduler

from icae.atomic import make_room, write_atomically
from icae.base import check_device
from icae.callbacks import Clock, StopOnInterrupt
from icae.config import TrainConfig
from icae.errors import ICAEError
from icae.matmul import fast_linear
from icae.muon import Muon
from icae.objectives import collate


class Learner(Protocol):
    """What the loop trains: a module that returns {"loss"} for a batch of `objectives.collate`, and knows its own files."""

    def __call__(self, **batch: Any) -> dict[str, torch.Tensor]:
        """Return the loss of a batch."""

    def trained(self) -> dict[str, torch.Tensor]:
        """Return all that is trained, by name."""

    def save(self, folder: Path) -> None:
        """Write what is trained."""

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""

    def check(self, folder: Path) -> None:
        """Refuse to go on from a checkpoint of another shape."""


def run(trainee: Learner, train: TrainConfig, arguments: TrainingArguments, samples: Any, held_out: Any, *, resume: bool) -> Path:
    """Run the loop over samples, and return the folder that holds what was learned; errors as for `train`."""
    output = Path(train.output)
    make_room(output / _SETTINGS)
    if torch.distributed.is_initialized():
        atexit.register(_part)
    optimizer = _optimizer(trainee.trained(), train)
    clock, interrupt = Clock(train), StopOnInterrupt()
    module: Any = trainee
    trainer = ICAETrainer(
        model=module,
        args=arguments,
        train_dataset=samples,
        eval_dataset=held_out,
        data_collator=collate,
        optimizers=(optimizer, _schedule(optimizer, train, clock)),
        callbacks=[clock, interrupt],
        clock=clock,
    )
    last = _last_checkpoint(output)
    if last is not None and not resume:
        raise ICAEError(f"{output} holds checkpoints of another run; name another output, or remove them, to begin afresh")
    if last is not None:
        trainee.check(Path(last))
        trainer.go_on_counting(Path(last))
        _tell_changes(output / _SETTINGS, train, quiet=not arguments.should_save)
    if arguments.should_save:
        write_atomically(output / _SETTINGS, (json.dumps(train.to_dict(), indent=2) + "\n").encode())
    if last is not None and clock.over:  # Trainer would take a step before it looks
        trainee.load(Path(last))
        trainer.state = TrainerState.load_from_json(str(Path(last) / "trainer_state.json"))
    else:
        try:
            with fast_linear(torch.bfloat16 if train.bf16 else torch.float32):
                trainer.train(resume_from_checkpoint=last)
        finally:
            interrupt.give_back()
    if trainer.is_world_process_zero():
        trainee.save(output)
        trainer.state.save_to_json(str(output / "trainer_state.json"))
    return output


_SETTINGS = "train_config.json"


def _part() -> None:
    """Take down what connects the processes, while their threads can still be joined: at exit one now and then aborts, else."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _tell_changes(note: Path, train: TrainConfig, *, quiet: bool) -> None:
    """Say with which other settings a run goes on than it had; refuse what its optimizer's state does not allow."""
    try:
        before = json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    changed = {name: (before[name], value) for name, value in train.to_dict().items() if name in before and before[name] != value}
    if "optimizer" in changed:
        raise ICAEError(f"{note.parent} was begun with optimizer={before['optimizer']}; keep that, or name another output")
    if changed and not quiet:
        told = ", ".join(f"{name} {was!r} -> {now!r}" for name, (was, now) in changed.items())
        print(f"going on with other settings than before: {told}", file=sys.stderr)


class ICAETrainer(Trainer):
    """Trainer that takes samples in their order, and saves and loads checkpoints in ICAE's own format."""

    model: Any
    train_dataset: Any
    optimizer: Any
    lr_scheduler: Any
    context_tokens = 0
    """Context tokens that all processes have compressed, each shared segment once."""

    def __init__(self, *args: Any, clock: Clock, **kwargs: Any) -> None:
        self.clock = clock
        super().__init__(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Count the batch's context tokens, and learn from it."""
        self.context_tokens += sum(inputs["lengths"]) * self.args.world_size
        return super().training_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Write a line of the log, with what the run has cost so far: context tokens and minutes."""
        super().log({**logs, "context_tokens": self.context_tokens, "minutes": self.clock.spent}, *args, **kwargs)

    def go_on_counting(self, checkpoint: Path) -> None:
        """Take up the counts of a checkpoint's last line in the log; those of the updates behind it are lost."""
        try:
            lines = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
        except (ValueError, KeyError, TypeError) as error:
            raise _damaged(checkpoint) from error
        if lines:
            self.context_tokens = lines[-1].get("context_tokens", 0)
            self.clock.go_on(lines[-1].get("minutes", 0.0))

    def get_train_dataloader(self) -> Any:
        """Leave batches on the CPU: the model moves what its passes need, and nothing that is counted has to come back."""
        return _left_on_the_cpu(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As for training."""
        return _left_on_the_cpu(super().get_eval_dataloader(eval_dataset))

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        samples: Any = train_dataset if train_dataset is not None else self.train_dataset
        return torch.utils.data.SequentialSampler(samples)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self.model.save(Path(output_dir or self.args.output_dir or "."))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Take up the optimizer's state, with the learning rates, betas and weight decay that this run is told."""
        rates = list(self.lr_scheduler.base_lrs)
        told = [{name: group[name] for name in ("betas", "weight_decay")} for group in self.optimizer.param_groups]
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (RuntimeError, ValueError, KeyError, EOFError, OSError, UnpicklingError) as error:
            raise _damaged(Path(str(checkpoint))) from error
        if checkpoint is not None:
            factor = self.lr_scheduler.lr_lambdas[0](self.lr_scheduler.last_epoch)
            self.lr_scheduler.base_lrs, self.lr_scheduler._last_lr = rates, [rate * factor for rate in rates]
            for group, rate, other in zip(self.optimizer.param_groups, rates, told, strict=True):
                group |= {"initial_lr": rate, "lr": rate * factor, **other}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.model.load(Path(resume_from_checkpoint))

    def prediction_step(self, model: Any, inputs: dict, prediction_loss_only: bool, ignore_keys: Any = None) -> tuple:
        """Return the batch's loss alone."""
        with torch.no_grad():
            return model(**self._prepare_inputs(inputs))["loss"], None, None


def _left_on_the_cpu(loader: Any) -> Any:
    loader.device = None  # accelerate's loader then moves nothing
    return loader


def _last_checkpoint(output: Path) -> str | None:
    """Return the newest whole checkpoint: one without trainer_state.json, which is written last, was cut short."""
    whole = [p for p in output.glob("checkpoint-*") if (p / "trainer_state.json").is_file()]
    return str(max(whole, key=_step_of)) if whole else None


def _step_of(checkpoint: str | Path) -> int:
    return int(Path(checkpoint).name.rpartition("-")[2])


def _damaged(checkpoint: Path) -> ICAEError:
    return ICAEError(f"{checkpoint} is damaged; remove it, and the run goes on from the checkpoint before")


def _optimizer(trained: dict[str, torch.Tensor], train: TrainConfig) -> torch.optim.AdamW:
    """Return an optimizer with a learning rate a part: LoRA's first matrices, its second ones (both by Muon, where asked for), the rest."""
    parts: dict[str, list] = {"a": [], "b": [], "memory": []}
    for name, p in trained.items():
        parts["a" if "lora_A" in name else "b" if "lora_B" in name else "memory"].append(p)
    rates = {"a": 1.0, "b": train.lora_b_multiplier, "memory": train.memory_multiplier}
    groups = [
        {"params": ps, "lr": train.learning_rate * rates[part], "muon": train.optimizer == "muon" and part != "memory"}
        for part, ps in parts.items()
        if ps
    ]
    return Muon(groups, betas=(0.9, train.adam_beta2), weight_decay=train.weight_decay)


def _schedule(optimizer: torch.optim.Optimizer, train: TrainConfig, clock: Clock) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the named schedule, each step of it times the factor that is in force there; the clock may be ahead of the steps."""
    try:
        named: Any = get_scheduler(train.schedule, optimizer, train.warmup_steps, train.steps).lr_lambdas[0]  # type: ignore[attr-defined]
    except (ValueError, AttributeError, TypeError) as error:
        raise ICAEError(f"schedule {train.schedule!r} is none of transformers' that follow steps alone; try cosine or linear") from error

    def factor(step: int) -> float:
        return [f for start, f in train.rate_factors if start <= step][-1]

    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: named(max(step, clock.step)) * factor(step))


def make_arguments(train: TrainConfig, quiet: bool) -> TrainingArguments:
    """Return Trainer's settings for ours; raises `ICAEError` if the device is not there, on which Trainer would take another."""
    check_device(train.device)
    if quiet:
        logging.getLogger("transformers").setLevel(logging.ERROR)
    arguments = TrainingArguments(
        output_dir=train.output,
        max_steps=train.steps,
        per_device_train_batch_size=train.batch_size,
        per_device_eval_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulation,
        max_grad_norm=train.clip,
        logging_steps=train.log_steps,
        eval_strategy="no" if train.held_out is None else "steps",
        eval_steps=train.eval_steps,
        save_steps=train.save_steps,
        save_total_limit=train.keep,
        seed=train.seed,
        dataloader_num_workers=train.workers,
        use_cpu=train.device == "cpu",
        remove_unused_columns=False,
        label_names=[],
        report_to="none" if quiet else "tensorboard",
        disable_tqdm=quiet,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=True,  # no loss reads what kv slots' last layer does after its keys and values
    )
    if arguments.device.type != train.device:
        raise ICAEError(
            f"device is {train.device}, but training would take {arguments.device}; CUDA_VISIBLE_DEVICES hides what it should not"
        )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # several devices take several processes (torchrun); torch's DataParallel cannot cut our batches
    return arguments
