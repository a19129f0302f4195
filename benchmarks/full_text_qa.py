"""The upper bound of answering from slots: the same LoRA on the base itself, fine-tuned to answer with the *full text* in its prompt.

    python benchmarks/full_text_qa.py train [CONFIG] [name=value ...], as `icae finetune`
    python benchmarks/full_text_qa.py evaluate runs/full-text --data FILE.jsonl [--samples N] [--seed N] [--save FILE.json]

It reads the config that fine-tunes slots: same triples in the same order, same steps, same rank and targets as the adapter in `init`, same
loop (loop.py, with its fast products, logs and checkpoints), same score (icae.qa). Replayed samples, which have no response, are
passed over. This base is no longer the LLM as published; it exists for comparison alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor, nn
from torch.func import functional_call

from icae.atomic import write_atomically
from icae.base import Base, load_base
from icae.config import ICAEConfig
from icae.errors import ICAEError
from icae.fused import effective_weights
from icae.lean import LeanLlama, is_plain_llama
from icae.loop import make_arguments, run
from icae.matmul import fast_linear
from icae.model import ICAE
from icae.qa import drawn, qa
from icae.report import commit, machine
from icae.train import make_data, starting_config
from icae.train_cli import read_settings
from icae.tree_loss import plain_loss
from icae.triples import digest, load_triples

ABOUT = "full_text.json"


class FullText(nn.Module):
    """The base with LoRA, which reads text, question and response as plain ids."""

    def __init__(self, base: Base, config: ICAEConfig):
        super().__init__()
        from peft import LoraConfig, get_peft_model

        self.base, self.fused = base, base.device.type != "cpu"
        self.lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=list(config.lora_targets),
            base_model_name_or_path=base.name,
        )
        self.peft: Any = get_peft_model(base.twin(), self.lora)
        self.lean: LeanLlama | None = None
        """What trains on a CPU with bfloat16 units; none: the LLM's own layers."""

    def forward(self, groups: list[list[int]], teacher: dict[str, Tensor] | None = None, **_: Any) -> dict[str, Tensor]:
        """Return the mean over samples of the mean cross-entropy over their response's tokens."""
        if teacher is None:  # every sample of the batch was replayed
            return {"loss": sum((p.sum() * 0 for p in self.trained().values()), torch.zeros(()))}
        if self.lean is not None and self.training:
            kinds = [tuple(groups[b]) for b in teacher["rows"].tolist()]
            loras = self.lean.loras(self.peft.get_base_model().get_decoder())
            return {"loss": plain_loss(self.lean, kinds, teacher["ids"], teacher["real"], teacher["scored"], loras)}
        keep = teacher["scored"].any(0).nonzero()[:, 0].to(self.base.device)
        ids, scored, real = (teacher[name].to(self.base.device) for name in ("ids", "scored", "real"))
        inputs = {"input_ids": ids[:, :-1], "attention_mask": real[:, :-1].long(), "logits_to_keep": keep - 1}
        if self.fused and self.training:
            logits = functional_call(self.base.model, effective_weights(self.peft.get_base_model()), kwargs=inputs).logits
        else:
            logits = self.peft(**inputs).logits
        nll = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, keep].flatten(), reduction="none")
        wanted = scored[:, keep]
        return {"loss": ((nll.view(wanted.shape) * wanted).sum(1) / wanted.sum(1).clamp(min=1)).mean()}

    def trained(self) -> dict[str, Tensor]:
        """Return all that is trained, by name."""
        return {name: p for name, p in self.peft.named_parameters() if p.requires_grad}

    def save(self, folder: Path) -> None:
        """Write LoRA as PEFT does, and what it is for."""
        folder.mkdir(parents=True, exist_ok=True)
        self.peft.save_pretrained(folder, save_embedding_layers=False)
        write_atomically(folder / ABOUT, json.dumps(self._about(), indent=2).encode())

    def load(self, folder: Path) -> None:
        """Read what `save` wrote."""
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        set_peft_model_state_dict(self.peft, load_file(folder / "adapter_model.safetensors"))

    def check(self, folder: Path) -> None:
        """Refuse to go on from another base or shape."""
        if json.loads((folder / ABOUT).read_text()) != self._about():
            raise ICAEError(f"{folder} is of another base or shape; name another output")

    def _about(self) -> dict[str, Any]:
        targets = sorted(self.lora.target_modules)
        return {"base": self.base.name, "fingerprint": self.base.fingerprint, "rank": self.lora.r, "alpha": self.lora.lora_alpha} | {
            "targets": targets
        }


def train(config: str, overrides: list[str]) -> Path:
    """Train with the settings of a fine-tuning config."""
    settings, model = read_settings(config, "instruct", overrides)
    settings = settings.replace(distil=1.0, align=0.0, teacher=None, continuation_distil=0.0)  # questions alone carry the full text
    shape = starting_config(settings.init, model)
    torch.manual_seed(settings.seed)
    arguments = make_arguments(settings, quiet=False)
    base = load_base(shape.base, dtype=torch.bfloat16 if settings.bf16 else torch.float32, device=str(arguments.device))
    samples, held_out = make_data(settings, base, shape, arguments.world_size)
    learner = FullText(base, shape)
    if settings.bf16 and base.device.type == "cpu" and is_plain_llama(base) and not shape.lora_dropout:
        learner.lean = LeanLlama(base, compiled=settings.compile)
    return run(learner, settings, arguments, samples, held_out, resume=True)


def evaluate(
    folder: Path, data: str, samples: int | None, seed: int, max_tokens: int, save: Path | None, device: str = "cpu"
) -> dict[str, Any]:
    """Ask the tuned base with the full text (its words free, and kept to the text's as those from slots are), and with nothing."""
    try:
        about = json.loads((folder / ABOUT).read_text())
    except OSError as error:
        raise ICAEError(f"{folder} holds no {ABOUT}; train one first") from error
    base = load_base(about["base"], device=device)
    if base.fingerprint != about["fingerprint"]:
        raise ICAEError(f"{folder} was trained on another base than {base.name!r}")
    reader = ICAE(base.tuned(folder), ICAEConfig(kind="embedding", lora_rank=1)).eval()
    every = load_triples(data, base)
    triples = drawn(every, samples, seed)

    def progress(done: int, total: int) -> None:
        print(f"{done} of {total}", end="\r", file=sys.stderr)

    with fast_linear():
        results, _ = qa(reader, triples, sides=["text", "text_grounded", "none"], max_new_tokens=max_tokens, progress=progress)
    report = {
        "name": "qa-full-text",
        "checkpoint": folder.name,
        "settings": {
            "data": Path(data).name,
            "data_sha256": digest(every),
            "samples": samples,
            "seed": seed,
            "max_new_tokens": max_tokens,
            "beginnings": reader.config.beginnings,
        },
        "results": results,
        "adapter": hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "training": json.loads((folder / "train_config.json").read_text()) if (folder / "train_config.json").exists() else None,
        "base": base.name,
        "base_fingerprint": base.fingerprint,
        "commit": commit(),
        "machine": machine(),
    }
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(save, (json.dumps(report, indent=2) + "\n").encode())
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    training = verbs.add_parser("train")
    training.add_argument("config")
    training.add_argument("overrides", nargs="*")
    measuring = verbs.add_parser("evaluate")
    measuring.add_argument("folder", type=Path)
    measuring.add_argument("--data", required=True)
    measuring.add_argument("--samples", type=int)
    measuring.add_argument("--seed", type=int, default=0)
    measuring.add_argument("--max-tokens", type=int, default=48)
    measuring.add_argument("--save", type=Path)
    measuring.add_argument("--device", default="cpu")
    a = parser.parse_args()
    try:
        if a.verb == "train":
            print(train(a.config, a.overrides))
        else:
            print(json.dumps(evaluate(a.folder, a.data, a.samples, a.seed, a.max_tokens, a.save, a.device)))
    except ICAEError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
