"""The loss of a batch whose texts are trees: what several prompts about one context have in common is read once.

    slots <- [marker | what all texts of the context begin with] <- the rest of the first text
                                                                 <- the rest of the second text ...

Each rest attends to the slots, to the beginning and to itself, at the positions that it would have alone, so that the loss is
`loss.batch_loss`'s; at a template's length of 24 tokens and three prompts a context it takes half of the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from icae.lean import LeanLlama
from icae.objectives import padded
from icae.reader import Reader
from icae.segments import alike
from icae.slot_batch import SlotBatch


class Tree(NamedTuple):
    """Texts of one context after one marker."""

    samples: list[int]
    """Which of the batch these are."""
    ids: list[int]
    """Of the inputs: 0 for each of the marker's vectors, the common beginning, and the rest of each text but its last token."""
    depths: list[int]
    """The place that each input has in its own text, behind the marker's first vector."""
    branches: list[int]
    """The text that each input belongs to, from 1 on; 0: all."""
    found: list[tuple[int, int, int]]
    """(sample, place in its text, input that predicts it) of every scored token."""


def plant(samples: Sequence[int], texts: Sequence[list[int]], scored: Sequence[list[int]], lead: int) -> Tree:
    """Return the tree of some samples' texts; `scored` are the places in them that are scored, `lead` the marker's vectors."""
    alone = min(map(len, texts)) - 1
    common = next((n for n in range(alone) if any(text[n] != texts[0][n] for text in texts)), alone)
    ids, found = [0] * lead + texts[0][:common], []
    depths, branches = list(range(lead + common)), [0] * (lead + common)
    for number, (sample, text, places) in enumerate(zip(samples, texts, scored, strict=True), 1):
        begin, rest = len(ids), text[common:-1]
        found += [(sample, p, lead + p - 1 if p <= common else begin + p - 1 - common) for p in places]
        ids += rest
        depths += range(lead + common, lead + common + len(rest))
        branches += [number] * len(rest)
    return Tree(list(samples), ids, depths, branches, found)


def forest(markers: Tensor, groups: Sequence[Sequence[int]], text_ids: Tensor, real: Tensor, scored: Tensor, lead: int) -> list[Tree]:
    """Return a batch's trees, one for every context and marker; arguments as `objectives.collate` makes them."""
    together: dict[tuple[int, ...], list[int]] = {}
    for b, (marker, group) in enumerate(zip(markers.tolist(), groups, strict=True)):
        together.setdefault((marker, *group), []).append(b)
    widths = real.sum(1).tolist()
    texts, places = ([ids[:n].tolist() for ids, n in zip(text_ids, widths, strict=True)], [row.nonzero()[:, 0].tolist() for row in scored])
    return [plant(rows, [texts[b] for b in rows], [places[b] for b in rows], lead) for rows in together.values()]


def tree_loss(
    llama: LeanLlama,
    reader: Reader,
    slots: SlotBatch,
    groups: Sequence[Sequence[int]],
    markers: Tensor,
    text_ids: Tensor,
    real: Tensor,
    scored: Tensor,
    weights: Tensor,
) -> Tensor:
    """Return what `loss.batch_loss` does, for samples that nobody teaches; arguments as there, and the segments of each context."""
    share = weights / weights.sum(1, keepdim=True).clamp(min=1)
    trees = forest(markers, groups, text_ids, real, scored, reader.markers.shape[1])
    total = torch.zeros(())
    for rows in alike([len(t.ids) for t in trees]):
        taken = [trees[i] for i in rows]
        sample, place, row, node = torch.tensor([(b, p, n, at) for n, t in enumerate(taken) for b, p, at in t.found]).unbind(1)
        logits = llama.logits(_read(llama, reader, slots.select([t.samples[0] for t in taken]), markers, taken)[row, node])
        nll = nn.functional.cross_entropy(logits.float(), text_ids[sample, place], reduction="none")
        total = total + nll @ share[sample, place]
    return total / len(markers)


def _read(llama: LeanLlama, reader: Reader, slots: SlotBatch, markers: Tensor, trees: Sequence[Tree]) -> Tensor:
    """Return the hidden states (R, N, D) of some trees' inputs, each read after its row of slots."""
    lead, width = reader.markers.shape[1], max(len(t.ids) for t in trees)
    ids, depths = padded([t.ids for t in trees]), padded([t.depths for t in trees])
    own = torch.tensor([t.branches + [-1] * (width - len(t.branches)) for t in trees])
    kinds = markers[[t.samples[0] for t in trees]]
    linear = reader.places(slots, kinds.tolist(), int(depths.max()) + 1)
    inputs = torch.cat([reader.markers[kinds].to(llama.dtype), reader.base.embed(ids[:, lead:]).to(llama.dtype)], 1)
    sees = (own[:, None] == own[:, :, None]) | (own[:, None] == 0)
    sees &= torch.ones(width, width, dtype=torch.bool).tril()
    mask = torch.cat([slots.mask[:, None].expand(-1, width, -1), sees], 2)
    keys, values = (slots.tensors[name].to(llama.dtype).permute(2, 0, 3, 1, 4) for name in ("keys", "values"))
    return llama.read(inputs, linear.gather(1, depths), mask, list(zip(keys, values, strict=True)))[0]
