"""Make questions out of any text, with no model: `python configs/cloze.py OUT.jsonl TRIPLES SOURCE SHARE [SOURCE SHARE ...]`.

Few questions are at hand that somebody asked; a sentence with a hole is one, too (Lewis et al., arXiv 1906.04980; Dhingra et al., arXiv
1804.00720). A source is a folder of .txt or a .jsonl of triples, of which only the contexts are taken. Each triple asks about a passage of
40 to 280 words: which name, number or phrase is missing in one of its sentences (as a gap, or as a question), what follows some words,
or which sentence holds them. Answers are always the passage's own words.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from icae.data import documents

NAME = re.compile(r"(?:[A-Z][\w’'-]+(?: (?:of|the|de|and) (?=[A-Z]))? ?){1,4}(?<! )")
NUMBER = re.compile(r"\b\d[\d,.]*\d\b|\b\d\b")
SENTENCE = re.compile(r"(?<=[.!?])[\"”’)]*\s+(?=[\"“‘(]?[A-Z0-9])")
GAPS = ("Fill in the gap: {}", "Which words are missing? {}", "What does ____ stand for in this sentence? {}", "Complete: {}")
FOLLOWS = ('What comes right after "{}"?', 'Which words follow "{}" in the text?', 'How does "{}" go on?')
HOLDS = ('Quote the sentence that mentions "{}".', 'Where does the text speak of "{}"?')


def passages(source: str, chance: random.Random) -> Iterator[str]:
    """Yield passages for ever: a triple's whole context, or some words in a row of a text."""
    texts = list(dict.fromkeys(documents(source)))
    if source.endswith(".jsonl"):
        while True:
            yield chance.choice(texts)
    sizes = [len(t) for t in texts]
    while True:
        text = chance.choices(texts, sizes)[0]
        begin = chance.randrange(max(1, len(text) - 2000))
        words = re.findall(r"\S+\s*", text[begin : begin + 2400])[1:]
        yield "".join(words[: chance.randint(40, 280)]).strip()


def question(passage: str, chance: random.Random) -> tuple[str, str] | None:
    """Return a prompt and its answer; none where the passage gives nothing to ask."""
    sentences = [s.strip() for s in SENTENCE.split(passage) if 6 <= len(s.split()) <= 45]
    if not sentences:
        return None
    sentence = chance.choice(sentences)
    words = sentence.split()
    kind = chance.random()
    if kind < 0.15:
        begin = chance.randrange(len(words) - 5)
        cue, rest = words[begin : begin + 4], passage.partition(" ".join(words[begin : begin + 4]))[2].split()
        return (chance.choice(FOLLOWS).format(" ".join(cue)), " ".join(rest[: chance.randint(3, 12)])) if len(rest) > 2 else None
    if kind < 0.25:
        size = chance.randint(2, 4)
        begin = chance.randrange(len(words) - size)
        return chance.choice(HOLDS).format(" ".join(words[begin : begin + size])), sentence
    spans = [m.span() for m in NUMBER.finditer(sentence)] + [m.span() for m in NAME.finditer(sentence) if m.start()]
    if not spans or kind > 0.9:  # any few words
        size = chance.randint(1, 4)
        begin = chance.randrange(1, len(words) - size)
        start = len(" ".join(words[:begin])) + 1
        spans = [(start, start + len(" ".join(words[begin : begin + size])))]
        sentence = " ".join(words)
    start, end = chance.choice(spans)
    answer, before, after = sentence[start:end].strip(" ,.;:"), sentence[:start].strip(), sentence[end:].strip()
    if not answer:
        return None
    if kind < 0.6:
        asks = ("how many" if chance.random() < 0.5 else "when") if answer[0].isdigit() else chance.choice(("who", "what", "where"))
        if chance.random() < 0.5:
            return f"{asks} {after or before}".rstrip(".!;:, ") + "?", answer
        return f"{before} {asks}{'' if after[:1] in ',.;:!?' else ' '}{after}".rstrip(".!;:, ") + "?", answer
    return chance.choice(GAPS).format(f"{before} ____{'' if after[:1] in ',.;:!?' else ' '}{after}"), answer


def main() -> None:
    """Write as many triples as asked for, from the sources by their shares."""
    out, count, rest = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    chance = random.Random(0)
    sources = [passages(name, chance) for name in rest[::2]]
    shares = [float(share) for share in rest[1::2]]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        made = 0
        while made < count:
            passage = next(chance.choices(sources, shares)[0])
            asked = question(passage, chance)
            if asked is not None and asked[1].strip() and len(asked[0].split()) > 3:
                file.write(json.dumps({"input": passage, "prompt": asked[0], "answer": asked[1]}, ensure_ascii=False) + "\n")
                made += 1


if __name__ == "__main__":
    main()
