"""What a checkpoint is (`ICAEConfig`) and how it was made (`TrainConfig`): every default of the project, once.

Both are frozen dataclasses, checked when they are built. The sentence under each default lives in the field's metadata, and the
command line and the documentation take it from there, so that no number is stated twice.
"""

from __future__ import annotations

import dataclasses
import difflib
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, get_type_hints

from pydantic import TypeAdapter, ValidationError

from icae.errors import ICAEError, reason

FORMAT_VERSION = 1
"""Version of the checkpoint and slot-file formats; files of another version are refused."""

KINDS = ("kv", "embedding")
LAYOUTS = ("spread", "appended")
MEMORY_TOKENS = ("pooled", "mixed", "shared", "learned")
READOUTS = ("last", "memory", "residual")
OBJECTIVES = ("pretrain", "instruct")
OPTIMIZERS = ("muon", "adamw")
DEVICES = ("cpu", "cuda", "mps")


POLISH_RATES = {"keys": 0.015, "values": 0.06, "embeddings": 0.03}
"""How far a number of a slot's tensor moves at a step of polishing, at most, in root mean squares of its layer: at 4x; elsewhere by the
root of the ratio."""
MOST_BEGINNINGS = 8
"""Rows that one answer may take."""


def setting(
    default: Any,
    help: str,
    *,
    one_of: tuple[str, ...] = (),
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    finetuning: bool = False,
) -> Any:
    """Return a dataclass field with `default`, the sentence that help texts and documents show for it, and the values it may have.

    `finetuning` is for settings that pretraining does not read.
    """
    help = f"When fine-tuning: {help}" if finetuning else help
    metadata = {"help": help, "one_of": one_of, "least": least, "most": most, "above": above, "below": below, "finetuning": finetuning}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata=metadata)
    return field(default=default, metadata=metadata)


class _Config:
    """What the two configs share: building from plain dictionaries, with errors that name the field."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Build the config from plain values.

        Raises
        ------
        ICAEError
            If a key is unknown (the message suggests the nearest one) or a value is out of range.
        """
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"
                raise ICAEError(f"unknown setting {key!r} in {cls.__name__}{hint}")
        hints = get_type_hints(cls)
        return cls(**{name: _typed(name, value, hints[name]) for name, value in values.items()})

    def __post_init__(self) -> None:
        """Check every field, so that a bad setting is named before a model is loaded and hours are spent."""
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            if (value := getattr(self, f.name)) is not None:
                _check(f.name, value, f.metadata)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, ready for JSON."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def replace(self, **changes: Any) -> Self:
        """Return a copy with `changes`, checked again."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


def _typed(name: str, value: Any, kind: Any) -> Any:
    """Return a setting in its field's type; YAML reads 1e-3 as a string."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        nearest = max(len(wrong["loc"]) for wrong in error.errors())  # of several types, the one that the value comes nearest to
        found = [wrong for wrong in error.errors() if len(wrong["loc"]) == nearest]
        kinds = dict.fromkeys(wrong["msg"].partition(",")[0].removeprefix("Input should be ") for wrong in found)
        told = " or ".join(kinds).replace("valid integer", "whole number").replace("valid ", "")
        place = f", {found[0]['loc'][-1]}," if nearest > 1 else ""
        raise ICAEError(f"{name}{place} must be {told}, got {found[0]['input']!r}") from None


def _check(name: str, value: Any, about: Mapping[str, Any]) -> None:
    """Refuse a value that the field may not have."""
    if about["one_of"] and value not in about["one_of"]:
        raise ICAEError(f"{name} must be one of {', '.join(about['one_of'])}, got {value!r}")
    for bound, words, holds in BOUNDS:
        if (limit := about[bound]) is not None and not (isinstance(value, (int, float)) and holds(value, limit)):
            raise ICAEError(f"{name} must be {words} {limit:g}, got {value}: {about['help']}")


BOUNDS: tuple[tuple[str, str, Callable[[float, float], bool]], ...] = (
    ("least", "at least", operator.ge),
    ("most", "at most", operator.le),
    ("above", "above", operator.gt),
    ("below", "below", operator.lt),
)


def _curriculum(name: str, rows: list[list[Any]], least: int, most: int, form: str) -> None:
    """Refuse a curriculum whose rows do not begin at ascending steps, the first at 0, or have too few numbers or too many."""
    starts = [row[0] for row in rows if row]
    if not rows or any(not least <= len(row) <= most for row in rows) or starts[0] != 0 or starts != sorted(set(starts)):
        raise ICAEError(f"{name} must be {form}, at ascending steps from 0 on, got {rows}")


@dataclass(frozen=True)
class ICAEConfig(_Config):
    """What an ICAE checkpoint is: everything needed to rebuild its encoder around the base it was trained on."""

    base: str = setting("smollm2-135m", "Name, folder or Hub id of the frozen LLM.")
    base_fingerprint: str = setting("", "Hash over the base's architecture and tensors; checked when a checkpoint is loaded.")
    kind: str = setting(
        "kv", "What a memory slot is: 'kv' (keys and values in every layer) or 'embedding' (one vector, by `readout`).", one_of=KINDS
    )
    ratio: int = setting(4, "Context tokens a memory slot stands for, by default.", least=1)
    segment_length: int = setting(128, "Longest piece of context, in tokens, that is encoded at once; longer texts are cut evenly.")
    polish: int | None = setting(
        None,
        "Gradient steps on a segment's slots after they were written, by default: each costs about twice what encoding does; none: one, "
        "and another for every four tokens that a slot stands for, nine at most.",
        least=0,
    )
    focus: int = setting(
        4,
        "Segments that a prompt is answered from, at most: of several documents, and of a longer one, those that it is about; 0: all.",
        least=0,
    )
    grounding: float = setting(
        1.0,
        "How strongly an answer keeps to the words of its context: a factor of what other tokens lose (grounding.py); 0: not at all.",
        least=0,
    )
    beginnings: int = setting(
        3,
        "Likeliest first tokens that an answer is begun with, to go on from the likeliest beginning (beginnings.py); 1: of one.",
        least=1,
        most=MOST_BEGINNINGS,
    )
    layout: str = setting("spread", "Position ids of memory tokens: 'spread' over the context or 'appended' after it.", one_of=LAYOUTS)
    memory: str = setting(
        "pooled",
        "Memory token: 'pooled' (one vector + mean of its block), 'mixed' (pooled, with a learned linear map for each place in the block; "
        "`ratio` of them, which neighbours share at higher ratios), "
        "'shared' (one vector), 'learned' (one a slot).",
        one_of=MEMORY_TOKENS,
    )
    readout: str = setting(
        "last",
        "What an embedding slot is: 'last' (the last hidden state, as in the paper), 'memory' (the memory token itself: no pass through "
        "the LLM) or 'residual' (their sum, the state by a learned linear map that starts at zero).",
        one_of=READOUTS,
    )
    slot_norm: float | None = setting(
        None, "Size of an embedding slot, in root mean squares of the base's token embeddings; none: as it is read out.", above=0
    )
    marker_length: int = setting(
        2,
        "Vectors of a marker ([AE], [LM], [FT]): the first becomes the base's attention sink, the last asks for the first token.",
        least=1,
    )
    lora_rank: int = setting(64, "Rank of the encoder's LoRA.", least=1)
    lora_alpha: int = setting(64, "LoRA's numerator: updates are scaled by lora_alpha / lora_rank.", least=1)
    lora_dropout: float = setting(0.0, "Dropout before LoRA's first matrix, while training.", least=0, below=1)
    lora_targets: list[str] = setting(["q_proj", "k_proj", "v_proj", "o_proj"], "Names of the base's linear modules that get LoRA.")
    version: int = setting(FORMAT_VERSION, "Version of the checkpoint format.")

    def __post_init__(self) -> None:
        """Check every field, and what they are together."""
        super().__post_init__()
        if self.segment_length < self.ratio:
            raise ICAEError(f"segment_length must be at least the ratio, {self.ratio}, got {self.segment_length}")
        if self.version != FORMAT_VERSION:
            raise ICAEError(f"checkpoint format {self.version} is not the one this version reads ({FORMAT_VERSION})")


@dataclass(frozen=True)
class TrainConfig(_Config):
    """How an adapter is trained: data, objectives, schedule."""

    output: str = setting("runs/icae", "Folder for checkpoints, logs and the final adapter.")
    train: str | list[str] | dict[str, float] = setting(
        "",
        "Training data: a folder of .txt, a .txt or .jsonl file, or a Hub data set name; for fine-tuning a .jsonl of triples, a .json of "
        "SQuAD's form, or a Hub name. Also several: a list, or a mapping with each one's share.",
    )
    held_out: str | None = setting(None, "Data for the held-out loss, in the same forms; none: no held-out loss.")
    objective: str = setting(
        "pretrain", "'pretrain' (autoencoding and continuation) or 'instruct' (context, prompt, response).", one_of=OBJECTIVES
    )
    init: str | None = setting(
        None,
        "Checkpoint to start from: a folder, a shipped name or a Hub id; none: a new adapter. `icae finetune` starts from the one that "
        "ships, where `init` is left out.",
    )
    max_tokens: int | None = setting(None, "Read at most this many tokens of the training data; none: all.", least=1)
    steps: int = setting(1000, "Optimizer updates.", least=1)
    minutes: float | None = setting(
        None, "End sooner, after so many minutes; the learning rate then falls by the clock. None: never.", above=0
    )
    windows: list[list[int]] = setting(
        [[0, 32], [300, 64], [600, 128]],
        "Curriculum: [first step, context tokens of a segment, most segments before a continuation (left out: 1)].",
    )
    ratios: list[int] | None = setting(None, "Compression ratios drawn a batch; none: the checkpoint's own.")
    batch_size: int = setting(4, "Samples a process and accumulation step.", least=1)
    accumulation: int = setting(1, "Backward passes an update.", least=1)
    autoencoding_share: float = setting(
        0.5, "lambda: the share of samples a batch that autoencode; the others continue the text.", least=0, most=1
    )
    autoencoding_eos: bool = setting(True, "End the autoencoding target with the tokenizer's EOS.")
    first_weight: float = setting(1.0, "Weight of the first token of a text that is read back, among its others; it learns last.", least=0)
    continuation_length: int = setting(64, "Tokens of a continuation target, at most; never more than the window.", least=1)
    recall_share: float = setting(
        0.0, "The share of continuation samples that begin with some tokens of the context and go on as it went on there.", least=0, most=1
    )
    recall_cue: int = setting(8, "Tokens that such a sample begins with.", least=1)
    continuation_distil: float = setting(
        0.0,
        "Weight of the KL to the base's own distribution with the full text, where a text goes on; the text itself has the rest.",
        least=0,
        most=1,
    )
    continuation_unscored: int = setting(0, "First tokens of a continuation that no loss reads.", least=0)
    response_length: int = setting(256, "longest response, in tokens; longer ones are cut.", least=1, finetuning=True)
    context_length: int | None = setting(
        1024, "triples with a longer context, in tokens, are left out; none: all are taken.", least=2, finetuning=True
    )
    distil: float = setting(
        0.0,
        "weight of the KL to the base's own distribution with the full text; the response itself has the rest.",
        least=0,
        most=1,
        finetuning=True,
    )
    teacher: str | None = setting(
        None,
        "PEFT adapter of the base that answers with the full text; it teaches the responses, but those that the base "
        "wrote (`icae data build`), which the base itself teaches. None: the base itself teaches all.",
        finetuning=True,
    )
    align: float = setting(
        0.0,
        "Weight of the squared distance, relative to its size, between the decoder's hidden states and those of who teaches (`distil`, "
        "`continuation_distil`).",
        least=0,
    )
    prompts: int = setting(
        1,
        "prompts a context is asked in a row, at most: the data's first about it and others; its slots are written once.",
        least=1,
        finetuning=True,
    )
    distractors: int = setting(0, "most other documents put around a context, each as slots of its own.", least=0, finetuning=True)
    distractor_share: float = setting(
        0.5, "the share of samples that get distractors, where there are any.", least=0, most=1, finetuning=True
    )
    pretrain_share: float = setting(0.0, "the share of samples taken from `replay` against forgetting.", least=0, most=1, finetuning=True)
    replay: str | list[str] | dict[str, float] | None = setting(
        None, "text for the pretraining samples, in the forms of pretraining's `train`.", finetuning=True
    )
    optimizer: str = setting("muon", "'muon' (LoRA's matrices by Muon, the rest by AdamW) or 'adamw'.", one_of=OPTIMIZERS)
    learning_rate: float = setting(1e-3, "Peak learning rate of LoRA's first matrices.", above=0)
    lora_b_multiplier: float = setting(1.0, "Learning rate of LoRA's second matrices, relative (LoRA+, arXiv 2402.12354).", least=0)
    memory_multiplier: float = setting(1.0, "Learning rate of the memory token and the AE, LM, FT vectors, relative.", least=0)
    schedule: str = setting("cosine", "Learning-rate schedule after warm-up, by its transformers name.")
    rate_factors: list[list[float]] = setting([[0, 1.0]], "Curriculum: [first step, factor on every learning rate] pairs, in order.")
    warmup_steps: int = setting(20, "Updates of linear warm-up.", least=0)
    adam_beta2: float = setting(0.98, "AdamW's second-moment decay.", least=0, below=1)
    weight_decay: float = setting(0.0, "AdamW's weight decay.", least=0)
    clip: float = setting(2.0, "Gradient norm is clipped to this.", above=0)
    eval_steps: int = setting(100, "Updates between held-out losses.", least=1)
    eval_samples: int = setting(32, "Held-out samples a loss is taken over.", least=1)
    save_steps: int = setting(100, "Updates between checkpoints.", least=1)
    keep: int = setting(2, "Checkpoints kept.", least=1)
    log_steps: int = setting(10, "Updates between log lines.", least=1)
    seed: int = setting(0, "Seed of the initial weights and of the order of samples.", least=0)
    bf16: bool = setting(
        False, "Keep the frozen base in bfloat16, and compute in it: for accelerators, and for CPUs that have units for it (AMX)."
    )
    compile: bool = setting(
        False, "On a CPU with bf16: have torch compile what is left beside the products, which takes half a minute and a C++ compiler."
    )
    device: str = setting("cpu", "'cpu', 'cuda' or 'mps'; of several, CUDA_VISIBLE_DEVICES chooses.", one_of=DEVICES)
    workers: int = setting(0, "Processes that prepare samples; 0: the training process itself, which keeps up on a CPU.", least=0)

    def __post_init__(self) -> None:
        """Check every field, and what they are together."""
        super().__post_init__()
        if self.pretrain_share and not self.replay:
            raise ICAEError("pretrain_share needs text to replay: replay=FOLDER of .txt")
        if self.replay and not self.pretrain_share and self.objective == "instruct":
            raise ICAEError("of replay nothing is taken while pretrain_share is 0: pretrain_share=0.3, or replay=null")
        if self.teacher and not (self.distil or self.align):
            raise ICAEError("a teacher is not asked while distil and align are 0: distil=0.5, or teacher=null")
        if self.compile and not (self.bf16 and self.device == "cpu"):
            raise ICAEError("compile is for device=cpu with bf16=true; leave it out elsewhere")
        for name in ("train", "replay"):
            source = getattr(self, name)
            if isinstance(source, dict) and not all(isinstance(share, (int, float)) and share > 0 for share in source.values()):
                raise ICAEError(f"the shares in {name} must be numbers above 0, got {source}; try {{a.jsonl: 3, b.jsonl: 1}}")
        _curriculum("windows", self.windows, 2, 3, "[first step, tokens(, segments)]")
        _curriculum("rate_factors", self.rate_factors, 2, 2, "[first step, factor]")
        if any(factor < 0 for _, factor in self.rate_factors):
            raise ICAEError(f"rate_factors must be at least 0, got {self.rate_factors}")
        if any(w[1] < 2 or w[-1] < 1 for w in self.windows):
            raise ICAEError(f"windows must have two tokens and one segment at least, got {self.windows}; try [[0, 32]]")
        if self.ratios is not None and (not self.ratios or min(self.ratios) < 1):
            raise ICAEError(f"ratios must be whole numbers of at least 1, got {self.ratios}; leave it out for the checkpoint's own")
        if self.autoencoding_share < 1:
            shortest = min(self.continuation_length, *(w[1] for w in self.windows))
            if shortest <= self.continuation_unscored:
                raise ICAEError(
                    f"of a continuation's {shortest} tokens none is scored; raise continuation_length, or lower continuation_unscored"
                )
            if self.recall_share and self.continuation_length < 2:
                raise ICAEError("continuation_length must be at least 2 beside recall_share: what is recalled has half as many tokens")

    def unread(self) -> list[str]:
        """Return the settings that are not their defaults and that pretraining does not read, if it is that."""
        fields = [f for f in dataclasses.fields(self) if f.metadata["finetuning"] and self.objective == "pretrain"]
        return [f.name for f in fields if getattr(self, f.name) != f.default]

    def window(self, step: int) -> tuple[int, int]:
        """Return the context tokens of a segment and the most segments before a continuation, at a step of the curriculum."""
        _, tokens, *segments = [w for w in self.windows if w[0] <= step][-1]
        return tokens, segments[0] if segments else 1


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a training config: a YAML mapping with the keys of `TrainConfig`, and those of `ICAEConfig` under `model`.

    Raises
    ------
    ICAEError
        If the file is missing, is no YAML, or is no mapping.
    """
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ICAEError(f"no config file at {path}") from error
    except OSError as error:
        raise ICAEError(f"could not read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ICAEError(f"{path} is not valid YAML: {reason(error)}") from error
    if not isinstance(values, dict):
        raise ICAEError(f"{path} must hold settings as 'name: value' lines")
    return values
