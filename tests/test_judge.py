"""Judging, with a fake endpoint: order, ties, the record, and what happens when it fails."""

import hashlib
import json
from types import SimpleNamespace

import pytest
from tiny import one_line

from icae.errors import ICAEError
from icae.judge import Item, Judge, agreement, verdict

openai = pytest.importorskip("openai")
ITEM = Item("The ferry is late.", "What is late?", "the ferry", "the bell")


class Endpoint:
    """An OpenAI client that says what it is told to, and remembers what it was asked."""

    def __init__(self, *replies, fail_after=None):
        self.replies, self.asked, self.fail_after = list(replies), [], fail_after
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self.create))

    def create(self, *, model, messages, max_tokens, temperature):
        if self.fail_after is not None and len(self.asked) >= self.fail_after:
            raise openai.OpenAIError("no more\nmoney")
        self.asked.append((model, messages[-1]["content"]))
        reply = self.replies.pop(0) if self.replies else "Verdict: tie"
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content=reply))])


def judge(tmp_path, endpoint, url=None):
    return Judge("wise", tmp_path / "record" / "judge.jsonl", client=endpoint, url=url)


def prefers(answer):
    """Replies of a judge that prefers one answer, wherever it stands."""

    class Fair(Endpoint):
        def create(self, **asked):
            text = asked["messages"][-1]["content"]
            first = text.index(answer) < text.index("[Answer 2]") and text.index(answer) > text.index("[Answer 1]")
            self.replies = [f"Because.\nVerdict: {1 if first else 2}"]
            return super().create(**asked)

    return Fair()


def test_both_orders_are_asked_and_the_second_swaps_the_answers(tmp_path):
    endpoint = Endpoint()
    judge(tmp_path, endpoint).compare("pair", [ITEM])
    (_, plain), (_, swapped) = endpoint.asked
    assert plain.index("the ferry\n\n[Answer 2]\nthe bell") and swapped.index("the bell\n\n[Answer 2]\nthe ferry")
    assert ITEM.context in plain and ITEM.prompt in plain


def test_a_fair_judge_decides_and_one_that_prefers_a_place_gives_a_tie(tmp_path):
    assert judge(tmp_path / "a", prefers("the ferry\n")).compare("p", [ITEM]) == ([1], 0)
    assert judge(tmp_path / "b", prefers("the bell\n")).compare("p", [ITEM]) == ([-1], 0)
    assert judge(tmp_path / "c", Endpoint("Verdict: 1", "Verdict: 1")).compare("p", [ITEM]) == ([0], 0)
    assert judge(tmp_path / "d", Endpoint("Verdict: 1", "Verdict: tie")).compare("p", [ITEM]) == ([0], 0)
    assert judge(tmp_path / "e", Endpoint("who knows", "Verdict: 2")).compare("p", [ITEM]) == ([0], 1)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Verdict: 1", 1),
        ("x\n**Verdict: 2**", 2),
        ("VERDICT: Tie.", 0),
        ("Verdict: 1 ... no, Verdict: 2", 2),
        ("1", None),
        ("Verdict: 12", None),
    ],
)
def test_verdicts_are_read_from_the_last_word(reply, expected):
    assert verdict(reply) == expected


def test_agreement_is_one_only_where_both_orders_prefer_the_same_answer():
    decided = {(p, s): agreement(p, s) for p in (1, 2, 0, None) for s in (1, 2, 0, None)}
    assert {pair for pair, v in decided.items() if v} == {(1, 2), (2, 1)}
    assert decided[1, 2] == 1 and decided[2, 1] == -1


def test_a_run_goes_on_without_asking_again(tmp_path):
    items = [ITEM, Item("c", "p", "x", "y")]
    broken = Endpoint("Verdict: 1", "Verdict: 2", "Verdict: 1", fail_after=3)
    with pytest.raises(ICAEError) as error:
        judge(tmp_path, broken).compare("p", items)
    one_line(error.value, "3 replies are kept", "no more money")
    rows = [json.loads(line) for line in (tmp_path / "record" / "judge.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all({"key", "model", "kind", "pair", "swapped", "messages", "reply"} <= r.keys() for r in rows)
    rest = Endpoint("Verdict: 2")
    assert judge(tmp_path, rest).compare("p", items) == ([1, 1], 0)
    assert len(rest.asked) == 1


def test_another_endpoint_is_asked_anew_though_its_model_has_the_same_name(tmp_path):
    assert judge(tmp_path, Endpoint("Verdict: 1", "Verdict: 2")).compare("p", [ITEM]) == ([1], 0)
    other = Endpoint("Verdict: 2", "Verdict: 1")
    assert judge(tmp_path, other, "http://there/v1").compare("p", [ITEM]) == ([-1], 0) and len(other.asked) == 2
    assert judge(tmp_path, Endpoint(fail_after=0), "http://there/v1").compare("p", [ITEM]) == ([-1], 0)
    assert judge(tmp_path, Endpoint(fail_after=0)).compare("p", [ITEM]) == ([1], 0)


def test_an_endpoint_of_the_environment_is_one_as_well(tmp_path, monkeypatch):
    assert judge(tmp_path, Endpoint("Verdict: 1", "Verdict: 2")).compare("p", [ITEM]) == ([1], 0)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://there/v1")
    assert judge(tmp_path, Endpoint("Verdict: 2", "Verdict: 1")).compare("p", [ITEM]) == ([-1], 0)


def test_a_record_without_an_endpoint_keeps_its_keys(tmp_path):
    judge(tmp_path, Endpoint("x")).ask("m", [("A text.", "What?")], 8)
    (row,) = [json.loads(line) for line in (tmp_path / "record" / "judge.jsonl").read_text().splitlines()]
    assert row["key"] == hashlib.sha256(json.dumps(["m", row["messages"], 8]).encode()).hexdigest()[:32]


def test_a_half_character_in_a_reply_is_replaced(tmp_path):
    said = judge(tmp_path, Endpoint("a \ud83d bell")).ask("m", [("A text.", "What?")], 8)
    assert said == ["a ? bell"] == judge(tmp_path, Endpoint(fail_after=0)).ask("m", [("A text.", "What?")], 8)


def test_a_line_cut_short_by_a_kill_is_asked_again_and_a_damaged_one_is_named(tmp_path):
    judge(tmp_path, Endpoint("Verdict: 1", "Verdict: 2")).compare("p", [ITEM])
    record = tmp_path / "record" / "judge.jsonl"
    record.write_text(record.read_text()[:-20])
    again = Endpoint("Verdict: 2")
    assert judge(tmp_path, again).compare("p", [ITEM]) == ([1], 0) and len(again.asked) == 1
    assert len(record.read_text().splitlines()) == 2
    record.write_bytes(record.read_bytes() + '{"key": "x", "reply": "caf\u00e9"'.encode()[:-2])  # cut inside a character
    assert judge(tmp_path, Endpoint()).compare("p", [ITEM]) == ([1], 0) and len(record.read_text().splitlines()) == 2
    record.write_text(other := f"no json\n{record.read_text()}and a line without an end")
    with pytest.raises(ICAEError) as error:
        judge(tmp_path, Endpoint())
    one_line(error.value, "line 1", "judge.jsonl")
    assert record.read_text() == other  # what is no record is left alone


@pytest.mark.parametrize("choices", [None, []])
def test_what_is_no_reply_ends_as_a_failure(tmp_path, choices):
    completions = SimpleNamespace(create=lambda **_: SimpleNamespace(choices=choices))
    with pytest.raises(ICAEError) as error:
        judge(tmp_path, SimpleNamespace(chat=SimpleNamespace(completions=completions))).compare("p", [ITEM])
    one_line(error.value, "the endpoint of 'wise' failed", "0 replies are kept")


def test_rivals_answer_from_the_full_text_and_are_kept(tmp_path):
    endpoint = Endpoint("the ferry", "a bell")
    asked = [("The ferry is late.", "What is late?"), ("The bell rang.", "What rang?")]
    assert judge(tmp_path, endpoint).ask("rival", asked, 8) == ["the ferry", "a bell"]
    assert endpoint.asked[0] == ("rival", "The ferry is late.\n\nWhat is late?")
    assert judge(tmp_path, Endpoint(fail_after=0)).ask("rival", asked, 8) == ["the ferry", "a bell"]


def test_without_an_endpoint_the_mend_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ICAEError) as error:
        Judge("wise", tmp_path / "j.jsonl")
    one_line(error.value, "OPENAI_API_KEY", "--judge-url")


def test_tables_are_decided_by_the_judge_where_one_is_set(tmp_path, base):
    from tiny import LINES, make_icae

    from icae.experiments import table4
    from icae.experiments.context import Context

    make_icae(base, stirred=0.05).save_pretrained(tmp_path / "main")
    rows = [{"input": line, "prompt": f"What of {line.split()[1]}?", "answer": line.split()[2]} for line in LINES]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    endpoint = Endpoint()
    context = Context(base, {"main": tmp_path / "main"}, qa=tmp_path / "qa.jsonl", judge=judge(tmp_path, endpoint), rivals=["rival"])
    table = table4.run(context, samples=3, max_new_tokens=4)
    assert [r["by"] for r in table.rows] == ["wise"] * 3
    assert "rival" in table.rows[2]["pair"] and table.rows[2]["likelihood_second"] is None
    assert table.rows[0]["tie"]["value"] == 1
    assert context.identity(["judge"])["judge"] == {"model": "wise", "rivals": ["rival"]}
    context.judge = judge(tmp_path, endpoint, "http://there/v1")
    assert context.identity(["judge"])["judge"] == {"model": "wise", "rivals": ["rival"], "url": "http://there/v1"}
    assert not any("--judge" in n for n in table.notes)
