import json
import lzma
from pathlib import Path

import pytest
from test_data import refused, rows_to_jsonl
from tiny import LINES

from icae.triples import Triple, load_triples, read_triples

GOOD_ROW = Triple("The door is green.", "What colour?", "Green.", ("Green.",))
GOOD = {"input": "The door is green.", "prompt": "What colour?", "answer": "Green."}


def test_triples_are_read_with_all_their_answers(tmp_path):
    path = rows_to_jsonl(tmp_path / "t.jsonl", [GOOD, {**GOOD, "answers": ["Green.", "It is green."], "more": 1}])
    plain, several = load_triples(path)
    assert (plain.context, plain.prompt, plain.response, plain.answers) == (*GOOD.values(), ("Green.",))
    assert several.answers == ("Green.", "It is green.")


BAD = [
    "{",
    "[1, 2]",
    "7",
    '{"input": "x", "prompt": "y"}',
    json.dumps({**GOOD, "prompt": "  "}),
    json.dumps({**GOOD, "answer": 3}),
    json.dumps({**GOOD, "answers": [1]}),
]


@pytest.mark.parametrize("line", BAD)
def test_one_bad_triple_in_a_hundred_is_named_and_skipped(tmp_path, capsys, line):
    path = rows_to_jsonl(tmp_path / "t.jsonl", [GOOD] * 41 + [line] + [GOOD] * 58)
    assert len(load_triples(path)) == 99
    said, count = capsys.readouterr().err.strip().split("\n")
    assert said.startswith("skipped ") and f"{path}, line 42: " in said
    assert "99 triples, 1 bad" in count


def test_more_than_one_bad_triple_in_a_hundred_is_refused_with_count_and_first(tmp_path):
    path = rows_to_jsonl(tmp_path / "t.jsonl", [GOOD] * 97 + ["{"] + [GOOD] + ["7"])
    refused(lambda: load_triples(path), "2 of 100 lines", f"{path}, line 98")


def test_no_triples_at_all_are_refused(tmp_path):
    (tmp_path / "t.jsonl").write_text("")
    refused(lambda: load_triples(str(tmp_path / "t.jsonl")), "holds no triples")


def test_blank_lines_are_no_lines(tmp_path):
    path = rows_to_jsonl(tmp_path / "t.jsonl", [GOOD, "", "  ", GOOD, ""])
    assert len(load_triples(path)) == 2


def test_answers_may_be_one_text(tmp_path):
    path = rows_to_jsonl(tmp_path / "t.jsonl", [{**GOOD, "answers": "It is green."}])
    assert load_triples(path)[0].answers == ("It is green.",)


def test_a_line_that_is_no_utf_8_is_named_and_skipped(tmp_path, capsys):
    path = tmp_path / "t.jsonl"
    line = (json.dumps(GOOD) + "\n").encode()
    path.write_bytes(line * 10 + b'{"input": "\xff", "prompt": "a", "answer": "b"}\n' + line * 100)
    assert len(load_triples(str(path))) == 110
    assert f"{path}, line 11: 'utf-8'" in capsys.readouterr().err


SQUAD = {
    "data": [
        {
            "title": "Doors",
            "paragraphs": [
                {
                    "context": "The door is green.",
                    "qas": [
                        {"id": "a", "question": "What colour?", "answers": [{"text": "green", "answer_start": 12}, {"text": "Green"}]},
                        {"id": "b", "question": "Who?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ]
}


def test_squads_form_is_read_without_its_impossible_questions(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps(SQUAD))
    assert load_triples(str(tmp_path / "s.json")) == [Triple("The door is green.", "What colour?", "green", ("green", "Green"))]
    flat = {"context": "The door is green.", "question": "What colour?", "answers": {"text": ["green"], "answer_start": [12]}}
    assert load_triples(rows_to_jsonl(tmp_path / "f.jsonl", [flat])) == [Triple("The door is green.", "What colour?", "green", ("green",))]


def test_rows_of_squads_without_an_answer_are_passed_over(tmp_path):
    none = {"context": "The door is green.", "question": "How old?", "answers": {"text": [], "answer_start": []}}
    flat = {"context": "The door is green.", "question": "What colour?", "answers": {"text": ["green"], "answer_start": [12]}}
    found = read_triples(rows_to_jsonl(tmp_path / "f.jsonl", [none, flat, none]))
    assert len(found.good) == found.rows == 1


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    (tmp_path / "f.jsonl").write_text("\ufeff" + json.dumps(GOOD) + "\n", encoding="utf-8")
    (tmp_path / "s.json").write_text("\ufeff" + json.dumps(SQUAD), encoding="utf-8")
    assert len(load_triples(str(tmp_path / "f.jsonl"))) == len(load_triples(str(tmp_path / "s.json"))) == 1


@pytest.mark.parametrize("text", ["[]", "{}", '{"data": [{"paragraphs": 3}]}', "{", '{"data": 1}', '"x"'])
def test_json_of_another_form_is_refused(tmp_path, text):
    (tmp_path / "s.json").write_text(text)
    refused(lambda: load_triples(str(tmp_path / "s.json")), "s.json", "SQuAD")


@pytest.mark.parametrize("field", ["input", "prompt", "answer", "answers"])
def test_half_characters_are_bad_rows_named_by_their_line(tmp_path, field):
    bad = {**GOOD, field: ["x", "half \ud83d"] if field == "answers" else "half \ud83d"}
    path = rows_to_jsonl(tmp_path / "t.jsonl", [GOOD, json.dumps(bad)])
    (note,) = read_triples(path).bad
    assert "line 2" in note and "half" in note


def test_empty_answers_beside_others_do_not_count_as_right(tmp_path):
    (found,) = load_triples(rows_to_jsonl(tmp_path / "t.jsonl", [{**GOOD, "answers": ["", " ", "green"]}]))
    assert found.answers == ("green",)


def test_a_squad_question_without_an_answer_is_named_by_its_id(tmp_path):
    qas = [{"id": f"q{i}", "question": "What?", "answers": [{"text": "green"}] if i != 7 else []} for i in range(20)]
    (tmp_path / "s.json").write_text(json.dumps({"data": [{"paragraphs": [{"context": "The door.", "qas": qas}]}]}))
    refused(lambda: load_triples(str(tmp_path / "s.json")), "question q7", "1 of 20")


def test_a_hub_name_gives_its_split_and_what_the_hub_refuses_is_one_line(monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or [GOOD, GOOD])
    assert len(load_triples("sggetao/PwC")) == len(load_triples("sggetao/PwC:test")) == 2
    assert asked == [("sggetao/PwC", "train"), ("sggetao/PwC", "test")]

    def fails(*_, **__):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    refused(lambda: load_triples("sggetao/PwC"), "sggetao/PwC", "no network")


def test_triples_may_be_compressed(tmp_path):
    plain = Path(rows_to_jsonl(tmp_path / "t.jsonl", [GOOD] * 3))
    small = tmp_path / "t.jsonl.xz"
    small.write_bytes(lzma.compress(plain.read_bytes()))
    assert load_triples(str(small)) == load_triples(str(plain))
    small.write_bytes(small.read_bytes()[:-9])
    refused(lambda: load_triples(str(small)), "is no .xz, or is not all of one")


def test_the_questions_that_come_along_are_triples_word_for_word():
    triples = load_triples(str(Path(__file__).parent.parent / "data" / "questions.jsonl.xz"))
    assert len(triples) > 38_000 and len({t.context for t in triples}) > 11_000
    assert all(t.response in t.context and t.prompt.endswith("?") for t in triples)


def test_missing_files_are_refused(tmp_path):
    for name in ("none.jsonl", "none.json"):
        refused(lambda name=name: load_triples(str(tmp_path / name)), name)


def test_contexts_shorter_than_a_slots_block_are_bad_and_long_ones_left_out(base, tmp_path, capsys):
    short, long = {**GOOD, "input": "a"}, {**GOOD, "input": LINES[0]}
    path = rows_to_jsonl(tmp_path / "t.jsonl", [GOOD] * 100 + [short] + [long] * 5)
    assert len(load_triples(path, base, least=4, most=20)) == 100
    said = capsys.readouterr().err
    assert f"{path}, line 101: a context of 1 tokens" in said and "5 with more than 20 tokens left out" in said
    block = len(base.encode("The door"))
    two = rows_to_jsonl(tmp_path / "u.jsonl", [{**GOOD, "input": "The door"}])
    assert len(load_triples(two, base, least=block)) == 1
    refused(lambda: load_triples(two, base, least=block + 1), "u.jsonl, line 1", f"a context of {block} tokens")
    refused(lambda: load_triples(rows_to_jsonl(tmp_path / "v.jsonl", [long]), base, most=20), "more than 20 tokens")


# ---- several sources ----
