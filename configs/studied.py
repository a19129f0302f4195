"""Questions about any text with their answers, by a base that learned to say both: what `sh configs/encyclopedia.sh` makes.

    python configs/studied.py turn TRIPLES OUT.jsonl
    python configs/studied.py ask OUT.jsonl --asker FOLDER SOURCE [SOURCE ...]

`turn` makes triples that teach it: the text, "Ask a question that the text answers, and answer it.", and on two lines what somebody asked
and the answer. A base that was tuned with them (`benchmarks/full_text_qa.py train`) is asked a few times about each passage; questions are
drawn, answers are the likeliest, and each of an answer's tokens is kept with the five that might have stood in its place (`likely`, which
`likely_share` learns from). A source is a .jsonl of texts, or of triples, whose contexts are the passages and whose own first question
about each comes before the others.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from math import exp
from pathlib import Path

import torch
from asked import reader_of
from rich.progress import track
from torch import Tensor

from icae.base import Base, load_base
from icae.chat import chat_prompt, full_text
from icae.data import documents
from icae.reader import Sampling
from icae.triples import Triple, read_triples

ASK = "Ask a question that the text answers, and answer it."
MOST, FEW = 56, 6
"""Tokens of a question and its answer, and the likeliest ones that are kept of each place of the answer."""


class Turn:
    """Lets a question be drawn, and after its line the likeliest answer be said (a guide of `beginnings.py`)."""

    def __init__(self, base: Base):
        self.base, self.answering = base, False
        self.likely: list[list[tuple[int, float]]] = []
        """Of the answer's tokens, and of what ends it."""

    @property
    def sure(self) -> float:
        """Mean probability (geometric) of the answer's tokens, and of its end."""
        shares = torch.tensor([place[0][1] for place in self.likely])
        return exp(float(shares.clamp(min=1e-4).log().mean())) if len(shares) else 0.0

    def scores(self, logits: Tensor) -> Tensor:
        """Return logits (V,), of an answer those of the likeliest token alone."""
        if not self.answering:
            return logits
        shares, ids = logits.float().softmax(-1).topk(FEW)
        self.likely.append([(i, round(share, 4)) for i, share in zip(ids.tolist(), shares.tolist(), strict=True)])
        return torch.full_like(logits, -torch.inf).index_fill(-1, ids[:1], 0.0)

    def advance(self, id: int) -> None:
        """Go on by the token that was chosen."""
        self.answering = self.answering or "\n" in self.base.decode([id])


def turned(source: str) -> Iterator[dict[str, str]]:
    """Yield triples whose response is the question and, on the next line, the answer."""
    for t in read_triples(source).good:
        yield {"input": t.context, "prompt": ASK, "answer": f"{t.prompt.strip()}\n{t.response.strip()}"}


def asked(asker: Base, texts: Sequence[str], *, each: int, seed: int) -> Iterator[tuple[str, str, str, Turn]]:
    """Yield (text, question, answer, what was likely) of each text's different questions."""
    prompts = [chat_prompt(asker.tokenizer, full_text(text, ASK)) for text in texts for _ in range(each)]
    turns = [Turn(asker) for _ in prompts]
    said = reader_of(asker).collect(None, prompts, None, [MOST] * len(prompts), Sampling(0.8, 0.95, seed), guides=turns)
    known: set[tuple[str, str]] = set()
    for n, (ids, turn) in enumerate(zip(said, turns, strict=True)):
        question, _, answer = (part.strip() for part in asker.decode(ids).partition("\n"))
        key = (texts[n // each], question.lower())
        if len(ids) < MOST and len(question.split()) >= 3 and answer and key not in known:
            known.add(key)
            yield texts[n // each], question, answer, turn


def contexts(source: str, base: Base, least: int, most: int) -> dict[str, Triple | None]:
    """Return a source's passages of `least` to `most` tokens, each with the first question that the source has about it."""
    first: dict[str, Triple | None] = dict.fromkeys(documents(source))
    for triple in reversed(read_triples(source).good):
        first[triple.context] = triple
    return {text: own for text, own in first.items() if least <= len(base.encode(text)) <= most}


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
    asking.add_argument("--each", type=int, default=5, help="questions drawn about a passage")
    asking.add_argument("--sure", type=float, default=0.55, help="least mean probability of an answer's tokens")
    asking.add_argument("--together", type=int, default=16, help="passages at once")
    asking.add_argument("--most", type=int, help="passages; none: all")
    asking.add_argument("--device", default="cpu")
    a = parser.parse_args()
    a.out.parent.mkdir(parents=True, exist_ok=True)
    if a.verb == "turn":
        a.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in turned(a.source)), encoding="utf-8")
        return
    asker, made = load_base(dtype=torch.bfloat16, device=a.device).tuned(a.asker), 0
    own = {text: triple for source in a.sources for text, triple in contexts(source, asker, 40, 230).items()}
    texts = list(own)[: a.most]
    batches = [sorted(texts[at : at + a.together], key=len) for at in range(0, len(texts), a.together)]
    with a.out.open("w", encoding="utf-8") as file:
        for seed, batch in enumerate(track(batches, "asking", disable=not sys.stderr.isatty())):
            rows = [(t.context, {"prompt": t.prompt, "answer": t.response}) for text in batch if (t := own[text])]
            for text, question, answer, turn in asked(asker, batch, each=a.each, seed=seed):
                if turn.sure >= a.sure:
                    rows.append((text, {"prompt": question, "answer": answer, "likely": turn.likely}))
                    made += 1
            file.writelines(json.dumps({"input": text, **row}, ensure_ascii=False) + "\n" for text, row in rows)
            file.flush()
    print(f"{made} questions in {a.out}")


if __name__ == "__main__":
    main()
