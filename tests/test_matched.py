"""Questions drawn so that their kinds and the lengths of their answers are people's."""

import json
import random
from collections import Counter

import pytest
from tiny import load_script

from icae.errors import ICAEError
from icae.triples import Triple, load_triples


@pytest.fixture
def script():
    return load_script("configs/matched.py")


def asked(kind, words, number):
    answer = " ".join(["so"] * words)
    return Triple(f"text {number}", f"{kind} is it, {number}?", answer, (answer,))


def test_kinds_and_lengths_come_to_have_peoples_shares(script):
    people = [asked("who", 2, n) for n in range(60)] + [asked("what", 3, n) for n in range(22)] + [asked("what", 12, n) for n in range(18)]
    many = (
        [asked("what", 3, n) for n in range(3000)] + [asked("who", 2, n) for n in range(1500)] + [asked("what", 20, n) for n in range(900)]
    )
    drawn = script.matched(many, people, 1000, random.Random(0))
    shares = {c: n / len(drawn) for c, n in Counter(map(script.cell, drawn)).items()}
    assert len(drawn) == pytest.approx(1000, rel=0.1)
    assert shares == pytest.approx({("who", 1): 0.6, ("what", 2): 0.22, ("what", 6): 0.18}, abs=0.05)


def test_where_there_are_too_few_of_a_kind_all_of_them_come_and_more_of_the_others(script):
    people = [asked("who", 2, n) for n in range(50)] + [asked("when", 1, n) for n in range(50)]
    many = [asked("who", 2, n) for n in range(100)] + [asked("when", 1, n) for n in range(5000)] + [asked("is", 1, n) for n in range(99)]
    people[0] = asked("who", 20, 0)  # an answer's length that the others do not have
    drawn = Counter(map(script.cell, script.matched(many, people, 600, random.Random(0))))
    assert drawn["who", 1] == 100 and 400 < drawn["when", 0] < 600 and ("other", 0) not in drawn


def test_peoples_own_questions_about_the_same_contexts_stand_beside_them(script, tmp_path, capsys):
    def lines(rows):
        return "".join(json.dumps({"input": t.context, "prompt": t.prompt, "answer": t.response}) + "\n" for t in rows)

    many, people = tmp_path / "many.jsonl", tmp_path / "people.jsonl"
    many.write_text(lines(asked("who", 2, n) for n in range(20)))
    people.write_text(lines([asked("who", 2, 3), asked("who", 2, 99), asked("who", 20, 98)]))
    script.main(str(many), str(people), tmp_path / "out.jsonl", 100)
    made = load_triples(str(tmp_path / "out.jsonl"))
    assert sorted(t.context for t in made) == sorted([*(f"text {n}" for n in range(20)), "text 3"])
    assert "20 of them, and 1 of people's, about 20 contexts" in capsys.readouterr().out
    script.main(str(many), str(people), tmp_path / "half.jsonl", 10)
    script.main(str(many), str(people), tmp_path / "rest.jsonl", 100, without=[str(tmp_path / "half.jsonl")])
    half, rest = ({t.context for t in load_triples(str(tmp_path / name))} for name in ("half.jsonl", "rest.jsonl"))
    assert half and rest and not half & rest and len(half | rest) == 20
    with pytest.raises(ICAEError, match="nothing of .* is left"):
        script.main(str(many), str(people), tmp_path / "none.jsonl", 100, without=[str(tmp_path / "out.jsonl")])
    script.main(str(many), str(people), tmp_path / "other.jsonl", 10, seed=5)
    assert {t.context for t in load_triples(str(tmp_path / "other.jsonl"))} != half
