"""Gather paragraphs of Wikipedia that a package brings along: `python configs/encyclopedia.py OUT.jsonl [WITHOUT.jsonl ...]`.

gensim's wheel holds a hundred whole articles in MediaWiki's markup to test its readers with (CC BY-SA, beginning with A). They are cut
into passages of whole sentences, of a segment's length at most, in one paragraph in four of nearly two. Each line has `title` and `text`.
What shares eight words in a row with a context of a WITHOUT file, or is of an article that one of its rows has as `title`, is left out, so
that held-out texts stay so.

    pip install mwparserfromhell && pip download --no-deps --dest runs/gensim gensim
"""

from __future__ import annotations

import bz2
import html
import json
import random
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

from icae.base import Base, load_base

WHEELS = Path("runs/gensim")
DUMP = re.compile(r"enwiki-latest-pages-articles.*-shortened\.bz2$")
SENTENCE = re.compile(r'(?<=[.!?])\s+(?=["“(]?[A-Z0-9])')
UNREAD = re.compile(
    r"<ref[^>/]*/>|<ref.*?</ref>|<!--.*?-->|<(gallery|math|source|timeline)\b.*?</\1>|\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\]]*\]\])*\]\]",
    re.DOTALL,
)
LEAST, MOST, LONG = 40, 128, 230
"""Tokens of a passage; one paragraph in four is cut at the last."""


def articles(wheel: Path) -> Iterator[tuple[str, str]]:
    """Yield title and markup of every article in the dump that a wheel holds."""
    with zipfile.ZipFile(wheel) as files:
        dump = next(name for name in files.namelist() if DUMP.search(name))
        pages = bz2.decompress(files.read(dump)).decode()
    for page in re.findall(r"<page>(.*?)</page>", pages, re.DOTALL):
        title, text = re.search(r"<title>(.*?)</title>", page), re.search(r"<text[^>]*>(.*?)</text>", page, re.DOTALL)
        if title and text and "<ns>0</ns>" in page and not text[1].upper().startswith("#REDIRECT"):
            yield html.unescape(title[1]), html.unescape(text[1])


def paragraphs(markup: str) -> Iterator[str]:
    """Yield an article's paragraphs of running text."""
    import mwparserfromhell

    measured = re.sub(r"\{\{(?:convert|cvt)\|([^|}]*)\|([^|}]*)[^}]*\}\}", r"\1 \2", UNREAD.sub("", markup))
    for line in mwparserfromhell.parse(measured).strip_code(normalize=True, collapse=True).split("\n"):
        text = re.sub(r"\s+", " ", re.sub(r"\((?:[;,]? )", "(", line.replace("()", ""))).strip()
        running = len(text) >= 150 and text[0] not in "*#|!{:;=" and re.search(r"[.!?][\"”')]*$", text)
        if running and not any(mark in text for mark in ("|", "{{", "[[")):
            yield text


def passages(text: str, base: Base, most: int) -> Iterator[str]:
    """Yield a paragraph's sentences, as many in a row as have at most `most` tokens together."""
    begun: list[str] = []
    for sentence in [*SENTENCE.split(text), None]:
        if sentence is not None and len(base.encode(" ".join([*begun, sentence]))) <= most:
            begun.append(sentence)
            continue
        made = " ".join(begun)
        if LEAST <= len(base.encode(made)) <= most:
            yield made
        begun = [sentence] if sentence else []


def grams(text: str) -> set[str]:
    """Return every eight words in a row."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + 8]) for i in range(len(words) - 7)}


def main() -> None:
    """Write the passages, shuffled."""
    out, lines = Path(sys.argv[1]), [line for name in sys.argv[2:] for line in Path(name).read_text(encoding="utf-8").splitlines()]
    held_out = [json.loads(line) for line in lines if line.strip()]
    unwanted, titles = set().union(*(grams(row["input"]) for row in held_out)), {row.get("title") for row in held_out}
    wheel = next(WHEELS.glob("gensim-*.whl"), None)
    if wheel is None:
        sys.exit(f"no gensim-*.whl in {WHEELS}; this file's first lines tell how to get it")
    base, chance = load_base(), random.Random(0)
    made = [
        {"title": title, "text": passage}
        for title, markup in articles(wheel)
        for text in paragraphs(markup)
        for passage in passages(text, base, MOST if chance.random() < 0.75 else LONG)
        if title not in titles and not grams(passage) & unwanted
    ]
    chance.shuffle(made)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), encoding="utf-8")
    print(f"{len(made)} passages in {out}")


if __name__ == "__main__":
    main()
