"""Questions -> responses from one side (slots, a text, nothing), with their figures against the reference; each side asked once.

token F1, ROUGE-1         of the response, best over the reference answers
log-likelihood            of the reference response, mean over its tokens, in nats (higher is better)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from icae.chat import chat_response, full_text
from icae.experiments.context import Context
from icae.metrics import rouge1, token_f1
from icae.model import ICAE
from icae.objectives import Example, Marker
from icae.slots import MemorySlots
from icae.triples import Triple


@dataclass(frozen=True)
class Side:
    """One side's responses, a value a question."""

    responses: list[str]
    f1: list[float]
    rouge1: list[float]
    likelihood: list[float] | None
    """None for a model whose probabilities are out of reach."""


def judged_side(responses: list[str], triples: Sequence[Triple], likelihood: list[float] | None) -> Side:
    """Measure responses against their references."""
    f1 = [token_f1(r, t.answers) for r, t in zip(responses, triples, strict=True)]
    rouge = [max(rouge1(r, a) for a in t.answers) for r, t in zip(responses, triples, strict=True)]
    return Side(responses, f1, rouge, likelihood)


def ask_slots(
    context: Context, model: ICAE, triples: Sequence[Triple], *, max_new_tokens: int, ratio: int | None = None, batch_size: int = 16
) -> Side:
    """Ask about each context, given as slots."""
    ratio = ratio or model.config.ratio

    def ask(rows: slice) -> tuple[list[str], list[float]]:
        part = triples[rows]
        slots = model.compress([t.context for t in part], ratio=ratio)
        made = model.answers(slots, [t.prompt for t in part], max_new_tokens=max_new_tokens)
        return made, _likelihood(model, slots, [t.prompt for t in part], part)

    return _ask(context, ("slots", model.origin.adapter, ratio), ask, triples, max_new_tokens, batch_size)


def ask_text(
    context: Context,
    model: ICAE,
    triples: Sequence[Triple],
    texts: Sequence[str] | None,
    *,
    max_new_tokens: int,
    batch_size: int = 16,
) -> Side:
    """Ask the base, which reads `texts` before each prompt (none: nothing)."""
    prompts = [t.prompt for t in triples] if texts is None else [full_text(x, t.prompt) for x, t in zip(texts, triples, strict=True)]

    def ask(rows: slice) -> tuple[list[str], list[float]]:
        made = model.answers(None, prompts[rows], max_new_tokens=max_new_tokens)
        return made, _likelihood(model, None, prompts[rows], triples[rows])

    key = hashlib.sha256("\0".join(prompts).encode()).hexdigest()
    return _ask(context, ("text", model.config.base_fingerprint, key), ask, triples, max_new_tokens, batch_size)


def _ask(
    context: Context,
    what: tuple,
    ask: Callable[[slice], tuple[list[str], list[float]]],
    triples: Sequence[Triple],
    max_new_tokens: int,
    batch_size: int,
) -> Side:
    key = ("ask", *what, max_new_tokens, tuple((t.context, t.prompt) for t in triples))
    if key not in context.known:
        made: list[str] = []
        likelihood: list[float] = []
        tick = context.progress(f"questions asked from {what[0]}")
        for at in range(0, len(triples), batch_size):
            responses, likely = ask(slice(at, at + batch_size))
            made, likelihood = made + responses, likelihood + likely
            tick(len(made), len(triples))
        context.known[key] = judged_side(made, triples, likelihood)
    return context.known[key]


def _likelihood(model: ICAE, slots: Sequence[MemorySlots] | None, prompts: Sequence[str], triples: Sequence[Triple]) -> list[float]:
    """Return the mean log-likelihood a token of each reference response."""
    found: list[float] = []
    for at in range(0, len(prompts), 4):
        examples = [
            Example([], Marker.FT, model.base.prompted(p, alone=slots is None), chat_response(model.base.tokenizer, t.response))
            for p, t in zip(prompts[at : at + 4], triples[at : at + 4], strict=True)
        ]
        part = None if slots is None else slots[at : at + 4]
        found += [-float(np.mean(s.nll.numpy())) for s in model.score(part, examples, marked=slots is not None)]
    return found
