"""Answers that are begun in several ways: the beginning that is likeliest a token is the one that goes on."""

import pytest
import torch
from test_decoder import inputs
from tiny import make_icae, random_ids

from icae import beginnings as room
from icae.decoder import Decoder
from icae.objectives import Example, Marker
from icae.reader import Sampling


@pytest.fixture
def model(base):
    return make_icae(base, stirred=0.05, grounding=1)


def generated(base, prompts, count, limit, **settings):
    made = [[] for _ in prompts]
    for step in Decoder(base).generate(None, *inputs(base, prompts), [limit] * len(prompts), beginnings=count, **settings):
        for row, new in zip(made, step, strict=True):
            if new is not None:
                row.append(new)
    return made


def by_hand(base, prompt, count, limit, length, ends):
    """Each beginning read from nothing, token by token."""

    def said(ids):
        return base.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)

    first = said(prompt)
    first[ends] = -torch.inf
    found = []
    for i in first.topk(count).indices.tolist():
        ids, shares, ended = [i], [float(first[i])], False
        while len(ids) < min(limit, length) and not ended:
            scores = said(prompt + ids)
            new = int(scores.argmax())
            shares.append(float(scores[new]))
            ended = new in ends
            ids += [] if ended else [new]
        found.append((sum(shares) / len(shares), ids, ended))
    _, ids, ended = max(found)
    while len(ids) < limit and not ended:
        new = int(said(prompt + ids).argmax())
        ended = new in ends
        ids += [] if ended else [new]
    return ids


@torch.no_grad()
@pytest.mark.parametrize(("length", "limit"), [(4, 10), (24, 10), (4, 4), (1, 6)])
def test_rows_go_on_from_their_likeliest_beginning(base, monkeypatch, length, limit):
    monkeypatch.setattr(room, "LENGTH", length)
    prompts = random_ids(5, 3, 9)
    greedy = generated(base, prompts, 1, 12, stop=[])
    stop = [greedy[0][2], greedy[1][6]]  # some rows end among the beginnings, others behind them
    expected = [by_hand(base, prompt, 3, limit, length, stop) for prompt in prompts]
    assert generated(base, prompts, 3, limit, stop=stop) == expected
    assert expected != [row[:limit] for row in greedy]


def test_one_beginning_is_greedy_and_drawn_answers_have_one(model, base):
    prompts = random_ids(5, 3)
    slots = model.compress_ids(random_ids(20, 30, seed=3))
    plain = model.reader.collect(slots, prompts, Marker.FT, [8, 8])
    assert model.reader.collect(slots, prompts, Marker.FT, [8, 8], beginnings=1) == plain
    drawn = [model.reader.collect(slots, prompts, Marker.FT, [8, 8], Sampling(1.0, seed=4), beginnings=count) for count in (1, 3)]
    assert drawn[0] == drawn[1]


def test_no_beginning_ends_before_it_has_as_many_tokens_as_it_must(base):
    prompts, anything = random_ids(5, 3), list(range(3, 250))
    for count in (1, 3):
        assert min(map(len, generated(base, prompts, count, 12, stop=anything, min_new_tokens=10))) >= 10


def test_answers_and_streams_begin_alike(model):
    slots = model.compress_ids(random_ids(40, 30, seed=3))
    model.config = model.config.replace(beginnings=4)
    several = model.answers(slots, ["Why?", "Who lit the lamp?"], max_new_tokens=12)
    assert several == [
        "".join(model.stream_answer(s, p, max_new_tokens=12)).strip() for s, p in zip(slots, ["Why?", "Who lit the lamp?"], strict=True)
    ]
    model.config = model.config.replace(beginnings=1)
    assert several != model.answers(slots, ["Why?", "Who lit the lamp?"], max_new_tokens=12)


def test_no_answer_is_less_likely_a_token_for_having_been_begun_in_several_ways(model, base):
    slots = model.compress_ids(random_ids(40, 30, 35, 22, seed=3))
    prompts = random_ids(4, 3, 5, 4, seed=5)
    likelihoods, end = [], base.eos_ids[0]
    for count in (1, 4):
        rows = model.reader.collect(slots, prompts, Marker.FT, [12] * 4, beginnings=count)
        scores = model.score(slots, [Example([], Marker.FT, p, [*row, end]) for p, row in zip(prompts, rows, strict=True)])
        likelihoods.append([-float(s.nll[: len(row) + (len(row) < 12)].mean()) for row, s in zip(rows, scores, strict=True)])
    assert all(several >= one - 1e-5 for one, several in zip(*likelihoods, strict=True)) and likelihoods[0] != likelihoods[1]


def test_without_slots_the_base_answers_as_it_does(model):
    model.config = model.config.replace(beginnings=4)
    assert model.answers(None, ["Why?"], max_new_tokens=8) == model.answers(None, ["Why?"], max_new_tokens=8, beginnings=1)
    assert model.answers(None, ["Why?"], max_new_tokens=8, beginnings=4) != model.answers(None, ["Why?"], max_new_tokens=8)


def test_an_answer_of_the_questions_own_words_is_doubted():
    doubt = room.echo("Which oil does the bearing take?", lambda ids: " ".join(map(str, ids)))
    assert doubt(["Oil."]) == doubt(["The", "bearing"]) == doubt(["?"]) == room.ECHO
    assert doubt(["Linseed", "oil"]) == doubt(["42"]) == 0


def test_a_doubted_beginning_gives_way_to_the_next(base):
    prompt = random_ids(5)[0]
    best = generated(base, [prompt], 3, 6)[0]
    other = generated(base, [prompt], 3, 6, doubts=[lambda ids: 100.0 * (ids == best[: len(ids)])])[0]
    assert other != best and generated(base, [prompt], 3, 6, doubts=[lambda ids: 100.0])[0] == best


def test_a_full_texts_words_are_not_the_questions(model, monkeypatch):
    seen = []
    monkeypatch.setattr("icae.model.echo", lambda prompt, decode: seen.append(prompt) or (lambda ids: 0.0))
    model.answers(None, ["A text.\n\nWhy?"], max_new_tokens=2, beginnings=2, questions=["Why?"])
    model.answers(None, ["Why not?"], max_new_tokens=2)
    assert seen == ["Why?", "Why not?"]


def test_every_family_begins_in_several_ways(family_base):
    model = make_icae(family_base, stirred=0.05, beginnings=3)
    slots = model.compress_ids(random_ids(20, seed=3))[0]
    said = model.answer(slots, "Why?", max_new_tokens=30)
    assert said == model.answers([slots], ["Why?"], max_new_tokens=30)[0]
    if family_base.model.config.model_type not in ("gemma2", "gemma3_text"):  # their windows count what is masked beside a longer row
        pair = model.answers([slots, slots], ["Why?", "Who lit the lamp in the window?"], max_new_tokens=30)
        assert pair[0] == said
