"""Held-out figures of a model: how well slots are read back, continued, and asked.

Each function draws its samples from (seed, length) alone, so that two models, or two machines, are measured on the same texts. What is
measured goes through the same `compress_ids`, `read_segments`, `refine_ids` and `answers` that the command line and the server call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from icae.data import Corpus
from icae.errors import ICAEError
from icae.metrics import bleu, exact_match, interval, perplexity
from icae.model import ICAE, joined
from icae.objectives import Example, Marker
from icae.refine import Refined
from icae.slots import MemorySlots

Progress = Callable[[int, int], None]


def autoencoding(
    model: ICAE,
    corpus: Corpus,
    *,
    lengths: Sequence[int],
    samples: int,
    ratio: int | None = None,
    seed: int = 0,
    refine: bool | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Measure reconstruction at each length.

    Returns
    -------
    list of dict
        For each length: `loss` (mean cross-entropy of the text's tokens under teacher forcing, nats a token), `token_accuracy` (the
        same, share of likeliest tokens), `bleu` and `exact_match` (means over the texts that `ICAE.reconstruct` gives back), their
        quartiles and the bootstrap 95% interval of the mean; the same with `greedy_` before it for the texts as the decoder reads them,
        which is what the paper measures; where they were refined (`refine` as for `ICAE.reconstruct`), `identical`, the share of texts
        given back to the last token, and `verified`, the share whose slots say so.
    """
    rows = []
    for at, length in enumerate(lengths):
        chance = np.random.default_rng([seed, length])
        contexts = [corpus.window(chance, length) for _ in range(samples)]
        made: list[list[int]] = []
        refined: list[Refined] = []
        scores, counts = [], []
        for start in range(0, samples, batch_size):
            part = contexts[start : start + batch_size]
            slots = model.compress_ids(part, ratio=ratio)
            counts += [s.count for s in slots]
            scores += [score_reconstruction(model, s, ids) for s, ids in zip(slots, part, strict=True)]
            for i, (s, read) in enumerate(zip(slots, model.read_segments(slots, batch_size=batch_size), strict=True), start):
                made.append(joined(read))
                if model.refines(refine):
                    refined += model.refine_ids([s], [read])
                if progress is not None:
                    progress(at * samples + i + 1, len(lengths) * samples)
        row = {
            "length": length,
            "ratio": length / np.mean(counts),
            "samples": samples,
            "loss": float(np.mean([nll for nll, _ in scores])),
            "token_accuracy": float(np.mean([hits for _, hits in scores])),
        }
        greedy = _likeness(model, made, contexts)
        if refined:
            row |= _likeness(model, [r.ids for r in refined], contexts)
            row["identical"] = float(np.mean([r.ids == c for r, c in zip(refined, contexts, strict=True)]))
            row["verified"] = float(np.mean([r.verified for r in refined]))
        else:
            row |= greedy
        rows.append(row | {f"greedy_{name}": value for name, value in greedy.items()})
    return rows


def _likeness(model: ICAE, made: Sequence[list[int]], contexts: Sequence[list[int]]) -> dict[str, Any]:
    """Return how like texts given back are to those compressed: BLEU and exact match, mean and spread."""
    bleus = [bleu(model.base.decode(m), model.base.decode(c)) for m, c in zip(made, contexts, strict=True)]
    matches = [exact_match(m, c) for m, c in zip(made, contexts, strict=True)]
    return {
        "bleu": float(np.mean(bleus)),
        "bleu_interval": interval(bleus),
        "bleu_quartiles": np.percentile(bleus, [25, 50, 75]).tolist(),
        "exact_match": float(np.mean(matches)),
        "exact_match_quartiles": np.percentile(matches, [25, 50, 75]).tolist(),
    }


def check_original(slots: MemorySlots, context: Sequence[int]) -> None:
    """Raise `ICAEError` where slots cannot have been made from a context: it has not as many tokens as they stand for."""
    if slots.tokens != len(context):
        raise ICAEError(f"the slots stand for {slots.tokens} tokens, the text has {len(context)}; it is not the text they were made from")


def score_reconstruction(model: ICAE, slots: MemorySlots, context: Sequence[int]) -> tuple[float, float]:
    """Return (mean cross-entropy in nats, token accuracy) of a context under teacher forcing, each segment from its own slots."""
    check_original(slots, context)
    parts, begin = slots.split(), 0
    examples = []
    for part in parts:
        examples.append(Example([], Marker.AE, [], list(context[begin : begin + part.tokens])))
        begin += part.tokens
    scores = [s for i in range(0, len(parts), 8) for s in model.score(parts[i : i + 8], examples[i : i + 8])]
    nll = np.concatenate([s.nll.numpy() for s in scores])
    hits = np.concatenate([s.hits.numpy() for s in scores])
    return float(nll.mean()), float(hits.mean())


def continuation(
    model: ICAE,
    corpus: Corpus,
    *,
    length: int,
    target: int,
    samples: int,
    ratio: int | None = None,
    seed: int = 0,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure the perplexity of what follows a context: given as text, as slots, or not at all (the paper's Table 1).

    Returns
    -------
    dict
        `ppl_text`, `ppl_slots`, `ppl_none`, and `slots_over_text`, over the same tokens: all of the target but its first, which from
        nothing could only be guessed.

    Raises
    ------
    ICAEError
        If `target` is below 2, or the corpus has no text as long as context and target.
    """
    if target < 2:
        raise ICAEError(f"target must be at least 2, got {target}: its first token is not scored")
    chance = np.random.default_rng([seed, length, target])
    lead = model.base.lead
    nll: dict[str, list[float]] = {"text": [], "slots": [], "none": []}
    for at in range(0, samples, batch_size):
        windows = [corpus.window(chance, length + target) for _ in range(min(batch_size, samples - at))]
        contexts, follows = [w[:length] for w in windows], [w[length:] for w in windows]
        slots = model.compress_ids(contexts, ratio=ratio)
        sides = {
            "text": model.score(
                None, [Example([], Marker.LM, lead + c, f, 1) for c, f in zip(contexts, follows, strict=True)], marked=False
            ),
            "slots": model.score(slots, [Example([], Marker.LM, [], f, 1) for f in follows]),
            "none": model.score(None, [Example([], Marker.LM, lead, f, 1) for f in follows], marked=False),
        }
        for name, scores in sides.items():
            nll[name] += [x for s in scores for x in s.nll.tolist()]
        if progress is not None:
            progress(at + len(windows), samples)
    ppl = {f"ppl_{name}": perplexity(values) for name, values in nll.items()}
    return {"length": length, "target": target, "samples": samples, **ppl, "slots_over_text": ppl["ppl_slots"] / ppl["ppl_text"]}
