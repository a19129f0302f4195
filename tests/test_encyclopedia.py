"""Paragraphs of an encyclopedia, and questions about them that bring along what else was likely."""

import bz2
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from tiny import LINES, load_script

from icae.triples import load_triples, softened

CONFIGS = Path(__file__).parents[1] / "configs"
PAGE = "<page><title>{title}</title><ns>{ns}</ns><text bytes='1'>{text}</text></page>"


@pytest.fixture
def paragraphs(monkeypatch):
    pytest.importorskip("mwparserfromhell")
    return load_script("configs/encyclopedia.py")


@pytest.fixture
def studied(monkeypatch):
    monkeypatch.syspath_prepend(str(CONFIGS))
    module = load_script("configs/studied.py")
    for name in ("asked", "cloze"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return module


def test_articles_are_those_of_the_dump_and_no_redirects(tmp_path):
    script = load_script("configs/encyclopedia.py")
    pages = [
        PAGE.format(title="A &amp; B", ns=0, text="Some &lt;b&gt;text&lt;/b&gt;."),
        PAGE.format(title="Gone", ns=0, text="#redirect [[A]]"),
        PAGE.format(title="Talk:A", ns=1, text="Chatter."),
    ]
    with zipfile.ZipFile(tmp_path / "gensim-1.whl", "w") as wheel:
        wheel.writestr("gensim/test/test_data/enwiki-latest-pages-articles1.xml-shortened.bz2", bz2.compress("".join(pages).encode()))
    assert list(script.articles(tmp_path / "gensim-1.whl")) == [("A & B", "Some <b>text</b>.")]


def test_passages_are_whole_sentences_in_a_row(base, monkeypatch):
    script = load_script("configs/encyclopedia.py")
    monkeypatch.setattr(script, "LEAST", 4)
    most = max(len(base.encode(" ".join(LINES[i : i + 2]))) for i in (0, 2))
    assert list(script.passages(" ".join(LINES), base, most)) == [" ".join(LINES[:2]), " ".join(LINES[2:])]
    assert script.grams("one two three four five six seven eight, nine") == {
        "one two three four five six seven eight",
        "two three four five six seven eight nine",
    }


def test_only_running_text_is_taken(paragraphs):
    long = (
        "The '''bell''' rings [[noon|twice]] before noon<ref>Ledger, p. 3.</ref>, and the ferry (; {{lang|fr|bac}}) is late" + " again" * 30
    )
    markup = f"== Bells ==\n* {long}.\n{long}.\n{{| class=x\n| {long}.\n|}}\nShort.\n{long} and has no end"
    made = list(paragraphs.paragraphs(markup))
    assert made and all(text.startswith("The bell rings twice before noon, and the ferry") and text.endswith("again.") for text in made)


def test_turned_triples_ask_and_answer(studied, tmp_path):
    path = tmp_path / "people.jsonl"
    path.write_text(json.dumps({"input": LINES[0], "prompt": " who? ", "answer": "the master"}) + "\n")
    assert list(studied.turned(str(path))) == [{"input": LINES[0], "prompt": studied.ASK, "answer": "who?\nthe master"}]


def test_answers_are_the_likeliest_and_tell_what_else_was(studied, base):
    turn = studied.Turn(base)
    logits = base.model(torch.tensor([base.encode(LINES[0])])).logits[0, -1].detach()
    assert turn.scores(logits) is logits and not turn.likely and turn.sure == 0.0
    turn.advance(next(i for i in range(320) if "\n" in base.decode([i])))
    assert turn.scores(logits).argmax() == logits.argmax() and turn.scores(logits).isfinite().sum() == 1
    (place, _), best = turn.likely, logits.softmax(-1).max()
    assert place[0] == (int(logits.argmax()), round(float(best), 4)) and len(place) == studied.FEW
    assert turn.sure == pytest.approx(float(best), abs=1e-4)


def test_passages_come_with_the_first_question_about_them(studied, base, tmp_path):
    texts, people = tmp_path / "texts.jsonl", tmp_path / "people.jsonl"
    texts.write_text("".join(json.dumps({"title": "x", "text": line}) + "\n" for line in LINES[:2]))
    people.write_text("".join(json.dumps({"input": LINES[2], "prompt": f"{n}?", "answer": "yes"}) + "\n" for n in "ab"))
    assert studied.contexts(str(texts), base, 2, 100) == {LINES[0]: None, LINES[1]: None}
    assert {text: t.prompt for text, t in studied.contexts(str(people), base, 2, 100).items()} == {LINES[2]: "a?"}
    assert studied.contexts(str(texts), base, 2, 3) == {}


def test_what_was_likely_is_read_and_mixed_with_the_response(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text(json.dumps({"input": LINES[0], "prompt": "who?", "answer": "x", "likely": [[[5, 0.6], [9, 0.2]], [[1, 0.9]]]}) + "\n")
    (triple,) = load_triples(str(path))
    assert triple.likely == (((5, 0.6), (9, 0.2)), ((1, 0.9),))
    mixed = softened([5, 1], triple.likely, 0.5)
    assert [i for i, _ in mixed[0]] == [5, 5, 9] and [p for _, p in mixed[0]] == pytest.approx([0.5, 0.375, 0.125])
    assert sum(p for _, p in mixed[1]) == pytest.approx(1)
    assert softened([5], triple.likely, 0.5) == mixed[:1]  # a response that was cut
    assert softened([5, 2], triple.likely, 0.5) == softened([5, 1], triple.likely, 0.0) == softened([5, 1], (), 0.5) == []
