import json
import lzma
from pathlib import Path

import pytest
from test_data import refused, rows_to_jsonl, windows
from tiny import LINES, make_icae

from icae.chat import chat_prompt, chat_response, full_text
from icae.config import ICAEConfig, TrainConfig
from icae.errors import ICAEError
from icae.objectives import Marker, collate
from icae.triples import Pool, Triple, Triples, load_pools, load_triples, read_triples

CONFIG = ICAEConfig(segment_length=16)

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


def triples(base, count=7, replay=None, **settings):
    rows = [Triple(f"Door {i} is green.", f"What of door {i}?", f"Green {i}.", ()) for i in range(count)]
    settings = {"replay": "books" if replay else None, **settings}
    return rows, Triples([Pool(rows)], base, CONFIG, TrainConfig(objective="instruct", steps=10, **settings), replay)


def test_every_epoch_holds_every_triple_once_in_another_order(base):
    rows, data = triples(base)
    prompts = [chat_prompt(base.tokenizer, row.prompt) for row in rows]
    epochs = [[prompts.index(data[i].prompt) for i in range(at, at + 7)] for at in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_prompts_in_a_row_are_about_one_context_and_none_is_asked_twice(base):
    rows = [Triple(f"Door {i}.", f"{i}{n}?", "Green.", ()) for i in range(3) for n in range(1 if i == 2 else 3)]
    data = Triples([Pool(rows)], base, CONFIG, TrainConfig(objective="instruct", steps=10, prompts=2))
    asked = {tuple(chat_prompt(base.tokenizer, row.prompt)): row for row in rows}
    seen = [asked[tuple(data[i].prompt)] for i in range(10)]
    for epoch, others in ((seen[:5], {"01?", "11?"}), (seen[5:], {"02?", "12?"})):  # the third context has one prompt alone
        assert {row.prompt for row in epoch} == {"00?", "10?", "20?"} | others and len(set(epoch)) == 5
        for at, row in enumerate(epoch):
            if row.prompt in others:
                assert epoch[at - 1].prompt == row.prompt[0] + "0?"


def test_a_triple_becomes_context_prompt_and_response(base):
    (row,), data = triples(base, 1)
    e = data[0]
    assert [i for s in e.segments for i in s] == base.encode(row.context)
    assert (e.marker, e.prompt, e.target) == (
        Marker.FT,
        chat_prompt(base.tokenizer, row.prompt),
        chat_response(base.tokenizer, row.response),
    )
    assert triples(base, 1, response_length=3)[1][0].target == e.target[:3]


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_share_replays_pretraining_and_lambda_holds_within_it(base, share):
    _, data = triples(base, replay=windows(base, autoencoding_share=0.5), pretrain_share=share)
    markers = [data[i].marker for i in range(40)]
    assert markers.count(Marker.FT) == 40 * (1 - share)
    assert markers.count(Marker.AE) == markers.count(Marker.LM) == 20 * share
    for e in (data[i] for i in range(40) if markers[i] != Marker.FT):
        text = e.segments[0] + (e.target if e.marker == Marker.LM else [])
        assert text == list(range(text[0], text[0] + len(text)))


def test_replayed_samples_and_triples_of_a_step_share_its_ratio(base):
    """Nobody leaves an epoch because a replayed sample stands at its index, and a batch has one ratio."""
    rows, data = triples(base, replay=windows(base, ratios=[2, 8]), pretrain_share=0.25, ratios=[2, 8])
    ratios = [data[i].ratio for i in range(40)]
    assert all(len(set(ratios[at : at + 4])) == 1 for at in range(0, 40, 4)) and set(ratios) == {2, 8}
    prompts = [chat_prompt(base.tokenizer, row.prompt) for row in rows]
    asked = [prompts.index(e.prompt) for e in (data[i] for i in range(40)) if e.marker == Marker.FT]
    assert sorted(asked[:7]) == sorted(asked[7:14]) == list(range(7))


# ---- forms ----


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


def test_a_response_is_cut_to_the_positions_that_are_left(base):
    room = base.max_positions - 8
    context = " ".join(LINES * 40)
    while len(base.encode(context)) > room - 60:
        context = context[: int(len(context) * 0.99)]
    row = Triple(context, "What?", " ".join(LINES * 10), ("",))
    (e,) = (Triples([Pool([row])], base, CONFIG, TrainConfig(objective="instruct", response_length=256))[i] for i in range(1))
    used = sum(map(len, e.segments)) + CONFIG.marker_length + len(e.prompt) + len(e.target)
    assert used == base.max_positions and e.target


def test_what_leaves_no_position_for_a_response_is_refused_before_training(base):
    long = " ".join(LINES * 60)
    ids = base.encode(long)
    row = Triple(base.decode(ids[: base.max_positions - 4]), "What of it?", "Green.", ("Green.",))
    refused(lambda: Triples([Pool([GOOD_ROW, row])], base, CONFIG, TrainConfig(objective="instruct")), "What of it?", "context_length")


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


def test_sources_are_joined_or_drawn_from_by_their_shares(base, tmp_path):
    a = rows_to_jsonl(tmp_path / "a.jsonl", [{**GOOD, "prompt": f"a {i}?"} for i in range(3)])
    b = rows_to_jsonl(tmp_path / "b.jsonl", [{**GOOD, "prompt": f"b {i}?"} for i in range(50)])
    assert [(len(p.triples), p.share) for p in load_pools([a, b])] == [(53, 1.0)]
    pools = load_pools({a: 3, b: 1})
    data = Triples(pools, base, CONFIG, TrainConfig(objective="instruct", steps=30))
    asked = [data._triple(i).prompt for i in range(120)]
    assert [sum(p.startswith("a") for p in asked[at : at + 4]) for at in range(0, 120, 4)] == [3] * 30
    of_a = [p for p in asked if p.startswith("a")]
    assert all(sorted(of_a[at : at + 3]) == ["a 0?", "a 1?", "a 2?"] for at in range(0, 90, 3))
    assert len({p for p in asked if p.startswith("b")}) == 30


@pytest.mark.parametrize("shares", [{"a": 0}, {"a": -1}, {"a": "x"}])
def test_shares_are_numbers_above_nothing(shares):
    with pytest.raises(ICAEError, match="shares"):
        TrainConfig(train=shares, objective="instruct")


# ---- among other documents, and taught ----


def test_distractors_stand_around_a_context_each_cut_alone(base):
    rows, data = triples(base, count=12, distractors=2, distractor_share=0.5)
    own = [tuple(base.encode(row.context)) for row in rows]
    met, alone, places, within = 0, 0, set(), []
    for i in range(40):
        e, plain = data[i], data._triple(i)
        documents = [tuple(s) for s in e.segments]  # each of these contexts is shorter than a segment
        mine = tuple(base.encode(plain.context))
        assert documents.count(mine) == 1 and len(set(documents)) == len(documents) <= 3 and set(documents) <= set(own)
        assert (e.prompt, e.target) == (chat_prompt(base.tokenizer, plain.prompt), chat_response(base.tokenizer, plain.response))
        batch = {tuple(base.encode(data._triple(n).context)) for n in range(i - i % 4, i - i % 4 + 4)}
        within += [d in batch for d in documents]
        met += len(documents) > 1
        alone += len(documents) == 1
        places.add((documents.index(mine), len(documents)))
    assert met > 10 and alone > 10 and all(within)
    assert places == {(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)}


def test_a_batch_of_documents_encodes_each_once_and_scores_the_response_alone(base):
    _, data = triples(base, count=12, distractors=3, distractor_share=1.0)
    examples = [data[i] for i in range(4)]
    batch = collate(examples)
    different = {tuple(s) for e in examples for s in e.segments}
    assert len(batch["segment_ids"]) == len(different) == 4 < sum(len(e.segments) for e in examples)
    for e, group, scored, ids in zip(examples, batch["groups"], batch["scored"], batch["text_ids"], strict=True):
        assert [batch["segment_ids"][n][: batch["lengths"][n]].tolist() for n in group] == e.segments
        assert ids[scored].tolist() == e.target


def test_distractors_never_leave_the_bases_positions(base):
    long = " ".join(LINES[:2])
    rows = [Triple(f"{i} {long}", "Who?", "Nobody.", ()) for i in range(8)]
    data = Triples([Pool(rows)], base, CONFIG, TrainConfig(objective="instruct", steps=4, distractors=9, distractor_share=1.0))
    for i in range(8):
        e = data[i]
        used = sum(map(len, e.segments)) + len(e.prompt) + len(e.target)
        assert used < base.max_positions < used + 2 * len(base.encode(rows[0].context))


def test_the_teacher_reads_the_full_text_as_an_answer_from_text_does(base):
    _, data = triples(base, distil=0.5, distractors=1, distractor_share=1.0)
    e, plain = data[0], data._triple(0)
    assert e.teacher == chat_prompt(base.tokenizer, full_text(plain.context, plain.prompt))
    assert triples(base)[1][0].teacher == [] and e.by_tutor


def test_without_a_chat_template_the_teacher_and_the_base_read_a_text_from_its_bos_on(base, monkeypatch):
    monkeypatch.setattr(base.tokenizer, "chat_template", None)
    _, data = triples(base, distil=0.5)
    bos = base.tokenizer.bos_token_id
    assert data[0].teacher[0] == bos != data[0].prompt[0]  # before the prompt, slots stand
    assert base.prompted("Why?") == [bos, *chat_prompt(base.tokenizer, "Why?")]
    model, asked = make_icae(base), []
    monkeypatch.setattr(model.reader, "collect", lambda slots, ids, *more: asked.extend(ids) or [[]] * len(ids))
    model.answers(None, ["Why?"])
    model.answers(model.compress_ids([[5, 6, 7]]), ["Why?"])
    assert [ids[0] == bos for ids in asked] == [True, False]


def test_what_the_base_wrote_is_taught_by_the_base(base, tmp_path):
    rows = [
        {"input": LINES[0], "prompt": "Who?", "answer": "A."} | more
        for more in ({}, {"teacher": f"{base.byline}, 6 prompts"}, {"teacher": "m"})
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_triples(str(tmp_path / "t.jsonl"))
    for t, tuned in zip(found, (True, False, True), strict=True):
        data = Triples([Pool([t])], base, CONFIG, TrainConfig(objective="instruct", distil=0.5))
        assert data[0].by_tutor is tuned and data[0].teacher
