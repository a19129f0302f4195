"""Questions made about any text: what is asked, answered, and kept."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch
from tiny import LINES, load_script

from icae.chat import chat_prompt
from icae.reader import GREEDY

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(CONFIGS))
    module = load_script("configs/asked.py")
    monkeypatch.delitem(sys.modules, "cloze", raising=False)
    return module


@pytest.fixture
def triples(tmp_path):
    path = tmp_path / "people.jsonl"
    rows = [{"input": line, "prompt": f"what is in line {i}?", "answer": line.split()[1]} for i, line in enumerate(LINES)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_turned_triples_answer_with_the_question(script, triples):
    rows = list(script.turned(triples))
    assert [(row.input, row.answer) for row in rows] == [(line, f"what is in line {i}?") for i, line in enumerate(LINES)]
    assert {row.prompt for row in rows} == {script.ASK}


def test_a_source_of_triples_brings_its_own_first(script, triples):
    texts, own = script.texts_of(triples, 0, random.Random(0))
    assert texts == LINES and [row.input for row in own] == LINES
    texts, own = script.texts_of(triples, 2, random.Random(0))
    assert len(texts) == 2 and [row.input for row in own] == [line for line in LINES if line in texts]


def test_generation_of_a_batch_is_that_of_its_rows_and_unfinished_ones_are_none(script, base):
    prompts = [chat_prompt(base.tokenizer, words) for words in ("Why?", LINES[0], "Who lit the lamp?")]
    together = script.generated(base, prompts, 12, GREEDY)
    assert together == [script.generated(base, [prompt], 12, GREEDY)[0] for prompt in prompts]
    assert all(len(row) < 12 for row in together)
    assert script.generated(base, prompts, 1, GREEDY) == [[], [], []] and script.generated(base, [], 12, GREEDY) == []


def test_only_new_questions_with_sure_answers_are_kept(script, base, monkeypatch):
    said = iter([["who lit the lamp?", "who lit the lamp?", "short?", "what is in line 1?"], ["the master", "", "no"]])
    monkeypatch.setattr(
        script, "generated", lambda base, prompts, most, sampling: [base.encode(text) for text in next(said)][: len(prompts)]
    )
    monkeypatch.setattr(script, "sureness", lambda base, prompts, answers: [0.9] * len(prompts))
    known = {(LINES[1], "what is in line 1?")}
    rows = list(script.asked(base, base, LINES[:1] + LINES[1:2], known, each=2, sure=0.6, together=8))
    assert [(row.input, row.prompt, row.answer) for row in rows] == [(LINES[0], "who lit the lamp?", "the master")]
    said = iter([["who lit it now?", "what was lit?"], ["the master", "a lamp"]])
    monkeypatch.setattr(script, "sureness", lambda base, prompts, answers: [0.5, 0.7])
    assert [row.answer for row in script.asked(base, base, LINES[:1], set(), each=2, sure=0.6, together=8)] == ["a lamp"]


def test_sureness_is_the_mean_probability_of_an_answers_tokens(script, base):
    prompt, answer = chat_prompt(base.tokenizer, "Why?"), base.encode("a lamp")
    with torch.no_grad():
        logits = base.model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    expected = torch.stack([logits[len(prompt) - 1 + n, i] for n, i in enumerate(answer)]).mean().exp()
    assert script.sureness(base, [prompt], [answer]) == pytest.approx([float(expected)], rel=1e-4)
