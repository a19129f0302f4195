"""Who writes prompts and answers: the base itself, reading the full text, or a model behind an OpenAI-compatible endpoint.

texts -> (which text, Reply), as soon as each is there
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from icae.base import Base, cached
from icae.chat import full_text
from icae.decoder import Decoder
from icae.endpoint import connect, reply
from icae.errors import ICAEError
from icae.objectives import padded
from icae.pwc.prompts import BRIEFLY, Prompt, offered, plan, question, replied, request
from icae.slot_batch import SlotBatch
from icae.slots import MemorySlots, Origin, Segment

_PROMPT = 64
"""Tokens of a prompt and what the template puts around it, at most."""


@dataclass(frozen=True)
class Said:
    """One prompt and what was answered; `ended` by itself, not by a limit."""

    kind: str
    prompt: str
    answer: str
    ended: bool


@dataclass(frozen=True)
class Reply:
    """All that was said about a text, and what it cost."""

    said: list[Said]
    tokens: int
    raw: str = ""
    """An endpoint's own words, where nothing could be read from them."""


class Teacher(Protocol):
    """What `build` asks."""

    name: str
    together: int
    """Texts it takes at once."""

    def read(self, texts: Sequence[str]) -> Iterator[tuple[int, Reply]]:
        """Yield each text's number and reply; one that fails raises `ICAEError` after the others have been yielded."""

    def most(self, text: str) -> int:
        """Return the tokens that asking about a text may cost at most."""


class BaseTeacher:
    """The base with the full text in its prompt: what slots should imitate.

    A text is read once, and its keys and values serve all prompts about it; all prompts of several texts are answered in one batch. (On
    bases with sliding windows, which count padding, answers may differ from those of a text alone.)

    Parameters
    ----------
    prompts : int
        Prompts a text, of fifteen.
    max_tokens : int
        Longest answer; one that has not ended by then counts as truncated.
    temperature : float
        0: the likeliest answer. Questions are always drawn at 0.7.
    kinds : sequence of str
        Of the prompts (prompts.py); none: all.
    """

    def __init__(
        self,
        base: Base,
        *,
        prompts: int = 6,
        max_tokens: int = 96,
        temperature: float = 0.0,
        seed: int = 0,
        together: int = 4,
        kinds: Sequence[str] = (),
    ):
        self.base, self.decoder, self.kinds = base, Decoder(base), tuple(kinds)
        self.prompts = min(prompts, offered(kinds))
        self.max_tokens, self.temperature, self.seed, self.together = max_tokens, temperature, seed, together
        drawn = f" (seed {seed})" if temperature else ""
        self.name = f"{base.byline}, {prompts} prompts of {max_tokens} tokens, temperature {temperature:g}{drawn}" + (
            f", {' '.join(kinds)}" if kinds else ""
        )

    def most(self, text: str) -> int:
        """Return the tokens that asking about a text may cost at most."""
        return self.prompts * (40 + self.max_tokens)

    def read(self, texts: Sequence[str]) -> Iterator[tuple[int, Reply]]:
        """Yield each text's number and reply."""
        plans = [plan(text, self.prompts, self.kinds) for text in texts]
        prefixes = self._prefixes(texts)
        asking = [(n, p) for n, prompts in enumerate(plans) for p in prompts if p.kind == "asking"]
        asked = self._answers(texts, prefixes, asking, 40, 0.7)
        ready = [(n, p) for n, prompts in enumerate(plans) for p in prompts if p.kind != "asking"]
        for (n, p), (words, _, _) in zip(asking, asked, strict=True):
            if found := question(words):
                ready.append((n, Prompt(p.kind, f"{found} {BRIEFLY}")))
        made = self._answers(texts, prefixes, ready, self.max_tokens, self.temperature)
        for number in range(len(texts)):
            said = [said_of(p, words, ended) for (n, p), (words, ended, _) in zip(ready, made, strict=True) if n == number]
            pairs = [*zip(asking, asked, strict=True), *zip(ready, made, strict=True)]
            yield number, Reply(said, sum(count for (n, _), (_, _, count) in pairs if n == number))

    @torch.no_grad()
    def _prefixes(self, texts: Sequence[str]) -> list[tuple[list[int], MemorySlots]]:
        """Read what all prompts about a text begin with: its ids, and the base's own keys and values of them."""
        from transformers import DynamicCache

        rows = []
        for text in texts:
            one, other = (self.base.prompted(full_text(text, words)) for words in ("Why?", "A text."))
            rows.append(one[: _same(one, other)])
            if len(one) + _PROMPT + self.max_tokens > self.base.max_positions:
                raise ICAEError(
                    f"a text of {len(one)} tokens leaves no room for a prompt and {self.max_tokens} tokens of answer in the "
                    f"{self.base.max_positions} positions of {self.base.name}; lower --most"
                )
        cache: Any = DynamicCache()
        real = torch.arange(max(map(len, rows)))[None] < torch.tensor([len(row) for row in rows])[:, None]
        self.base.model.get_decoder()(
            input_ids=padded(rows).to(self.base.device),
            attention_mask=real.long().to(self.base.device),
            **cached(self.base.model.get_decoder(), cache),
        )
        origin, found = Origin("kv", 1, "spread", self.base.name, self.base.fingerprint, "none"), []
        for b, row in enumerate(rows):
            n = len(row)
            tensors = {
                name: torch.stack([getattr(layer, name)[b, :, :n].transpose(0, 1) for layer in cache.layers], 1)
                for name in ("keys", "values")
            }
            found.append((row, MemorySlots(tensors, torch.arange(n, device=self.base.device), (Segment(n, n, n),), origin)))
        return found

    def _answers(
        self,
        texts: Sequence[str],
        prefixes: Sequence[tuple[list[int], MemorySlots]],
        asked: Sequence[tuple[int, Prompt]],
        limit: int,
        temperature: float,
    ) -> list[tuple[str, bool, int]]:
        """Answer (number of the text, prompt) pairs in one batch; return words, whether they ended, and tokens."""
        if not asked:
            return []
        slots, rest = [], []
        for n, prompt in asked:
            ids = self.base.prompted(full_text(texts[n], prompt.text))
            row, prefix = prefixes[n]
            begin = min(_same(row, ids), len(ids) - 1)
            head = {name: t[:begin] for name, t in prefix.tensors.items()}
            slots.append(MemorySlots(head, prefix.positions[:begin], (Segment(begin, begin, begin),), prefix.origin))
            rest.append(ids[begin:])
        batch, device = SlotBatch.pad(slots), self.base.device
        text = padded(rest).to(device)
        steps = torch.arange(text.shape[1], device=device)
        real = steps[None] < torch.tensor([len(r) for r in rest], device=device)[:, None]
        places = torch.tensor([s.count for s in slots], device=device)[:, None] + steps
        made: list[list[int]] = [[] for _ in asked]
        ended = [False] * len(asked)
        limits = [limit] * len(asked)
        for step in self.decoder.generate(
            batch, self.base.embed(text), places, real, limits, temperature=temperature, seed=self.seed if temperature else None
        ):
            for b, new in enumerate(step):
                if new is not None:
                    made[b].append(new)
                elif len(made[b]) < limit:
                    ended[b] = True
        return [(self.base.decode(ids).strip(), end, len(ids)) for ids, end in zip(made, ended, strict=True)]


class EndpointTeacher:
    """A model behind any OpenAI-compatible endpoint: one request a text.

    Parameters
    ----------
    model : str
        Its name at the endpoint.
    url : str, optional
        The endpoint; none: `OPENAI_BASE_URL`, else OpenAI's own. The key is `OPENAI_API_KEY`.
    max_tokens : int
        Longest reply.
    together : int
        Requests under way at once.
    client : optional
        Anything with `chat.completions.create`, instead of a client for `url`.

    Raises
    ------
    ICAEError
        If the `openai` package or the key is missing.
    """

    def __init__(
        self, model: str, url: str | None = None, *, max_tokens: int = 3000, temperature: float = 0.7, together: int = 4, client: Any = None
    ):
        self.model, self.max_tokens, self.temperature, self.together = model, max_tokens, temperature, together
        self.name = f"{model}, temperature {temperature:g}"
        self._client = client or connect(
            url, purpose="an endpoint as teacher", extra="data", instead="give --url; --teacher base needs neither"
        )

    def most(self, text: str) -> int:
        """Return the tokens that asking about a text may cost at most, a token being no shorter than two bytes of UTF-8 as a rule."""
        return len(request(text).encode()) // 2 + self.max_tokens

    def read(self, texts: Sequence[str]) -> Iterator[tuple[int, Reply]]:
        """Yield each text's number and reply; a failure, or an interrupt, is raised after what succeeded; a second interrupt at once."""
        failure: BaseException | None = None
        with ThreadPoolExecutor(max_workers=max(1, len(texts))) as pool:
            under_way = {pool.submit(self._ask, text): number for number, text in enumerate(texts)}
            while under_way:
                try:
                    done = next(as_completed(under_way))
                except KeyboardInterrupt as interrupt:
                    if isinstance(failure, KeyboardInterrupt):
                        raise
                    failure = interrupt
                    continue
                number = under_way.pop(done)
                try:
                    yield number, done.result()
                except Exception as error:  # whatever it is, what the others cost is kept
                    failure = failure or error
        if failure is not None:
            raise failure

    def _ask(self, text: str) -> Reply:
        messages = [{"role": "user", "content": request(text)}]
        words, choice, usage = reply(self._client, self.model, messages, max_tokens=self.max_tokens, temperature=self.temperature)
        tokens = getattr(usage, "total_tokens", None)  # some endpoints say nothing of it
        rows = replied(words if choice.finish_reason != "length" else words[: words.rfind("}") + 1] + "]")
        return Reply([Said(*row, ended=True) for row in rows], self.most(text) if tokens is None else tokens, "" if rows else words)


def said_of(prompt: Prompt, words: str, ended: bool) -> Said:
    """Return what was said; a continuation that met the limit ends with its last whole sentence, since it might end anywhere."""
    if not ended and prompt.kind == "continue" and (whole := re.match(r".*[.!?][\"'”’]?(?=\s|$)", words, re.DOTALL)):
        words, ended = whole[0], True
    return Said(prompt.kind, prompt.text, words, ended)


def _same(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many ids two rows begin with together."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
