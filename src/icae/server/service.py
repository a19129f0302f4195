"""Requests -> work for the scheduler: which contexts, which prompt, and what the tokens that come back say. Knows no HTTP."""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
import re
import secrets
import time
from collections.abc import Generator
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from torch import Tensor

from icae.base import Base
from icae.beginnings import echo
from icae.catalogue import Entry
from icae.chat import chat_template, encode, render
from icae.errors import ICAEError, StorageError
from icae.focus import asked, counted, relevant, selected
from icae.model import ICAE
from icae.objectives import Example, Marker
from icae.overlap import Texts
from icae.reader import Sampling
from icae.server.answer import Answer
from icae.server.lately import Lately
from icae.server.limits import Limits
from icae.server.prefix import Prefix, Prefixes, check_positions, prefill
from icae.server.schemas import ContextPart, Message, Reading, ReadToken, Saved, TextPart, Usage
from icae.slots import MemorySlots
from icae.stepwise import saying
from icae.store import Added, Gone, SlotStore

log = logging.getLogger("icae.server")

SEGMENTS_AT_ONCE = 1
"""Segments that are encoded, or polished by one step, between two steps of those who generate."""

CHARACTER = 4
"""Bytes of a character in UTF-8, and so the tokens that it may take, at most."""

CHOSEN_BYTES = 1 << 22
"""Memory for which segments prompts were about: "Summarise the text." comes again and again."""

Wanted = str | list[int]
"""A context: the hash of a stored content, or the token ids of a text."""


class NotFound(ICAEError):
    """There is no such context, or not for this key."""

    status = 404


@dataclass(frozen=True)
class Ask:
    """A chat or a completion, ready to be read."""

    contexts: list[Wanted]
    pieces: list[list[int] | Tensor]
    """The prompt: token ids, and input embeddings (tokens, hidden) between them."""
    marker: Marker
    """Stands before the prompt where there are contexts."""
    about: str = ""
    """What the user asks: long contexts are narrowed to the segments that it is about; nothing: they are read whole."""
    last: str = ""
    """The last thing that the user said: an answer has other words than these."""


class Service:
    """Store, model and hot contexts of one server."""

    def __init__(self, model: ICAE, store: SlotStore, limits: Limits):
        self.model, self.store, self.limits = model, store, limits
        self.prefixes = Prefixes(model, limits.prefix_bytes)
        self.whole: Lately[tuple[MemorySlots, Texts | None]] = Lately(limits.slot_bytes, _size)
        self.chosen: Lately[list[int]] = Lately(CHOSEN_BYTES, lambda numbers: 200 + 8 * len(numbers))
        self.under_way: set[str] = set()

    # ---- contexts ----

    def find(self, namespace: str, id: str) -> Entry:
        """Return a namespace's context; raises `NotFound`."""
        for entry in self.store.catalogue.entries(namespace, id=id):
            return entry
        raise NotFound(f"no context {id!r}; GET /v1/contexts lists yours")

    def encode(self, text: str) -> list[int]:
        """Return a context's token ids; raises `ICAEError` if there are too many."""
        ids = self.model.base.encode(text)
        if len(ids) > self.limits.max_context:
            raise ICAEError(f"the text has {len(ids)} tokens, more than {self.limits.max_context}; send it in parts")
        return ids

    def compress(
        self, namespace: str, ids: list[int], name: str | None, ratio: int | None, source: str
    ) -> Generator[None, None, tuple[Entry, bool]]:
        """Store a context, piece by piece; return its entry and whether the namespace had the content before.

        Two requests with the same text wait for one another, so that it is compressed once.
        """
        most = self.limits.store_bytes
        begun, mark = time.time(), hashlib.sha256(repr((ratio, ids)).encode()).hexdigest()
        while mark in self.under_way:
            yield
        self.under_way.add(mark)
        try:
            added: Added = yield from saying(
                lambda _: None,
                self.store.adding(
                    self.model, ids, name, namespace=namespace, source=source, ratio=ratio, batch_size=SEGMENTS_AT_ONCE, most=most
                ),
            )
        finally:
            self.under_way.discard(mark)
        if most is not None and added.fresh:
            try:
                yield from self.store.clearing(most)
            except StorageError as error:  # the context is stored; what is too much goes when the next one comes
                log.warning("the store was not cleared: %s", error)
        mine = self.store.catalogue.entries(namespace, content=added.entry.entry)
        return added.entry, any(e.made < begun for e in mine)

    def delete(self, namespace: str, id: str) -> None:
        """Take a context away; raises `NotFound`."""
        entry = self.find(namespace, id)
        self.store.remove(entry.name, namespace)

    def reading(self, namespace: str, id: str, segments: int) -> Generator[None, None, Reading]:
        """Score a context's first segments token by token, read back from their slots and by the base alone."""
        entry = self.find(namespace, id)
        slots, ids = self._read(entry.entry)
        self.model.check(slots)
        made, slot, at, ratio = [], 0, 0, entry.about["ratio"]
        held: list[int] = []  # tokens of a character that is not whole yet: the last one has it
        for number in range(min(segments, len(slots.segments))):
            yield
            part = slots.segment(number)
            piece = ids[at : at + part.tokens]
            (back,) = self.model.score([part], [Example([piece], Marker.AE, [], piece)])
            plain = []
            if len(piece) > 1:
                plain = self.model.score(None, [Example([], Marker.AE, piece[:1], piece[1:])], marked=False)[0].nll.tolist()
            for i, (token, hit, nll) in enumerate(zip(piece, back.hits.tolist(), back.nll.tolist(), strict=True)):
                surprise = plain[i - 1] if i else 0.0
                held.append(token)
                text = self.model.base.decode(held)
                if text.endswith("\ufffd") and len(held) < CHARACTER:
                    text = ""
                else:
                    held = []
                made.append(ReadToken(text=text, slot=slot + i // ratio, hit=hit, nll=nll, surprise=surprise))
            slot, at = slot + part.count, at + part.tokens
        return Reading(id=id, tokens=made, slots=slot, complete=at == len(ids))

    # ---- prompts ----

    def chat(self, namespace: str, messages: list[Message]) -> Ask:
        """Read a chat: contexts come first, as slots; text and embeddings stay where they are, in the base's chat template.

        Raises
        ------
        NotFound
            If a context is not the namespace's own.
        ICAEError
            If a part is unreadable, or all contexts together have too many tokens.
        """
        if len(messages) > self.limits.max_messages:
            raise ICAEError(f"the chat has {len(messages)} messages, more than {self.limits.max_messages}; shorten it")
        mark = secrets.token_hex(8)  # nobody can write it into a text
        contexts: list[Wanted] = []
        sizes: dict[str | tuple[int, ...], int] = {}
        embeds: list[Tensor] = []
        turns, texts = [], []
        for message in messages:
            said = ""
            for part in [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content:
                if isinstance(part, TextPart):
                    said += part.text
                elif isinstance(part, ContextPart) and part.context_id:
                    entry = self.find(namespace, part.context_id)
                    contexts.append(entry.entry)
                    sizes[entry.entry] = entry.tokens
                elif isinstance(part, ContextPart):
                    ids = self.encode(part.text or "")
                    contexts.append(ids)
                    sizes[tuple(ids)] = len(ids)
                else:
                    said += f"{mark}{len(embeds)}{mark}"
                    embeds.append(self._embeds(part.data))
            turns.append({"role": "system" if message.role == "developer" else message.role, "content": said})
            texts.append({"role": message.role, "content": re.sub(f"{mark}.*?{mark}", "", said)})
        self._check_size(sum(sizes.values()))
        base, tokenizer = self.model.base, self.model.base.tokenizer
        first, *rest = render(tokenizer, turns).split(mark)
        begin = encode(tokenizer, first)
        pieces: list[list[int] | Tensor] = [begin if contexts or chat_template(tokenizer) else base.led(begin)]
        for i, piece in enumerate(rest):
            pieces.append(encode(tokenizer, piece) if i % 2 else embeds[int(piece)])
        last = next((text["content"] for text in reversed(texts) if text["role"] == "user"), "")
        return Ask(contexts, pieces, Marker.FT, asked(texts), last)

    def completion(self, namespace: str, prompt: str | list[int], context_id: str | None) -> Ask:
        """Read a completion: plain text that goes on, after a context if one is named."""
        ids = self.model.base.encode(prompt) if isinstance(prompt, str) else prompt
        if isinstance(prompt, str) and prompt and context_id is None:
            ids = self.model.base.led(ids)
        vocabulary = self.model.base.model.get_input_embeddings().weight.shape[0]
        if any(i >= vocabulary for i in ids):
            raise ICAEError(f"the prompt holds ids past the base's {vocabulary}")
        if context_id is None:
            return Ask([], [ids], Marker.LM)
        entry = self.find(namespace, context_id)
        self._check_size(entry.tokens)
        return Ask([entry.entry], [ids], Marker.LM)

    def _check_size(self, tokens: int) -> None:
        """Raise `ICAEError` for more tokens of contexts than one prompt may have read from the store."""
        if tokens > self.limits.max_context:
            raise ICAEError(f"the contexts have {tokens} tokens, more than {self.limits.max_context}; ask about fewer of them")

    def _embeds(self, data: str) -> Tensor:
        """Read embeddings (tokens, hidden) from base64 of safetensors; nothing is ever unpickled."""
        hidden = self.model.base.hidden_size
        try:
            tensors = from_safetensors(base64.b64decode(data, validate=True))
        except (binascii.Error, ValueError, KeyError, SafetensorError) as error:
            raise ICAEError("prompt_embeds is no base64 of a safetensors file (tensors saved by torch.save are refused)") from error
        if len(tensors) != 1:
            raise ICAEError(f"prompt_embeds holds {len(tensors)} tensors; give one of (tokens, {hidden})")
        (embeds,) = tensors.values()
        if embeds.ndim != 2 or embeds.shape[1] != hidden or not len(embeds) or not embeds.is_floating_point():
            raise ICAEError(f"prompt_embeds is {embeds.dtype} {tuple(embeds.shape)}; give floating-point numbers (tokens, {hidden})")
        embeds = embeds.to(self.model.base.device, self.model.base.dtype)
        if not torch.isfinite(embeds).all():
            raise ICAEError("prompt_embeds holds numbers that are infinite or none")
        return embeds

    # ---- work ----

    def generate(
        self, namespace: str, ask: Ask, limit: int | None, sampling: Sampling, usage: Usage, beginnings: int = 0
    ) -> Generator[None, None, Answer]:
        """Prepare a generation, piece by piece; fills in `usage` before the prompt is read.

        `beginnings` are how many ways an answer from contexts is begun (beginnings.py), where it is not drawn; 0: the checkpoint's own.
        """
        contents = []
        for wanted in ask.contexts:
            if isinstance(wanted, str):
                self.store.catalogue.touch(wanted)  # else a text beside it may drive it out
        for wanted in ask.contexts:
            if isinstance(wanted, list):
                entry, _ = yield from self.compress(namespace, wanted, None, None, "chat")
                wanted = entry.entry
            contents.append(wanted)
        contents = list(dict.fromkeys(contents))  # a chat that has its context in every turn reads it once
        key, prefix = (yield from self._prefix(contents, ask.about, namespace)) if contents else ("", None)
        prefix = prefix and prefix.towards(namespace)
        lead = self.model.config.marker_length if prefix else 0
        span, length = prefix.span if prefix else 0, sum(map(len, ask.pieces)) + lead
        check_positions(self.model, span + length, limit or 1)  # before it is embedded: a long prompt takes much memory
        embed = self.model.base.embed
        device, dtype = self.model.base.device, self.model.base.dtype
        pieces = [p if isinstance(p, Tensor) else embed(torch.tensor(p, dtype=torch.long, device=device)) for p in ask.pieces]
        prompt = torch.cat(pieces).to(dtype)
        marker = None if prefix is None else ask.marker
        slots, tokens = (prefix.slots, prefix.tokens) if prefix else (0, 0)
        usage.prompt_tokens = slots + lead + len(prompt)
        usage.icae = Saved(context_tokens=tokens, slots=slots, saved_tokens=tokens - slots, kv_bytes=0)
        if limit is None:
            limit = min(self.limits.max_tokens, self.model.base.max_positions - span - length)
        ids = ask.pieces[0] if ask.pieces and isinstance(ask.pieces[0], list) else []
        guide = self.model.guide(prefix.words) if prefix is not None and marker == Marker.FT else None
        row = yield from prefill(self.model, prefix, marker, prompt, limit, sampling, ids, guide)
        if prefix is not None and marker is not None and len(ids) == len(prompt):
            self.prefixes.follow(key, prefix, marker, ids, row)
        read = [*(row.context or ()), *((layer.keys, layer.values) for layer in row.cache.layers)]
        usage.icae.kv_bytes = sum(t.numel() * t.element_size() for pair in read for t in pair)
        if marker != Marker.FT or sampling.temperature:
            beginnings = 1
        return Answer(row, beginnings or self.model.config.beginnings, echo(ask.last, self.model.base.decode))

    def _prefix(self, contents: list[str], about: str, namespace: str) -> Generator[None, None, tuple[str, Prefix]]:
        """Return contexts as one prefix, and its key: from memory if they were asked lately, else, piece by piece, from the store.

        Several contexts, and long ones, are narrowed to what the prompt is about; only the same namespace finds that again, since another
        could tell by its times what was asked.
        """
        every, most, numbers, whole = "+".join(contents), self.model.config.focus, None, None
        key, ids = every, self.model.base.encode(about)
        if ids and most and (len(contents) > 1 or most < self.store.catalogue.segments(every)):
            mark = f"{namespace}#{every}#{hashlib.sha256(repr(ids).encode()).hexdigest()}"
            if (numbers := self.chosen.get(mark)) is None:
                whole, texts = yield from self._whole(contents, every)
                numbers = yield from relevant(self.model.reader, whole, ids, most, texts)
                self.chosen.keep(mark, numbers)
            key = f"{namespace}#{every}#{','.join(map(str, numbers))}"
        found = self.prefixes.get(key)
        if found is not None:
            for content in contents:
                self.store.catalogue.touch(content)
            return key, found
        if numbers is None:
            slots, tokens = (yield from self._slots(contents)), None
        else:
            if whole is None:
                whole, _ = yield from self._whole(contents, every)
            slots, tokens = selected(whole, numbers), whole.tokens
        check_positions(self.model, slots.span + self.model.config.marker_length, 1)
        found = self.prefixes.put(key, slots, tokens)
        yield
        return key, found

    def _whole(self, contents: list[str], key: str) -> Generator[None, None, tuple[MemorySlots, Texts | None]]:
        """Return slots that prompts are about a part of, and their letters: from memory if asked lately, else from the store."""
        if (found := self.whole.get(key)) is None:
            slots = yield from self._slots(contents)
            found = slots, None if slots.ids is None else (yield from counted(self.model.reader, slots))
            self.whole.keep(key, found)
        for content in contents:
            self.store.catalogue.touch(content)
        return found

    def _slots(self, contents: list[str]) -> Generator[None, None, MemorySlots]:
        """Read the slots of stored contexts, one after the other, and join them."""
        parts = []
        for content in contents:
            parts.append(self._read(content)[0])
            yield
        slots = MemorySlots.concatenate(parts)
        self.model.check(slots)
        return slots

    def _read(self, content: str) -> tuple[MemorySlots, list[int]]:
        """Return slots and token ids of a stored content; raises `NotFound` if it has gone meanwhile."""
        try:
            return self.store.read(content)
        except Gone as error:
            raise NotFound(str(error)) from error


def _size(kept: tuple[MemorySlots, Texts | None]) -> int:
    slots, texts = kept
    return slots.nbytes + (0 if texts is None else texts.nbytes)


class Speech:
    """Token ids -> text, as it grows: whole characters only, and nothing from a stop string on."""

    def __init__(self, base: Base, stop: list[str]):
        self.base, self.stop = base, [s for s in stop if s]
        self.said = ""
        self.stopped = False

    def hear(self, ids: list[int], last: bool = False) -> str:
        """Return what is new in the text of `ids`; what may yet become a stop string is held back until it cannot."""
        text = self.base.decode(ids)
        if not last:
            text = text.rstrip("\ufffd")
        places = [at for s in self.stop if (at := text.find(s)) >= 0]
        if places:
            text, self.stopped = text[: min(places)], True
        elif not last:
            held = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
            text = text[: len(text) - held]
        new, self.said = text[len(self.said) :], max(text, self.said, key=len)
        return new
