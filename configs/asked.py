"""Questions about any text, by a base that learned to ask as people do: what `sh configs/asked.sh` makes.

    python configs/asked.py turn TRIPLES OUT.jsonl
    python configs/asked.py ask OUT.jsonl --asker FOLDER --answerer FOLDER SOURCE PASSAGES [SOURCE PASSAGES ...]

`turn` makes triples that teach to ask: the text, "What does the text tell?", and the question that somebody asked. A base that was tuned
with them (`benchmarks/full_text_qa.py train`) asks several questions about each passage; the base that was tuned to answer with the full
text answers them (the two steps of arXiv 1906.05416, whose third, to ask the answers back, is a limit on how sure the answerer must be
here). A source is a folder of .txt, or a .jsonl of triples, whose contexts are the passages and whose own triples
come first; PASSAGES 0 takes them all.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from cloze import passages
from rich.progress import track
from torch import nn

from icae.base import Base, load_base
from icae.chat import chat_prompt, chat_response, full_text
from icae.config import ICAEConfig
from icae.decoder import Decoder
from icae.objectives import Example, Marker
from icae.reader import GREEDY, Reader, Sampling
from icae.triples import load_triples

ASK = "What does the text tell?"
MOST_QUESTION, MOST_ANSWER, _SCORED = 28, 40, 128
"""Tokens; and answers that are scored at once."""


class Row(NamedTuple):
    """A triple."""

    input: str
    prompt: str
    answer: str

    def line(self) -> str:
        """Return it as a line of JSON."""
        return json.dumps(self._asdict(), ensure_ascii=False) + "\n"


def turned(source: str) -> Iterator[Row]:
    """Yield triples whose response is the question."""
    for t in load_triples(source):
        yield Row(t.context, ASK, t.prompt.strip())


def texts_of(source: str, count: int, chance: random.Random) -> tuple[list[str], list[Row]]:
    """Return a source's passages, and the triples that it has about them."""
    if not source.endswith(".jsonl"):
        return list(dict.fromkeys(islice(passages(source, chance), count))), []
    own = [Row(t.context, t.prompt, t.response) for t in load_triples(source)]
    texts = list(dict.fromkeys(row.input for row in own))
    texts = texts if not count else chance.sample(texts, min(count, len(texts)))
    wanted = set(texts)
    return texts, [row for row in own if row.input in wanted]


def reader_of(base: Base) -> Reader:
    """Return what reads plain prompts; its markers are never read."""
    return Reader(Decoder(base), ICAEConfig(), nn.Parameter(torch.zeros(3, 2, base.hidden_size)))


def generated(base: Base, prompts: Sequence[list[int]], most: int, sampling: Sampling) -> list[list[int]]:
    """Return what the base says after each prompt, to its end; nothing where that has not come within `most` tokens."""
    rows = reader_of(base).collect(None, list(prompts), None, [most] * len(prompts), sampling) if prompts else []
    return [row if len(row) < most else [] for row in rows]


def sureness(base: Base, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> list[float]:
    """Return the mean probability (geometric) of each answer's tokens."""
    examples = [Example([], Marker.FT, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    parts = [examples[at : at + _SCORED] for at in range(0, len(examples), _SCORED)]  # logits are wide
    return [float(s.nll.mean().neg().exp()) for part in parts for s in reader_of(base).score(None, part, marked=False)]


def asked(
    asker: Base, answerer: Base, texts: Sequence[str], known: set[tuple[str, str]], *, each: int, sure: float, together: int
) -> Iterator[Row]:
    """Yield the questions about each text that the answerer is sure enough about."""
    to_ask = [chat_prompt(asker.tokenizer, full_text(text, ASK)) for text in texts]
    order = sorted((n for n in range(len(texts)) if len(to_ask[n]) <= 480), key=lambda n: len(to_ask[n]))
    batches = [order[at : at + together // each] for at in range(0, len(order), together // each)]
    for number, batch in enumerate(track(batches, "asking", disable=not sys.stderr.isatty())):
        about = [n for n in batch for _ in range(each)]
        questions = [
            asker.decode(ids).strip() for ids in generated(asker, [to_ask[n] for n in about], MOST_QUESTION, Sampling(0.8, 0.95, number))
        ]
        pairs = []
        for n, question in zip(about, questions, strict=True):
            key = (texts[n], question.lower())
            if 3 <= len(question.split()) <= 25 and key not in known:
                known.add(key)
                pairs.append((texts[n], question))
        prompts = [chat_prompt(answerer.tokenizer, full_text(*pair)) for pair in pairs]
        said = [answerer.decode(ids).strip() for ids in generated(answerer, prompts, MOST_ANSWER, GREEDY)]
        good = [i for i, answer in enumerate(said) if re.search(r"\w", answer)]
        ids = [chat_response(answerer.tokenizer, said[i]) for i in good]
        shares = sureness(answerer, [prompts[i] for i in good], ids) if good else []
        yield from (Row(*pairs[i], said[i]) for i, share in zip(good, shares, strict=True) if share >= sure)


def main() -> None:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    turning = verbs.add_parser("turn")
    turning.add_argument("source")
    turning.add_argument("out", type=Path)
    asking = verbs.add_parser("ask")
    asking.add_argument("out", type=Path)
    asking.add_argument("sources", nargs="+")
    asking.add_argument("--asker", required=True)
    asking.add_argument("--answerer", required=True)
    asking.add_argument("--each", type=int, default=4, help="questions drawn about a passage")
    asking.add_argument("--sure", type=float, default=0.6, help="least mean probability of an answer's tokens")
    asking.add_argument("--together", type=int, default=16)
    asking.add_argument("--device", default="cpu")
    a = parser.parse_args()
    a.out.parent.mkdir(parents=True, exist_ok=True)
    if a.verb == "turn":
        a.out.write_text("".join(row.line() for row in turned(a.source)), encoding="utf-8")
        return
    base = load_base(dtype=torch.float32 if a.device == "cpu" else torch.bfloat16, device=a.device)
    asker, answerer = base.tuned(a.asker), base.tuned(a.answerer)
    chance, made = random.Random(0), 0
    with a.out.open("w", encoding="utf-8") as file:
        for source, count in zip(a.sources[::2], map(int, a.sources[1::2]), strict=True):
            texts, own = texts_of(source, count, chance)
            file.writelines(row.line() for row in own)
            known = {(row.input, row.prompt.lower()) for row in own}
            for row in asked(asker, answerer, texts, known, each=a.each, sure=a.sure, together=a.together):
                file.write(row.line())
                made += 1
    print(f"{made} questions in {a.out}")


if __name__ == "__main__":
    main()
