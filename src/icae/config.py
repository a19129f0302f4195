"""What a checkpoint is (`ICAEConfig`) and how it was made (`TrainConfig`): every default of the project, once.

Both are frozen dataclasses, checked when they are built. The sentence under each default lives in the field's metadata, and the
command line and the documentation take it from there, so that no number is stated twice.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from icae.errors import ICAEError

FORMAT_VERSION = 1
"""Version of the checkpoint and slot-file formats; files of another version are refused."""

KINDS = ("kv", "embedding")
LAYOUTS = ("spread", "appended")
MEMORY_TOKENS = ("pooled", "mixed", "shared", "learned")
READOUTS = ("last", "memory", "residual")
OBJECTIVES = ("pretrain", "instruct")
OPTIMIZERS = ("muon", "adamw")


def setting(default: Any, help: str) -> Any:
    """Return a dataclass field with `default`, and the sentence that help texts and documents show for it."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default.copy(), metadata={"help": help})
    return field(default=default, metadata={"help": help})


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
        values = dict(values)
        for f in dataclasses.fields(cls):  # type: ignore[arg-type]
            kind, _, other = str(f.type).partition(" | ")
            if f.name in values and kind in ("int", "float") and other in ("", "None") and not (other and values[f.name] is None):
                values[f.name] = _number(f.name, values[f.name], whole=kind == "int")
        try:
            return cls(**values)
        except TypeError as error:
            raise ICAEError(f"a setting of {cls.__name__} has the wrong form: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, ready for JSON."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    def replace(self, **changes: Any) -> Self:
        """Return a copy with `changes`, checked again."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]


def _number(name: str, value: Any, *, whole: bool) -> int | float:
    """Return a setting as a number; YAML reads 1e-3 as a string."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ICAEError(f"{name} must be a number, got {value!r}") from None
    if not whole:
        return number
    if not number.is_integer():
        raise ICAEError(f"{name} must be a whole number, got {value!r}")
    return int(number)


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ICAEError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _at_least(name: str, value: float, least: float, advice: str) -> None:
    if not isinstance(value, (int, float)) or not value >= least:
        raise ICAEError(f"{name} must be at least {least}, got {value}; {advice}")


@dataclass(frozen=True)
class ICAEConfig(_Config):
    """What an ICAE checkpoint is: everything needed to rebuild its encoder around the base it was trained on."""

    base: str = setting("smollm2-135m", "Name, folder or Hub id of the frozen LLM.")
    base_fingerprint: str = setting("", "Hash over the base's architecture and tensors; checked when a checkpoint is loaded.")
    kind: str = setting("kv", "What a memory slot is: 'kv' (keys and values in every layer) or 'embedding' (last hidden state).")
    ratio: int = setting(4, "Context tokens a memory slot stands for, by default.")
    segment_length: int = setting(128, "Longest piece of context, in tokens, that is encoded at once; longer texts are cut evenly.")
    polish: int | None = setting(
        None,
        "Gradient steps on a segment's slots after they were written, by default: each costs about twice what encoding does; none: one, "
        "and another for every four tokens that a slot stands for.",
    )
    focus: int = setting(
        4,
        "Segments that a prompt is answered from, at most: of several documents, and of a longer one, those that it is about; 0: all.",
    )
    grounding: float = setting(
        1.0, "How strongly an answer keeps to the words of its context: a factor of what other tokens lose (grounding.py); 0: not at all."
    )
    beginnings: int = setting(
        3,
        "Likeliest first tokens that an answer is begun with, to go on from the likeliest beginning (beginnings.py); 1: of one.",
    )
    layout: str = setting("spread", "Position ids of memory tokens: 'spread' over the context or 'appended' after it.")
    memory: str = setting(
        "pooled",
        "Memory token: 'pooled' (one vector + mean of its block), 'mixed' (pooled, with a learned linear map for each place in the block; "
        "`ratio` of them, which neighbours share at higher ratios), "
        "'shared' (one vector), 'learned' (one a slot).",
    )
    readout: str = setting(
        "last",
        "What an embedding slot is: 'last' (the last hidden state, as in the paper), 'memory' (the memory token itself: no pass through "
        "the LLM) or 'residual' (their sum, the state by a learned linear map that starts at zero).",
    )
    slot_norm: float | None = setting(
        None, "Size of an embedding slot, in root mean squares of the base's token embeddings; none: as it is read out."
    )
    marker_length: int = setting(
        2, "Vectors of a marker ([AE], [LM], [FT]): the first becomes the base's attention sink, the last asks for the first token."
    )
    lora_rank: int = setting(64, "Rank of the encoder's LoRA.")
    lora_alpha: int = setting(64, "LoRA's numerator: updates are scaled by lora_alpha / lora_rank.")
    lora_dropout: float = setting(0.0, "Dropout before LoRA's first matrix, while training.")
    lora_targets: list[str] = setting(["q_proj", "k_proj", "v_proj", "o_proj"], "Names of the base's linear modules that get LoRA.")
    version: int = setting(FORMAT_VERSION, "Version of the checkpoint format.")

    def __post_init__(self) -> None:
        """Check every field, so that a bad setting is named before a model is loaded."""
        _choice("kind", self.kind, KINDS)
        _choice("layout", self.layout, LAYOUTS)
        _choice("memory", self.memory, MEMORY_TOKENS)
        _choice("readout", self.readout, READOUTS)
        if self.slot_norm is not None:
            _at_least("slot_norm", self.slot_norm, 1e-3, "100 learns fast")
        _at_least("ratio", self.ratio, 1, "4 keeps about everything, 16 the gist")
        if self.polish is not None:
            _at_least("polish", self.polish, 0, "1 is a good deal better than none")
        _at_least("focus", self.focus, 0, "0 reads every segment of a context, however long")
        _at_least("beginnings", self.beginnings, 1, "3 often find a better answer than the likeliest first token")
        _at_least("grounding", self.grounding, 0, "0 leaves the spelling of answers to the slots alone")
        _at_least("segment_length", self.segment_length, self.ratio, "a segment holds one slot's block at least")
        _at_least("marker_length", self.marker_length, 1, "2 lets the first token be read back too")
        _at_least("lora_rank", self.lora_rank, 1, "64 is the default")
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
    objective: str = setting("pretrain", "'pretrain' (autoencoding and continuation) or 'instruct' (context, prompt, response).")
    init: str | None = setting(None, "Checkpoint folder to start from; none: a new adapter.")
    max_tokens: int | None = setting(None, "Read at most this many tokens of the training data; none: all.")
    steps: int = setting(1000, "Optimizer updates.")
    minutes: float | None = setting(None, "End sooner, after so many minutes; the learning rate then falls by the clock. None: never.")
    windows: list[list[int]] = setting(
        [[0, 32], [300, 64], [600, 128]],
        "Curriculum: [first step, context tokens of a segment, most segments before a continuation (left out: 1)].",
    )
    ratios: list[int] | None = setting(None, "Compression ratios drawn a batch; none: the checkpoint's own.")
    batch_size: int = setting(4, "Samples a process and accumulation step.")
    accumulation: int = setting(1, "Backward passes an update.")
    autoencoding_share: float = setting(0.5, "lambda: the share of samples a batch that autoencode; the others continue the text.")
    autoencoding_eos: bool = setting(True, "End the autoencoding target with the tokenizer's EOS.")
    first_weight: float = setting(1.0, "Weight of the first token of a text that is read back, among its others; it learns last.")
    continuation_length: int = setting(64, "Tokens of a continuation target, at most; never more than the window.")
    recall_share: float = setting(
        0.0, "The share of continuation samples that begin with some tokens of the context and go on as it went on there."
    )
    recall_cue: int = setting(8, "Tokens that such a sample begins with.")
    continuation_distil: float = setting(
        0.0, "Weight of the KL to the base's own distribution with the full text, where a text goes on; the text itself has the rest."
    )
    continuation_unscored: int = setting(0, "First tokens of a continuation that no loss reads.")
    response_length: int = setting(256, "Longest response, in tokens, when fine-tuning; longer ones are cut.")
    context_length: int | None = setting(
        1024, "When fine-tuning: triples with a longer context, in tokens, are left out; none: all are taken."
    )
    distil: float = setting(
        0.0,
        "When fine-tuning: weight of the KL to the base's own distribution with the full text; the response itself has the rest.",
    )
    teacher: str | None = setting(
        None,
        "When fine-tuning: PEFT adapter of the base that answers with the full text; it teaches the responses, but those that the base "
        "wrote (`icae data build`), which the base itself teaches. None: the base itself teaches all.",
    )
    align: float = setting(
        0.0,
        "Weight of the squared distance, relative to its size, between the decoder's hidden states and those of who teaches (`distil`, "
        "`continuation_distil`).",
    )
    prompts: int = setting(
        1, "When fine-tuning: prompts a context is asked in a row, the data's first about it and others; its slots are written once."
    )
    distractors: int = setting(0, "When fine-tuning: most other documents put around a context, each as slots of its own.")
    distractor_share: float = setting(0.5, "When fine-tuning: the share of samples that get distractors, where there are any.")
    pretrain_share: float = setting(0.0, "When fine-tuning: the share of samples taken from `replay` against forgetting.")
    replay: str | list[str] | dict[str, float] | None = setting(
        None, "When fine-tuning: text for the pretraining samples, in the forms of pretraining's `train`."
    )
    optimizer: str = setting("muon", "'muon' (LoRA's matrices by Muon, the rest by AdamW) or 'adamw'.")
    learning_rate: float = setting(1e-3, "Peak learning rate of LoRA's first matrices.")
    lora_b_multiplier: float = setting(1.0, "Learning rate of LoRA's second matrices, relative (LoRA+, arXiv 2402.12354).")
    memory_multiplier: float = setting(1.0, "Learning rate of the memory token and the AE, LM, FT vectors, relative.")
    schedule: str = setting("cosine", "Learning-rate schedule after warm-up, by its transformers name.")
    rate_factors: list[list[float]] = setting([[0, 1.0]], "Curriculum: [first step, factor on every learning rate] pairs, in order.")
    warmup_steps: int = setting(20, "Updates of linear warm-up.")
    adam_beta2: float = setting(0.98, "AdamW's second-moment decay.")
    weight_decay: float = setting(0.0, "AdamW's weight decay.")
    clip: float = setting(2.0, "Gradient norm is clipped to this.")
    eval_steps: int = setting(100, "Updates between held-out losses.")
    eval_samples: int = setting(32, "Held-out samples a loss is taken over.")
    save_steps: int = setting(100, "Updates between checkpoints.")
    keep: int = setting(2, "Checkpoints kept.")
    log_steps: int = setting(10, "Updates between log lines.")
    seed: int = setting(0, "Seed of the initial weights and of the order of samples.")
    bf16: bool = setting(False, "Keep the frozen base in bfloat16, and compute in it (for accelerators; slow on most CPUs).")
    device: str = setting("cpu", "'cpu', 'cuda' or 'mps'.")
    workers: int = setting(0, "Processes that prepare samples; 0: the training process itself, which keeps up on a CPU.")

    def __post_init__(self) -> None:
        """Check every field, so that a bad setting is named before hours are spent."""
        _choice("objective", self.objective, OBJECTIVES)
        _choice("optimizer", self.optimizer, OPTIMIZERS)
        _at_least("steps", self.steps, 1, "an adapter needs some hundreds")
        if self.minutes is not None:
            _at_least("minutes", self.minutes, 1e-3, "leave it out to take all steps")
        _at_least("batch_size", self.batch_size, 1, "4 is the default")
        _at_least("accumulation", self.accumulation, 1, "1 is the default")
        _at_least("autoencoding_share", self.autoencoding_share, 0, "it is a share, 0 to 1")
        _at_least("1 - autoencoding_share", 1 - self.autoencoding_share, 0, "it is a share, 0 to 1")
        for name in ("pretrain_share", "recall_share", "continuation_distil", "distil", "distractor_share"):
            _at_least(name, getattr(self, name), 0, "it is a share, 0 to 1")
            _at_least(f"1 - {name}", 1 - getattr(self, name), 0, "it is a share, 0 to 1")
        _at_least("first_weight", self.first_weight, 0, "8 makes up for a text having one first token alone")
        _at_least("recall_cue", self.recall_cue, 1, "8 are seldom found twice")
        _at_least("align", self.align, 0, "3 beside the other losses")
        _at_least("prompts", self.prompts, 1, "it takes as many triples about the same context")
        _at_least("distractors", self.distractors, 0, "3 make contexts of up to four documents")
        if self.pretrain_share and not self.replay:
            raise ICAEError("pretrain_share needs text to replay: replay=FOLDER of .txt")
        for name in ("train", "replay"):
            source = getattr(self, name)
            shares = source.values() if isinstance(source, dict) else []
            if any(not isinstance(share, (int, float)) or share <= 0 for share in shares):
                raise ICAEError(f"the shares in {name} must be numbers above 0, got {source}; try {{a.jsonl: 3, b.jsonl: 1}}")
        if not self.windows or self.windows[0][0] != 0 or any(len(w) not in (2, 3) or w[1] < 2 or w[-1] < 1 for w in self.windows):
            raise ICAEError(f"windows must be [first step, tokens(, segments)] from step 0 on, got {self.windows}; try [[0, 32]]")
        if self.autoencoding_share < 1:
            shortest, least = min(self.continuation_length, *(w[1] for w in self.windows)), self.continuation_unscored + 1
            _at_least("continuation_length, and every window's tokens,", shortest, least, "some of each continuation must be scored")
            if self.recall_share:
                _at_least("continuation_length", self.continuation_length, 2, "what is recalled has half as many tokens")
        if not self.rate_factors or self.rate_factors[0][0] != 0 or any(len(f) != 2 for f in self.rate_factors):
            raise ICAEError(f"rate_factors must be [first step, factor] pairs from step 0 on, got {self.rate_factors}; try [[0, 1.0]]")

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
        raise ICAEError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ICAEError(f"{path} must hold settings as 'name: value' lines")
    return values
