"""An adapter is trained: settings -> the model it begins with, its samples, and the loop (loop.py) over them.

Which samples there are is the data's business (data.py, triples.py), what is learned from them the objectives'.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from icae.base import Base, load_base
from icae.checkpoint import find_checkpoint, load_weights, read_config
from icae.config import ICAEConfig, TrainConfig
from icae.data import HeldOut, Windows, load_texts
from icae.decoder import Decoder
from icae.errors import ICAEError
from icae.fused import fuse_norms
from icae.instructions import Triples, load_pools
from icae.lean import LeanLlama
from icae.loop import make_arguments, run
from icae.model import ICAE
from icae.reader import Reader


def train(train: TrainConfig, model_config: ICAEConfig, *, resume: bool = True, quiet: bool = False) -> Path:
    """Train an adapter and return the folder it is in.

    Parameters
    ----------
    train : TrainConfig
        Data, objective, schedule.
    model_config : ICAEConfig
        What to build; where `train.init` names a checkpoint, what `starting_config` made of that one's.
    resume : bool
        Go on from the newest checkpoint in the output folder, if there is one.
    quiet : bool
        No progress bar and no log lines on the terminal.

    Raises
    ------
    ICAEError
        If data, checkpoint or settings are wrong; nothing is written then.
    """
    if not train.train:
        raise ICAEError("train is empty: name the training data (a folder of .txt, a .txt or .jsonl file, or a Hub data set)")
    torch.manual_seed(train.seed)
    arguments = make_arguments(train, quiet)
    model = build(train, model_config, str(arguments.device))
    samples, held_out = make_data(train, model.base, model.config, arguments.world_size)
    return run(Trainee(model), train, arguments, samples, held_out, resume=resume)


def starting_config(init: str | None, settings: dict[str, Any]) -> ICAEConfig:
    """Return the config of the checkpoint `init` (none: the defaults) with `settings` changed; errors as for `ICAEConfig.from_dict`.

    An adapter may go on with another segment length, ratio, memory token or readout, as long as its own tensors still fit.
    """
    known = {} if init is None else read_config(find_checkpoint(init)).to_dict()
    return ICAEConfig.from_dict({**known, **settings})


def build(train: TrainConfig, config: ICAEConfig, device: str) -> ICAE:
    """Return the model a run begins with, on its process's device: new, or that of the checkpoint `train.init`."""
    start = None if train.init is None else find_checkpoint(train.init)
    base = load_base(config.base, dtype=torch.bfloat16 if train.bf16 else torch.float32, device=device)
    if start is not None:
        known = read_config(start)
        if base.fingerprint != known.base_fingerprint:
            raise ICAEError(f"{start} was trained on another base than {base.name!r}; start from one of its own")
        for name in _SHAPE:
            if (mine := getattr(config, name)) != (its := getattr(known, name)):
                raise ICAEError(f"model.{name} is {mine}, but {start} was made with {its}; keep that, or begin without init")
    model = ICAE(base, config)
    if base.device.type != "cpu":  # several processes call theirs cpu:0
        fuse_norms(base.model)
        fuse_norms(model.encoder)
        model.encoder.fused = True
    elif train.bf16:
        model.encoder.train_lean(compiled=train.compile)
        if train.compile and model.encoder.lean is None:
            raise ICAEError("compile is for kv slots of a Llama, trained without lora_dropout; leave it out for others")
    if train.teacher is not None and train.objective == "instruct":
        tuned = base.tuned(train.teacher)
        model.tutor = Reader(Decoder(tuned), config, model.markers)
        if model.encoder.lean is not None:
            model.lean_tutor = LeanLlama(tuned, compiled=train.compile)
    if start is not None:
        load_weights(model, start, fresh=("mix", "connector"))  # over an adapter trained without them, both start as nothing
    return model


_SHAPE = ("kind", "lora_rank", "lora_alpha", "lora_targets", "marker_length")
"""Settings that an adapter cannot go on without: its tensors have that shape, and that scale."""


class Trainee(nn.Module):
    """An ICAE as Trainer sees it: without a `config`, which Trainer takes for one of transformers' own and writes to."""

    def __init__(self, icae: ICAE):
        super().__init__()
        self.icae = icae

    def forward(self, **batch: Any) -> dict[str, torch.Tensor]:
        """Return the loss of a batch; a held-out one is of the targets alone, whatever teaches."""
        batch = send_to_device(batch, "cpu")  # on several accelerators, torch has moved it to this process's
        return self.icae(**(batch if self.training else {**batch, "teacher": None}))

    def trained(self) -> dict[str, torch.Tensor]:
        """Return all that is trained, by name."""
        return self.icae.adapter_tensors()

    def save(self, folder: Path) -> None:
        """Write what is trained."""
        self.icae.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        load_weights(self.icae, folder)

    def check(self, folder: Path) -> None:
        """Refuse to go on from a checkpoint of another shape."""
        new = self.icae.config.to_dict()
        old = read_config(folder).to_dict()
        other = [name for name, value in old.items() if value != new[name] and name != "base"]  # that one is known by its fingerprint
        if other:
            raise ICAEError(f"{folder} was made with another {', '.join(other)}; name another output, or use the same settings")


def make_data(train: TrainConfig, base: Base, config: ICAEConfig, processes: int) -> tuple[Any, Any]:
    """Return the training samples and, where asked for, the held-out ones."""

    def windows(source: str | list[str] | dict[str, float]) -> Windows:
        return Windows(load_texts(source, base, train.max_tokens), base, config, train, processes=processes)

    if train.objective == "pretrain":
        held_out = None if train.held_out is None else HeldOut(windows(train.held_out), train.eval_samples)
        return windows(train.train), held_out
    limits = {"least": config.ratio, "most": min(train.context_length or base.max_positions, base.max_positions)}
    replay = windows(train.replay) if train.replay else None
    samples = Triples(load_pools(train.train, base, **limits), base, config, train, replay, processes=processes)
    if train.held_out is None:
        return samples, None
    pools = load_pools(train.held_out, base, **limits)
    plain = train.replace(pretrain_share=0.0, replay=None, seed=20_240, distractors=0, ratios=None)
    return samples, torch.utils.data.Subset(Triples(pools, base, config, plain), range(min(train.eval_samples, len(pools[0].triples))))
