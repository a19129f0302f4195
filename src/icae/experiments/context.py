"""What an evaluation is run on: base, adapters by role, held-out text, questions, judge. Experiments ask it, and are told what is missing.

main         the adapter that is measured                     answers     one that was fine-tuned to answer, else main
embedding    one of the other kind, for the same base         ablations   by name, out of one folder (configs/ablations)
also         adapters on other bases
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from icae import terminal
from icae.base import Base, load_base
from icae.checkpoint import SHIPPED, find_checkpoint, read_config
from icae.config import POLISH_RATES
from icae.data import Corpus, load_corpus
from icae.demo import SAMPLE
from icae.errors import ICAEError
from icae.model import ICAE
from icae.triples import Triple, load_triples

if TYPE_CHECKING:
    from icae.judge import Judge


@dataclass
class Context:
    """What is measured, and what was computed of it already."""

    base: Base
    checkpoints: dict[str, Path] = field(default_factory=dict)
    """Checkpoint folders of the roles main, embedding, answers."""
    text: Path | None = None
    """Held-out text; none: the sample that ships."""
    qa: Path | None = None
    ablations: Path | None = None
    also: list[Path] = field(default_factory=list)
    judge: Judge | None = None
    rivals: list[str] = field(default_factory=list)
    """Models behind the judge's endpoint that answer from the full text."""
    seed: int = 0
    polish: int | None = None
    """Gradient steps on slots once they are written; none: each checkpoint's own."""
    say: Callable[[str], None] = terminal.say
    known: dict[Any, Any] = field(default_factory=dict)
    """What was measured already, by all that decides it; several experiments look at the same texts."""
    _loaded: dict[Path, ICAE] = field(default_factory=dict)
    _digests: dict[Path, str] = field(default_factory=dict)

    # ---- adapters ----

    @property
    def main(self) -> ICAE:
        """The adapter that is measured."""
        return self.load(self.checkpoints["main"])

    def adapter(self, role: str) -> ICAE | None:
        """Return the adapter of a role; none where there is none."""
        folder = self.checkpoints.get(role)
        return None if folder is None else self.load(folder)

    def ablation(self, name: str) -> ICAE | None:
        """Return an ablation's adapter; none where it was not trained."""
        folder = None if self.ablations is None else self.ablations / name
        return self.load(folder) if folder is not None and (folder / "config.json").is_file() else None

    def load(self, folder: Path) -> ICAE:
        """Return the adapter of a folder, loaded once, on this context's base."""
        folder = find_checkpoint(folder)
        if folder not in self._loaded:
            self._loaded[folder] = made = ICAE.from_pretrained(folder, base=self.base)
            if self.polish is not None:
                made.config = made.config.replace(polish=self.polish)
        return self._loaded[folder]

    # ---- texts ----

    @cached_property
    def corpus(self) -> Corpus:
        """Held-out text, tokenised."""
        return load_corpus(str(self.text or SAMPLE), self.base)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(np.diff(self.corpus.starts).max())

    def windows(self, length: int, samples: int) -> list[list[int]]:
        """Draw windows of `length` tokens; the same ones for the same seed, length, count and text, whatever else runs."""
        chance = np.random.default_rng([self.seed, length])
        return [self.corpus.window(chance, length) for _ in range(samples)]

    def within(self, lengths: Sequence[int], most: int, why: str, notes: list[str]) -> list[int]:
        """Return the lengths up to `most`, and note which ones are left out.

        Raises
        ------
        ICAEError
            If none is left.
        """
        kept = [n for n in lengths if n <= most]
        if not kept:
            raise ICAEError(
                f"{why}: none of the lengths {', '.join(map(str, lengths))} fits into {most} tokens; give a longer text (--text)"
            )
        if len(kept) < len(lengths):
            notes.append(f"Left out: {', '.join(str(n) for n in lengths if n > most)} tokens; {why} ({most}).")
        return kept

    def text_note(self) -> list[str]:
        """Return a note where the text is only the sample that ships."""
        if self.text is not None:
            return []
        count = len(self.corpus.ids)
        return [f"No text was given: measured on the sample that ships ({count} tokens), so that windows overlap; give --text for figures."]

    @cached_property
    def _triples(self) -> list[Triple]:
        return load_triples(str(self.qa))

    def triples(self, samples: int, context_tokens: int, notes: list[str]) -> list[Triple]:
        """Draw questions whose context has at most `context_tokens` tokens; notes say how many were too long, or that there are none."""
        if self.qa is None:
            notes.append("Not measured: no questions were given; give --qa FILE.jsonl (input, prompt, answer).")
            return []
        order = np.random.default_rng([self.seed, 5]).permutation(len(self._triples))
        short: list[Triple] = []
        long = tiny = 0
        for i in order:
            if len(short) == samples:
                break
            t = self._triples[int(i)]
            tokens = len(self.base.encode(t.context))
            if 2 <= tokens <= context_tokens:
                short.append(t)
            long += tokens > context_tokens
            tiny += tokens < 2
        for count, why in ((long, f"above {context_tokens}"), (tiny, "below 2")):
            if count:
                notes.append(f"{count} of the {long + tiny + len(short)} questions drawn were left out: context {why} tokens.")
        if len(short) < samples:
            notes.append(f"Only {len(short)} questions fit, {samples} were asked for.")
        if not short:
            raise ICAEError(f"{self.qa} has no question with a context of at most {context_tokens} tokens")
        return sorted(short, key=lambda t: len(t.context))  # like lengths together: less padding

    # ---- telling ----

    def progress(self, what: str) -> Callable[[int, int], None]:
        """Return a callback (done, total) that says how far it is, every ten seconds."""
        last = time.monotonic()

        def tick(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last > 10:
                last = time.monotonic()
                self.say(f"  {what}: {done} of {total}")

        return tick

    def identity(self, needs: Sequence[str]) -> dict[str, Any]:
        """Return what decides an experiment's outcome beside its settings and the code: the parts that it names in `NEEDS`."""
        parts: dict[str, Callable[[], Any]] = {
            "text": lambda: {"name": "sample that ships" if self.text is None else self.text.name, "sha256": self._text_hash()},
            "qa": lambda: None if self.qa is None else {"name": self.qa.name, "sha256": self._digest(self.qa)},
            "ablations": self._ablation_hashes,
            "also": lambda: [self._checkpoint(p) for p in self.also],
            "judge": self._judged_by,
        }
        found = {n: parts[n]() if n in parts else self._checkpoint(self.checkpoints.get(n)) for n in needs}
        polish = "by ratio" if self.polish is None else self.polish  # of slots that are read back or asked
        computed = {"device": self.base.device.type, "dtype": str(self.base.dtype).removeprefix("torch.")}
        base = {"base": self.base.name, "base_fingerprint": self.base.fingerprint}
        return {**base, **computed, "seed": self.seed, "polish": polish, "polish_rates": POLISH_RATES, **found}

    def _judged_by(self) -> dict[str, Any] | None:
        if self.judge is None:
            return None
        return {"model": self.judge.model, "rivals": self.rivals} | ({"url": self.judge.url} if self.judge.url else {})

    def _ablation_hashes(self) -> dict[str, Any]:
        folders = sorted(self.ablations.iterdir()) if self.ablations is not None and self.ablations.is_dir() else []
        return {f.name: self._checkpoint(f)["sha256"] for f in folders if (f / "adapter_model.safetensors").is_file()}  # type: ignore[index]

    def _text_hash(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.corpus.ids).tobytes() + self.corpus.starts.tobytes()).hexdigest()[:16]

    def _checkpoint(self, folder: Path | None) -> dict[str, str] | None:
        if folder is None:
            return None
        return {"name": folder.name, "sha256": checkpoint_hash(folder, self._digest)}

    def _digest(self, file: Path) -> str:
        if file not in self._digests:
            self._digests[file] = _sha256(file)
        return self._digests[file]


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def checkpoint_hash(folder: Path, digest: Callable[[Path], str] = _sha256) -> str:
    """Return a short hash of a checkpoint: of what it is, and of all that was trained."""
    files = ("config.json", "adapter_model.safetensors", "memory.safetensors")
    return hashlib.sha256("".join(digest(folder / f) for f in files).encode()).hexdigest()[:16]


def hashes(windows: Sequence[Sequence[int] | str]) -> list[str]:
    """Return a short hash of each text or row of ids, in order."""
    rows = [w.encode() if isinstance(w, str) else np.asarray(w, dtype=np.uint32).tobytes() for w in windows]
    return [hashlib.sha256(row).hexdigest()[:12] for row in rows]


def open_context(
    *,
    model: str | None = None,
    base: str | None = None,
    embedding: str | None = None,
    answers: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    text: str | None = None,
    qa: str | None = None,
    **kwargs: Any,
) -> Context:
    """Load a base and find its adapters.

    Parameters
    ----------
    model, embedding, answers : str, optional
        Checkpoints of the roles; none: what ships for the base (the default adapter, one of the other kind, one fine-tuned to answer);
        a `model` that was fine-tuned, or that nothing is known of, answers for itself.
    base : str, optional
        Name of the base; none: the one that `model` names.
    device, dtype
        As for `load_base`.
    text, qa : str, optional
        Held-out text (a folder of .txt, a .txt or .jsonl file) and questions (.jsonl).
    **kwargs
        As for `Context`.

    Raises
    ------
    ICAEError
        If a file is missing, or there is no adapter for the base.
    """
    if text is not None and not Path(text).exists():
        raise ICAEError(f"--text {text}: there is nothing; give a folder or file that is here")
    if qa is not None and not Path(qa).is_file():
        raise ICAEError(f"--qa {qa}: there is no such file; give one of input, prompt, answer (.jsonl)")
    main = find_checkpoint(model)
    config = read_config(main)
    loaded = load_base(base or config.base, device=device, dtype=dtype)
    if model is None and loaded.fingerprint != config.base_fingerprint:
        raise ICAEError(f"no adapter ships for base {loaded.name!r}; train one (`icae pretrain`) and give --model FOLDER")
    checkpoints = {"main": main}
    given = {"embedding": embedding, "answers": answers}
    if _tuned(main, unknown=model is not None):
        checkpoints["answers"] = main
    for role, folder in _shipped(loaded.fingerprint, config.kind).items():
        checkpoints.setdefault(role, folder)
    checkpoints |= {role: find_checkpoint(path) for role, path in given.items() if path is not None}
    kwargs = {"text": None if text is None else Path(text), "qa": None if qa is None else Path(qa), **kwargs}
    also = [find_checkpoint(path) for path in kwargs.pop("also", [])]
    return Context(loaded, checkpoints, also=also, **kwargs)


def _shipped(fingerprint: str, kind: str) -> dict[str, Path]:
    """Return the shipped adapters of a base for the roles: one with slots of another kind, one fine-tuned with slots of this kind."""
    found: dict[str, Path] = {}
    for path in sorted(SHIPPED.glob("*/config.json")):
        config = read_config(path.parent)
        if config.base_fingerprint != fingerprint:
            continue
        other = found.get("embedding")
        if config.kind != kind and (other is None or not _tuned(path.parent)):  # a pretrained one comes first
            found["embedding"] = path.parent
        elif config.kind == kind and _tuned(path.parent):
            found.setdefault("answers", path.parent)
    return found


def _tuned(folder: Path, *, unknown: bool = False) -> bool:
    """Tell whether an adapter was fine-tuned to answer; `unknown` where nothing says how it was trained."""
    run = folder.parent if folder.name.startswith("checkpoint-") else folder
    try:
        return json.loads((run / "train_config.json").read_text(encoding="utf-8")).get("objective") == "instruct"
    except (OSError, ValueError, AttributeError):  # none, or a damaged one
        return unknown
