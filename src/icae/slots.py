"""Memory slots: the only object that crosses from encoder to decoder, in memory and on disk.

`MemorySlots` holds the slots of one context (those of several, padded, are a `SlotBatch`: slot_batch.py). It knows no text, no tokenizer
and no model. Two kinds stand behind one interface:

    embedding   one vector, by default the last hidden state          embeddings (k, hidden)
    kv          keys and values of the memory tokens in every layer   keys, values (k, layers, heads, head size)

Every tensor has the slots on its first axis, so that cutting, joining and padding never ask for the kind. Only moving slots to
other positions does: keys are stored already rotated (RoPE, arXiv 2104.09864), and a shift by s positions turns them by s more.

Shape legend: k slots of one context.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from icae.atomic import write_atomically
from icae.config import FORMAT_VERSION
from icae.errors import ICAEError


@dataclass(frozen=True)
class Segment:
    """One encoded piece of a context."""

    tokens: int
    """Context tokens it stands for."""
    slots: int
    """Memory slots that hold them."""
    span: int
    """Positions it takes in the decoder."""
    opens: bool = field(default=False, compare=False)
    """A document begins with it, one of several that were joined."""
    ratio: int | None = None
    """Its own ratio, joined with slots of another; none: its origin's."""
    polish: int | None = None
    """Its own steps of polishing, joined with slots of others; none: its origin's."""

    def among(self, joint: Origin, own: Origin, opens: bool) -> Segment:
        """Return the segment as it stands among slots of a joint origin, where it had its own."""
        ratio = own.ratio if self.ratio is None else self.ratio
        polish = own.polish if self.polish is None else self.polish
        return dataclasses.replace(
            self,
            opens=self.opens or opens,
            ratio=None if ratio == joint.ratio else ratio,
            polish=None if polish == joint.polish else polish,
        )


@dataclass(frozen=True)
class Origin:
    """Where slots came from: all that decides whether they may be read by a model, or joined with others."""

    kind: str
    ratio: int
    layout: str
    base: str
    base_fingerprint: str
    adapter: str
    """Hash of the adapter's weights."""
    polish: int = 0
    """Gradient steps that they were polished by (polish.py)."""

    def check(self, theirs: Origin) -> None:
        """Raise `ICAEError` for slots that a model which makes such ones cannot read: of another base, adapter, kind or layout."""
        if theirs.base_fingerprint != self.base_fingerprint:
            raise ICAEError(
                f"these slots were made on base {theirs.base!r} ({theirs.base_fingerprint[:12]}), this model runs "
                f"{self.base!r} ({self.base_fingerprint[:12]}); compress the text again, or load that base"
            )
        for name in ("kind", "layout"):
            if getattr(theirs, name) != getattr(self, name):
                raise ICAEError(
                    f"these slots are of {name} {getattr(theirs, name)!r}, this model reads {getattr(self, name)!r}; "
                    "give the checkpoint that made them (--model)"
                )
        if theirs.adapter != self.adapter:
            raise ICAEError(
                f"these slots were made by another adapter ({theirs.adapter[:12]}, this is {self.adapter[:12]}); "
                "give the checkpoint that made them (--model)"
            )


@dataclass(frozen=True)
class MemorySlots:
    """The memory slots of one context, on the CPU or a device, without gradient."""

    tensors: Mapping[str, Tensor]
    """Slots by name, k on the first axis."""
    positions: Tensor
    """(k,) int64: position ids in the decoder."""
    segments: tuple[Segment, ...]
    origin: Origin
    rotations: Tensor | None = None
    """(layers, rotated size / 2) float32: RoPE's angle per position, for tensors named `keys`; none: nothing is rotated."""
    ids: Tensor | None = None
    """(tokens,) int32, on the CPU: the context's token ids, kept beside the slots for the spelling of answers alone (grounding.py): no
    model reads them. none: not kept."""

    @property
    def count(self) -> int:
        """Number of memory slots, k."""
        return self.positions.shape[0]

    @property
    def tokens(self) -> int:
        """Number of context tokens that the slots stand for."""
        return sum(s.tokens for s in self.segments)

    @property
    def span(self) -> int:
        """Position id of whatever comes after the slots."""
        return sum(s.span for s in self.segments)

    @property
    def documents(self) -> list[int]:
        """The document that each segment belongs to, counted from 0."""
        return list(accumulate((s.opens for s in self.segments[1:]), initial=0))

    @property
    def nbytes(self) -> int:
        """Bytes of the slots' tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def to(self, *args: Any, **kwargs: Any) -> MemorySlots:
        """Return the slots in another dtype or on another device (`torch.Tensor.to`); positions go along, whole numbers still."""
        tensors = {name: t.to(*args, **kwargs) for name, t in self.tensors.items()}
        device = next(iter(tensors.values())).device
        rotations = None if self.rotations is None else self.rotations.to(device)
        return dataclasses.replace(self, tensors=tensors, positions=self.positions.to(device), rotations=rotations)

    def shifted(self, by: int) -> MemorySlots:
        """Return the slots moved by `by` positions; rotated keys are turned with them."""
        tensors = dict(self.tensors)
        if self.rotations is not None:
            tensors["keys"] = rotated(tensors["keys"], self.rotations, torch.tensor([by]))
        return dataclasses.replace(self, tensors=tensors, positions=self.positions + by)

    def split(self) -> list[MemorySlots]:
        """Return one `MemorySlots` a segment, each at the positions it was encoded at."""
        return [self.segment(number) for number in range(len(self.segments))]

    def segment(self, number: int) -> MemorySlots:
        """Return the slots of one segment, at the positions it was encoded at."""
        before, this = self.segments[:number], self.segments[number]
        own = {name: value for name in ("ratio", "polish") if (value := getattr(this, name)) is not None}
        slot, token, offset = (sum(getattr(s, name) for s in before) for name in ("slots", "tokens", "span"))
        here = slice(slot, slot + this.slots)
        part = dataclasses.replace(
            self,
            tensors={name: t[here] for name, t in self.tensors.items()},
            positions=self.positions[here],
            segments=(dataclasses.replace(this, ratio=None, polish=None),),
            origin=dataclasses.replace(self.origin, **own),
            ids=None if self.ids is None else self.ids[token : token + this.tokens],
        )
        return part.shifted(-offset) if offset else part

    @staticmethod
    def concatenate(parts: Sequence[MemorySlots], *, same: bool = False) -> MemorySlots:
        """Join the slots of several contexts, in order; later ones are shifted. If `same`, they are pieces of one context, else documents.

        Raises
        ------
        ICAEError
            If there is nothing to join, or two parts differ in kind, layout, base or adapter.
        """
        if not parts:
            raise ICAEError("nothing to concatenate: give at least one set of slots")
        first, moved, offset = parts[0], [], 0
        for part in parts:
            for name in ("kind", "layout", "base_fingerprint", "adapter"):
                mine, theirs = getattr(first.origin, name), getattr(part.origin, name)
                if mine != theirs:
                    raise ICAEError(f"slots of different {name} cannot be joined: {mine!r} and {theirs!r}; compress both alike")
            moved.append(part.shifted(offset) if offset else part)
            offset += part.span
        ids = [p.ids for p in parts if p.ids is not None]
        return dataclasses.replace(
            first,
            tensors={name: torch.cat([p.tensors[name] for p in moved]) for name in first.tensors},
            positions=torch.cat([p.positions for p in moved]),
            segments=tuple(s.among(first.origin, p.origin, not (same or i)) for p in parts for i, s in enumerate(p.segments)),
            ids=torch.cat(ids) if len(ids) == len(parts) else None,
        )

    def save(self, path: str | Path) -> None:
        """Write the slots to a safetensors file, whole or not at all.

        The bytes go to a neighbouring temporary file first, which then takes the name: whatever fails on the way, an older file
        at `path` survives.

        Raises
        ------
        ICAEError
            If the file cannot be written.
        """
        tensors = {**self.tensors, "positions": self.positions}
        if self.rotations is not None:
            tensors["rotations"] = self.rotations
        if self.ids is not None:
            tensors["token_ids"] = self.ids
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        about = json.dumps(
            {
                "version": FORMAT_VERSION,
                "origin": dataclasses.asdict(self.origin),
                "segments": [dataclasses.astuple(s)[: 4 if s.ratio is s.polish is None else 6] for s in self.segments],
            }
        )
        data = to_bytes(tensors, metadata={"icae": about, "sha256": _digest(about, tensors)})
        write_atomically(Path(path), data)

    @staticmethod
    def load(path: str | Path) -> MemorySlots:
        """Read slots back, to the bit.

        Raises
        ------
        ICAEError
            If the file is missing, is no slot file, is of another format version, or has changed since it was written.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except FileNotFoundError as error:
            raise ICAEError(f"no slot file at {path}; make one with `icae compress FILE -o {path}`") from error
        except (SafetensorError, OSError) as error:
            raise ICAEError(f"{path} is no slot file, or it was truncated or damaged ({error})") from error
        if "icae" not in metadata:
            raise ICAEError(f"{path} is a safetensors file but holds no memory slots; make one with `icae compress`")
        if metadata.get("sha256") != _digest(metadata["icae"], tensors):
            raise ICAEError(f"{path} has changed since it was written (its checksum does not match); compress the text again")
        about = json.loads(metadata["icae"])
        if about["version"] != FORMAT_VERSION:
            raise ICAEError(f"{path} is of slot format {about['version']}, this version reads {FORMAT_VERSION}; compress again")
        positions = tensors.pop("positions")
        rotations, ids = (tensors.pop(name, None) for name in ("rotations", "token_ids"))
        segments = tuple(Segment(*s) for s in about["segments"])
        return MemorySlots(tensors, positions, segments, Origin(**about["origin"]), rotations, ids)


def is_slot_file(path: str | Path) -> bool:
    """Tell whether a file is safetensors rather than text: by its first bytes; where it cannot be read, by its name."""
    try:
        with open(path, "rb") as file:
            begin = file.read(9)
    except OSError:
        return Path(path).suffix == ".safetensors"
    return len(begin) == 9 and begin[8:] == b"{" and b"\0" in begin[:8]


def rotated(keys: Tensor, rotations: Tensor, by: Tensor) -> Tensor:
    """Turn keys by further positions, so that a key rotated at p becomes the key rotated at p + by.

    Parameters
    ----------
    keys : Tensor
        (..., k, layers, heads, head size), rotated halves paired as in Llama (dimension j with j + rotated size / 2).
    rotations : Tensor
        (layers, rotated size / 2) float32, radians a position.
    by : Tensor
        (..., k) whole numbers; (..., 1) where all keys turn alike, which is a good deal faster.
    """
    half, rotations = rotations.shape[-1], rotations.to(keys.device)
    angle = by.to(keys.device)[..., None, None].float() * rotations  # (..., k, layers, half)
    cos, sin = angle.cos()[..., None, :], angle.sin()[..., None, :]
    a, b, rest = keys[..., :half].float(), keys[..., half : 2 * half].float(), keys[..., 2 * half :]
    turned = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
    return torch.cat([*(t.to(keys.dtype) for t in turned), rest], -1)


def _digest(about: str, tensors: Mapping[str, Tensor]) -> str:
    """Hash a file's description and every tensor's name, dtype, shape and bytes."""
    sha = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        sha.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        sha.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
