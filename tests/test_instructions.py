import json

import pytest
from test_data import refused, rows_to_jsonl, windows
from test_triples import GOOD, GOOD_ROW
from tiny import LINES, make_icae

from icae.chat import chat_prompt, chat_response, full_text
from icae.config import ICAEConfig, TrainConfig
from icae.errors import ICAEError
from icae.instructions import Pool, Triples, load_pools
from icae.objectives import Marker, collate
from icae.triples import Triple, load_triples

CONFIG = ICAEConfig(segment_length=16)


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
