"""Texts as trees: what several prompts about one context have in common is read once. Knows no loss.

    slots <- [marker | what all texts of the context begin with] <- the rest of the first text
                                                                 <- the rest of the second text ...

Each rest attends to the slots, to the beginning and to itself, at the positions that it would have alone, so that every input becomes
what it would alone; at a template's length of 24 tokens and three prompts a context it takes half of the inputs. Plain texts, with no
slots and no marker, are read alike: what teaches reads the context's full text once for all prompts about it.

Shape legend: R trees, N inputs of the longest, D hidden size.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from icae.lean import LeanLlama, Loras
from icae.objectives import padded
from icae.reader import Reader
from icae.segments import alike
from icae.slot_batch import SlotBatch


class Tree(NamedTuple):
    """Texts that begin alike, perhaps after a marker."""

    samples: list[int]
    """Which of the batch these are."""
    ids: list[int]
    """Of the inputs: 0 for each of the marker's vectors, the common beginning, and the rest of each text but its last token."""
    depths: list[int]
    """The place that each input has in its own text, behind the marker's first vector."""
    branches: list[int]
    """The text that each input belongs to, from 1 on; 0: all."""
    nodes: list[list[int]]
    """For each text, the input before its first token (-1: there is none), and those that are its tokens, but the last."""


class Spots(NamedTuple):
    """Some inputs of trees that are read together, by what they stand for; all (n,) int64."""

    sample: Tensor
    place: Tensor
    """In the sample's text."""
    row: Tensor
    """Which tree."""
    node: Tensor
    """Which of its inputs."""


def plant(samples: Sequence[int], texts: Sequence[list[int]], lead: int) -> Tree:
    """Return the tree of some samples' texts; `lead` are the marker's vectors."""
    alone = min(map(len, texts)) - 1
    common = next((n for n in range(alone) if any(text[n] != texts[0][n] for text in texts)), alone)
    ids, nodes = [0] * lead + texts[0][:common], []
    depths, branches = list(range(lead + common)), [0] * (lead + common)
    for number, text in enumerate(texts, 1):
        rest = text[common:-1]
        nodes.append([*range(lead - 1, lead + common), *range(len(ids), len(ids) + len(rest))])
        ids += rest
        depths += range(lead + common, lead + common + len(rest))
        branches += [number] * len(rest)
    return Tree(list(samples), ids, depths, branches, nodes)


def forest(kinds: Sequence[Hashable], text_ids: Tensor, real: Tensor, lead: int = 0) -> Iterator[list[Tree]]:
    """Yield a batch's trees, those of like sizes together; all samples of a kind are one tree.

    `text_ids` and `real` are (B, T), as `objectives.collate` makes them.
    """
    kin: dict[Hashable, list[int]] = {}
    for b, kind in enumerate(kinds):
        kin.setdefault(kind, []).append(b)
    texts = [ids[:n].tolist() for ids, n in zip(text_ids, real.sum(1).tolist(), strict=True)]
    trees = [plant(rows, [texts[b] for b in rows], lead) for rows in kin.values()]
    for rows in alike([len(t.ids) for t in trees]):
        yield [trees[i] for i in rows]


def spots(trees: Sequence[Tree], places: Sequence[Sequence[int]], *, predict: bool = False) -> Spots:
    """Return where the tokens at some places of each sample's text are read or, with `predict`, predicted."""
    found = [
        (b, p, n, nodes[p] if predict else nodes[p + 1])
        for n, tree in enumerate(trees)
        for b, nodes in zip(tree.samples, tree.nodes, strict=True)
        for p in places[b]
    ]
    return Spots(*torch.tensor(found, dtype=torch.long).view(-1, 4).unbind(1))


def read(
    llama: LeanLlama, reader: Reader, slots: SlotBatch, markers: Tensor, trees: Sequence[Tree], states: list[Tensor] | None = None
) -> Tensor:
    """Return the hidden states (R, N, D) of some trees' inputs, each read after its row of slots; parameters as for `LeanLlama.read`."""
    ids, depths, sees = _laid_out(trees)
    linear = reader.places(slots, markers.tolist(), int(depths.max()) + 1)
    texts = llama.embed(ids[:, reader.markers.shape[1] :])
    inputs = torch.cat([reader.markers[markers].to(llama.dtype), texts.to(llama.dtype)], 1)
    mask = torch.cat([slots.mask[:, None].expand(-1, sees.shape[1], -1), sees], 2)
    keys, values = (slots.tensors[name].to(llama.dtype).permute(2, 0, 3, 1, 4) for name in ("keys", "values"))
    return llama.read(inputs, linear.gather(1, depths), mask, list(zip(keys, values, strict=True)), states=states)[0]


def read_plain(
    llama: LeanLlama,
    trees: Sequence[Tree],
    states: list[Tensor] | None = None,
    loras: Loras | None = None,
) -> Tensor:
    """Return the hidden states (R, N, D) of some trees' inputs, read with no slots; parameters as for `LeanLlama.read`."""
    ids, depths, sees = _laid_out(trees)
    return llama.read(llama.embed(ids), depths, sees, loras=loras, states=states)[0]


def _laid_out(trees: Sequence[Tree]) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids and depths (R, N), padded, and what each input sees of its tree's others (R, N, N)."""
    ids, depths = padded([t.ids for t in trees]), padded([t.depths for t in trees])
    width = ids.shape[1]
    own = torch.tensor([t.branches + [-1] * (width - len(t.branches)) for t in trees])
    sees = (own[:, None] == own[:, :, None]) | (own[:, None] == 0)
    return ids, depths, sees & torch.ones(width, width, dtype=torch.bool).tril()
