import json
from types import SimpleNamespace

import pytest
import torch
from test_cli import icae  # noqa: F401 - a fixture
from tiny import LINES, one_line, save_base

from icae.base import load_base
from icae.chat import chat_prompt, full_text
from icae.decoder import Decoder
from icae.errors import ICAEError
from icae.pwc import teachers
from icae.pwc.build import Budget, Ledger, build
from icae.pwc.filters import refusal, repeats, support
from icae.pwc.passages import chosen, is_test, passages
from icae.pwc.prompts import GENERAL, SPECIFIC, Prompt, plan, question, replied, request
from icae.pwc.teachers import BaseTeacher, EndpointTeacher, Reply, Said, said_of
from icae.triples import load_triples

# ---- passages ----


def test_passages_are_neighbouring_paragraphs_of_one_document():
    documents = ["one two\nthree\n\nfour five\n\n" + "x" * 99 + "\n\nsix seven eight nine\n\nten", "eleven twelve thirteen"]
    assert list(passages(documents, least=15, most=60)) == ["one two three\nfour five", "six seven eight nine", "eleven twelve thirteen"]


def test_lists_and_markup_are_no_passages():
    assert list(passages(["1. 2. 3. ... 4 | 5 | 6 | 7 # 8 # 9", "Plain words are fine here."], least=10, most=60)) == [
        "Plain words are fine here."
    ]


HINDI = "हिन्दी भाषा में लिखी हुई पुस्तकें पुरानी हैं।"


def test_marks_on_letters_are_letters():
    assert list(passages([HINDI], least=10, most=200)) == [HINDI]
    assert refusal(HINDI, "specific", "?", HINDI, True) is None
    assert refusal("The door is green.", "specific", "?", HINDI, True) == "unsupported"


def test_more_passages_begin_with_the_same_ones_and_none_comes_twice():
    texts = [f"text {i % 30}" for i in range(60)]
    few, many = chosen(texts, 5, 0), chosen(texts, 99, 0)
    assert many[:5] == few and sorted(many) == sorted(set(texts)) and chosen(texts, 5, 1) != few
    assert chosen(reversed(texts), 5, 0) == few


def test_a_text_falls_on_one_side_whatever_else_there_is():
    texts = [f"text {i}" for i in range(2000)]
    assert 0.08 < sum(is_test(t, 0.1) for t in texts) / 2000 < 0.12
    assert not any(is_test(t, 0.0) for t in texts) and all(is_test(t, 1.0) for t in texts)
    assert {t for t in texts if is_test(t, 0.05)} < {t for t in texts if is_test(t, 0.2)}


# ---- prompts ----


def test_a_plan_is_the_texts_own_and_has_no_kind_twice_but_questions():
    kinds = [p.kind for p in plan("a text", 15)]
    assert len(kinds) == 15 and set(kinds) == {*GENERAL, *SPECIFIC, "asking"} and kinds.count("asking") == 3
    assert plan("a text", 6) == plan("a text", 6) != plan("another", 6)
    assert len(plan("a text", 99)) == 15
    assert len({p.text for p in plan("a text", 15)}) == 15
    assert {p.kind for text in ("a", "b", "c") for p in plan(text, 2, ["title", "summary", "tone"])} == {"title", "summary", "tone"}


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ('Question: "Who painted the door?" I think', "Who painted the door?"),
        ("1", None),
        ("Who?", None),
        ("The door is green.", None),
        ("What colour\nis the door?", "What colour is the door?"),
    ],
)
def test_a_question_is_found_in_what_was_said(said, found):
    assert question(said) == found


def test_a_reply_is_read_as_far_as_it_holds():
    good = {"kind": "title", "prompt": "Name it.", "answer": "Doors"}
    assert replied("Sure:\n" + json.dumps([good, {"prompt": "x"}, 3, {"prompt": "q", "answer": "a"}]) + "\nDone.") == [
        ("title", "Name it.", "Doors"),
        ("specific", "q", "a"),
    ]
    assert replied(f"As you asked [in your words]: {json.dumps([good])} [end]") == [("title", "Name it.", "Doors")]
    for kind in (["title"], {"title": 1}, None, 3):
        assert replied(json.dumps([{**good, "kind": kind}])) == [("specific", "Name it.", "Doors")]
    for broken in ("", "no", "[{]", '{"a": 1}', "[1, 2"):
        assert replied(broken) == []
    assert "<text>\nabc\n</text>" in request("abc") and all(kind in request("abc") for kind in GENERAL)


# ---- filters ----

TEXT = "The harbour master keeps a brass lamp in the window, and lights it whenever fog comes in from the western bank."


@pytest.mark.parametrize(
    ("kind", "answer", "ended", "reason"),
    [
        ("specific", "A brass lamp.", True, None),
        ("specific", " ... ", True, "empty"),
        ("specific", "A brass lamp", False, "truncated"),
        ("specific", "the lamp is lit and " * 4, True, "repeated"),
        ("specific", "what does he keep", True, "repeated"),
        ("specific", "Elephants dance through Paris", True, "unsupported"),
        ("specific", "In 1984", True, "unsupported"),
        ("continue", "Elephants dance through Paris", True, None),
        ("rephrase", "Lights burn when the fog rolls over western shores", True, None),
        ("specific", "Yes", True, None),
    ],
)
def test_answers_that_teach_nothing_are_refused(kind, answer, ended, reason):
    assert refusal(TEXT, kind, "What does he keep?", answer, ended) == reason


def test_scripts_without_spaces_are_looked_for_letter_by_letter():
    text = "港口的主人把一盏黄铜灯放在窗边。雾从西岸来的时候,他就点灯。"
    assert refusal(text, "specific", "灯在哪里?", "灯放在窗边", True) is None
    assert refusal(text, "specific", "灯在哪里?", "大象在巴黎跳舞", True) == "unsupported"
    assert support("ประภาคารอยู่ที่ท่าเรือ", "", ["ท่าเรือ"]) == 1.0


def test_support_is_the_share_of_telling_words():
    assert support(TEXT, "", ["lamps", "window"]) == 0.5 + 0.5 * ("lamps"[:5] == "lamp")  # stems are five letters: no plural of four
    assert support(TEXT, "", ["harbours", "western", "paris", "1999"]) == 0.5
    assert repeats(["a"] * 6) and not repeats(["one", "two", "three", "four", "five"])


# ---- the base as teacher ----


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def reader(request, tmp_path_factory):
    return load_base(str(save_base(tmp_path_factory.mktemp("reader") / request.param, request.param)))


def test_the_base_answers_as_it_does_with_the_full_text_alone(reader):
    """A text's keys and values are shared by its prompts, and texts of several lengths answered in one batch; nothing of it may show."""
    texts = [LINES[0], LINES[1] + " " + LINES[2]]
    teacher = BaseTeacher(reader, prompts=15, max_tokens=7)
    replies = dict(teacher.read(texts))
    assert set(replies) == {0, 1}
    decoder, seen = Decoder(reader), 0
    for n, reply in replies.items():
        assert reply.tokens >= len(reply.said) >= 12
        for said in reply.said:
            ids = chat_prompt(reader.tokenizer, full_text(texts[n], said.prompt))
            places, real = torch.arange(len(ids))[None], torch.ones(1, len(ids), dtype=torch.bool)
            made = [step[0] for step in decoder.generate(None, reader.embed(torch.tensor([ids])), places, real, [7])]
            words = reader.decode([i for i in made if i is not None]).strip()
            assert said == said_of(Prompt(said.kind, said.prompt), words, None in made)
            seen += 1
    assert seen >= 24


def test_a_text_without_room_for_an_answer_is_refused(reader):
    long = " ".join(LINES) * 40
    with pytest.raises(ICAEError) as error:
        dict(BaseTeacher(reader, max_tokens=7).read([LINES[0], long]))
    one_line(error.value, "positions", "lower --most")


def test_only_a_continuation_may_be_cut_and_then_ends_with_a_sentence():
    go_on, name = Prompt("continue", "Go on."), Prompt("people", "Who?")
    assert said_of(go_on, 'He left. "Why?" she asked and', False) == Said("continue", "Go on.", 'He left. "Why?"', True)
    assert said_of(go_on, "He left and never", False) == Said("continue", "Go on.", "He left and never", False)
    assert said_of(name, "He left. She", False).ended is False


# ---- building ----


class Scripted:
    """A teacher that says what it is told, and fails when it has said enough."""

    name, together = "scripted", 3

    def __init__(self, fails_after=10**9, said=None, tokens=100):
        self.asked, self.fails_after, self.tokens = [], fails_after, tokens
        self.said = said or (lambda text: [Said("specific", f"What of {text[:8]}?", text[:30], True)])

    def most(self, text):
        return self.tokens

    def read(self, texts):
        for n, text in enumerate(texts):
            if len(self.asked) >= self.fails_after:
                raise ICAEError("the endpoint of 'scripted' failed: no credit")
            self.asked.append(text)
            yield n, Reply(self.said(text), self.tokens)


TEXTS = [f"{i} {LINES[i % 4]}" for i in range(20)]


def test_a_failure_keeps_what_was_paid_for_and_the_next_run_goes_on(tmp_path):
    out = tmp_path / "t.jsonl"
    with pytest.raises(ICAEError) as error:
        build(TEXTS, out, first := Scripted(fails_after=8))
    one_line(error.value, "no credit", "8 texts are kept", "run again")
    kept = len(load_triples(str(out)))
    assert 0 < kept <= 8
    counts = build(TEXTS, out, second := Scripted())
    assert sorted(first.asked + second.asked) == sorted(TEXTS) and counts["texts"] == 20
    assert counts["triples"] + counts["test"] == 20 and counts["stopped"] is None
    build(TEXTS, out, third := Scripted())
    assert third.asked == []


def test_an_output_that_cannot_be_written_is_refused_before_anybody_is_asked(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ICAEError) as error:
        build(TEXTS, tmp_path / "notes.txt" / "t.jsonl", asked := Scripted())
    one_line(error.value, "notes.txt")
    assert asked.asked == []


@pytest.mark.parametrize("name", ["t.jsonl", "t.test.jsonl"])
def test_triples_that_were_not_built_are_never_written_over(tmp_path, name):
    (tmp_path / name).write_text("typed by hand")
    with pytest.raises(ICAEError) as error:
        build(TEXTS, tmp_path / "t.jsonl", asked := Scripted())
    one_line(error.value, name, "another file")
    assert (tmp_path / name).read_text() == "typed by hand" and asked.asked == []


def test_half_characters_in_a_reply_cost_their_own_row_alone(tmp_path):
    reply = '[{"prompt": "Who?", "answer": "a \\ud83d"}, {"prompt": "What?", "answer": "bell"}]'
    assert replied(reply) == [("specific", "What?", "bell")]
    kept = Ledger(tmp_path / "raw.jsonl")
    kept.add("x", "text", Reply([], 1, json.loads('"\\ud83d"')))
    assert Ledger(kept.path).requests == 1


def test_a_kill_in_the_middle_of_a_line_loses_that_line_alone(tmp_path):
    out = tmp_path / "t.jsonl"
    build(TEXTS[:5], out, Scripted())
    raw = out.with_suffix(".raw.jsonl")
    raw.write_bytes(raw.read_bytes()[:-20])
    build(TEXTS[:5], out, again := Scripted())
    assert again.asked == [TEXTS[4]] and len(Ledger(raw).rows) == 5
    raw.write_bytes(other := b"{}\n" + raw.read_bytes() + b"and a line without an end")
    with pytest.raises(ICAEError) as error:
        Ledger(raw)
    one_line(error.value, "line 1")
    assert raw.read_bytes() == other  # what is no ledger is left alone


def test_budgets_are_never_exceeded_and_count_over_all_runs(tmp_path):
    out = tmp_path / "t.jsonl"
    assert build(TEXTS, out, first := Scripted(), Budget(requests=7))["stopped"] == "requests"
    assert build(TEXTS, out, second := Scripted(), Budget(requests=7))["stopped"] == "requests"
    assert (len(first.asked), second.asked) == (7, [])
    counts = build(TEXTS, out, third := Scripted(), Budget(tokens=1250))
    assert counts["stopped"] == "tokens" and counts["tokens"] == 1200 and len(third.asked) == 5
    assert build(TEXTS, out, Scripted(), Budget(minutes=0.0))["stopped"] == "minutes"


def test_all_triples_of_a_text_are_on_one_side_and_each_is_there_once(tmp_path):
    said = [Said("specific", p, "harbour lamp window", True) for p in ("Which?", "which?  ", "What?")]
    said += [Said("specific", "Who?", "nobody else", False), Said("specific", "Where?", "Elephants everywhere", True)]
    texts = [f"{i} {LINES[0]}" for i in range(9)]
    counts = build(texts, tmp_path / "t.jsonl", Scripted(said=lambda _: said), test_share=0.4)
    assert counts["refused"] == {"duplicate": 9, "truncated": 9, "unsupported": 9}
    sides = [{t.context for t in load_triples(str(tmp_path / name))} for name in ("t.jsonl", "t.test.jsonl")]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == set(texts) and all(sides)
    assert counts["triples"] == 2 * len(sides[0]) and counts["test"] == 2 * len(sides[1])


def test_a_test_passage_shares_no_paragraph_with_one_that_is_learned(tmp_path):
    paragraphs = [f"{i} {LINES[0]} {LINES[1]} {LINES[2]}" for i in range(40)]
    assert min(map(len, paragraphs)) >= 80
    said = [Said("specific", "Which?", "harbour lamp window", True)]
    for step in (1, 2):  # the same pages, cut otherwise
        texts = ["\n".join(paragraphs[i : i + step]) for i in range(0, 40, step)]
        counts = build(texts, tmp_path / "t.jsonl", Scripted(said=lambda _: said), test_share=0.3)
    learned, tests = (load_triples(str(tmp_path / name)) for name in ("t.jsonl", "t.test.jsonl"))
    seen = {p for t in learned for p in t.context.split("\n")}
    assert tests and not any(p in seen for t in tests for p in t.context.split("\n"))
    assert counts["refused"]["in training"] > 0 and counts["triples"] + counts["test"] + sum(counts["refused"].values()) == 60


def test_an_answer_that_suits_everything_is_taken_only_so_often(tmp_path):
    texts = [f"{i} {LINES[0]}" for i in range(30)]
    counts = build(texts, tmp_path / "t.jsonl", Scripted(said=lambda _: [Said("specific", "What?", "A lamp.", True)]))
    assert counts["triples"] + counts["test"] == 20 and counts["refused"] == {"duplicate": 10}


def client(replies, tokens=50):
    """An OpenAI client's face: yields replies in turn; an exception is raised."""

    def create(**asked):
        create.asked.append(asked)
        reply = replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        words, reason = reply
        choice = SimpleNamespace(message=SimpleNamespace(content=words), finish_reason=reason)
        return SimpleNamespace(choices=[choice], usage=SimpleNamespace(total_tokens=tokens))

    create.asked = []
    return SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))


def test_an_endpoint_is_asked_once_a_text_and_cut_replies_are_read_as_far_as_they_go(tmp_path):
    import openai

    rows = [{"kind": "specific", "prompt": f"What {i}?", "answer": "the brass lamp"} for i in range(3)]
    cut = json.dumps(rows)[:-25]
    fake = client([(json.dumps(rows), "stop"), (cut, "length"), ("I cannot.", "stop"), openai.OpenAIError("quota\nexceeded")])
    teacher = EndpointTeacher("m", client=fake, together=1)
    texts = [f"{i} {LINES[0]}" for i in range(4)]
    with pytest.raises(ICAEError) as error:
        build(texts, tmp_path / "t.jsonl", teacher, test_share=0.0)
    one_line(error.value, "quota exceeded", "3 texts are kept")
    found = load_triples(str(tmp_path / "t.jsonl"))
    assert [t.context for t in found] == [texts[0]] * 3 + [texts[1]] * 2
    assert json.loads((tmp_path / "t.raw.jsonl").read_text().splitlines()[2])["raw"] == "I cannot."
    assert all(texts[n] in a["messages"][0]["content"] for n, a in enumerate(fake.chat.completions.create.asked))


def test_an_endpoint_that_does_not_count_tokens_is_budgeted_by_the_most_it_may_cost(tmp_path):
    good = (json.dumps([{"prompt": "What?", "answer": "the brass lamp"}]), "stop")
    teacher = EndpointTeacher("m", client=client([good], tokens=None))
    ((_, reply),) = teacher.read(TEXTS[:1])
    assert reply.tokens == teacher.most(TEXTS[0])
    kept = Ledger(tmp_path / "raw.jsonl")
    kept.add("m", "text", Reply([], None))  # as older ledgers have it
    assert Ledger(kept.path).tokens == 0


def test_a_reply_that_is_cut_short_ends_as_a_failure():
    teacher = EndpointTeacher("m", client=client([json.JSONDecodeError("Expecting value", "", 0)]))
    with pytest.raises(ICAEError) as error:
        list(teacher.read(TEXTS[:1]))
    one_line(error.value, "the endpoint of 'm' failed", "Expecting value")


def test_replies_under_way_at_an_interrupt_are_kept(monkeypatch):
    good = (json.dumps([{"prompt": "What?", "answer": "the brass lamp"}]), "stop")
    teacher, interrupts, completed = EndpointTeacher("m", client=client([good] * 3)), iter([True]), teachers.as_completed

    def waiting(under_way):
        if next(interrupts, False):
            raise KeyboardInterrupt
        return completed(under_way)

    monkeypatch.setattr(teachers, "as_completed", waiting)
    got = []
    with pytest.raises(KeyboardInterrupt):
        for number, _ in teacher.read(TEXTS[:3]):
            got.append(number)
    assert sorted(got) == [0, 1, 2]


def test_replies_under_way_beside_a_failure_are_kept():
    import openai

    good = (json.dumps([{"prompt": "What?", "answer": "the brass lamp"}]), "stop")
    teacher = EndpointTeacher("m", client=client([good, openai.OpenAIError("down"), good]), together=3)
    got = []
    with pytest.raises(ICAEError, match="down"):
        for number, reply in teacher.read(TEXTS[:3]):
            got.append((number, len(reply.said)))
    assert len(got) == 2


def test_replies_beside_a_defect_are_kept(monkeypatch):
    good = (json.dumps([{"prompt": "What?", "answer": "the brass lamp"}]), "stop")
    teacher, calls = EndpointTeacher("m", client=client([good] * 3), together=3), iter(range(3))
    ask = teacher._ask
    monkeypatch.setattr(teacher, "_ask", lambda text: ask(text) if next(calls) != 1 else [][0])
    got = []
    with pytest.raises(IndexError):
        for number, _ in teacher.read(TEXTS[:3]):
            got.append(number)
    assert len(got) == 2


# ---- the command line ----


@pytest.mark.parametrize("option", ["--texts=0", "--most=-1", "--max-requests=-1", "--max-tokens=-1", "--minutes=-1"])
def test_numbers_out_of_range_are_refused(icae, option):  # noqa: F811
    code, out, err = icae("data", "build", "none", "o.jsonl", option)
    assert (code, out) == (2, "") and option.partition("=")[0] in err


@pytest.mark.parametrize("source", ["t.jsonl", "t.raw.jsonl", "t.test.jsonl"])
def test_the_texts_are_not_written_over(icae, tmp_path, source):  # noqa: F811
    (tmp_path / source).write_text(row := json.dumps({"text": LINES[0]}))
    code, out, err = icae("data", "build", source, "t.jsonl", "--least", 60, "--base", "none")
    assert (code, out) == (2, "") and f"{source} is the data itself" in err and err.count("\n") == 1
    assert (tmp_path / source).read_text() == row


def test_build_and_check_on_the_command_line(icae, tmp_path):  # noqa: F811
    base = save_base(tmp_path / "base")
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("\n\n".join(LINES * 2))
    small = ("--base", base, "--texts", 3, "--least", 60, "--most", 200, "--prompts", 4, "--answer-tokens", 5, "--json")
    code, out, err = icae("data", "build", "books", "out.jsonl", *small)
    assert code == 0, err
    counts = json.loads(out)
    assert counts["texts"] == 3 and counts["stopped"] is None
    assert {json.loads(line)["text"] for line in (tmp_path / "out.raw.jsonl").read_text().splitlines()} <= {*LINES}
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"input": t, "prompt": "What?", "answer": t[:20]}) + "\n" for t in LINES) + "{\n")
    code, out, _ = icae("data", "check", "t.jsonl", "--base", base, "--json")
    result = json.loads(out)
    assert (code, result["rows"], result["good"], result["usable"], result["contexts"]) == (1, 5, 4, False, 4)
    assert "line 5" in result["bad"][0] and result["context_tokens"]["most"] > 20
    result = json.loads(icae("data", "check", "t.jsonl", "--base", base, "--most", 20, "--json")[1])
    assert result["good"] == 4 - result["long"] < 4 and result["rows"] == 5
    assert "bad: t.jsonl, line 5" in icae("data", "check", "t.jsonl")[1]
    (tmp_path / "bad.jsonl").write_text("{\n" * 25)
    code, out, _ = icae("data", "check", "bad.jsonl")
    assert code == 1 and out.count("bad: ") == 20 and "and 5 more" in out
    (tmp_path / "good.jsonl").write_text("".join((tmp_path / "t.jsonl").read_text().splitlines(keepends=True)[:4]))
    assert icae("data", "check", "good.jsonl")[0] == 0
    for arguments, words in (
        (("data", "build", "books", "out.txt"), ".jsonl"),
        (("data", "build", "books", "o.jsonl", "--kinds", "summary,song"), "no kind 'song'"),
        (("data", "build", "books", "o.jsonl", "--kinds", "title", "--teacher", "m"), "--teacher base knows --kinds"),
        (("data", "build", "books", "o.jsonl", "--prompts", 6, "--base-dtype", "auto", "--teacher", "m"), "knows --prompts, --base-dtype"),
        (("data", "build", "books", "o.jsonl", "--least", 5000, "--most", 6000), "no passage"),
        (("data", "build", "books", "o.jsonl", "--url", "http://127.0.0.1:9/v1", "--least", 60), "--teacher"),
        (("data", "build", "none", "o.jsonl"), "none"),
        (("data", "check", "none.jsonl"), "none.jsonl"),
    ):
        code, out, err = icae(*arguments)
        assert (code, out) == (2, "") and words in err and err.count("\n") == 1, (arguments, err)
