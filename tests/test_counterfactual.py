import json

import numpy as np
import pytest
from tiny import LINES, one_line

from icae.config import ICAEConfig, TrainConfig
from icae.counterfactual import FEWEST, OtherAnswers, form
from icae.errors import ICAEError
from icae.train import make_data
from icae.triples import Pool, Triple, Triples

NAMES = ["Ada Lane", "Tom Reed", "Joan Hill", "Mark Stone", "Ruth Ford", "Noah Brook", "Lucy Marsh", "Paul Glen", "Emma Field"]
ASKED = [
    Triple(f"Door {i} is green. {n} painted it; {n.split()[1]} was {30 + i}.", f"Who painted door {i}?", n, (n,))
    for i, n in enumerate(NAMES)
]


def swapped(triple, others=ASKED, seed=0):
    made = OtherAnswers((t.context, t.prompt, t.response) for t in others).swapped(
        triple.context, triple.prompt, triple.response, np.random.default_rng(seed)
    )
    return triple if made is None else Triple(made[0], triple.prompt, made[1], made[1:])


@pytest.mark.parametrize("seed", range(5))
def test_another_questions_answer_takes_every_place_of_the_right_one(seed):
    made = [swapped(t, seed=seed) for t in ASKED]
    for i, (t, new) in enumerate(zip(ASKED, made, strict=True)):
        if new is t:  # its own answer was drawn
            continue
        assert new.prompt == t.prompt and new.answers == (new.response,) and new.response in NAMES and new.response != t.response
        assert new.context == f"Door {i} is green. {new.response} painted it; {new.response.split()[1]} was {30 + i}."
    assert sum(new is not t for t, new in zip(ASKED, made, strict=True)) >= 6


def test_what_is_drawn_depends_on_chance_alone():
    assert swapped(ASKED[0], seed=3) == swapped(ASKED[0], seed=3)
    assert len({swapped(ASKED[0], seed=seed).response for seed in range(20)}) > 4


@pytest.mark.parametrize(
    "odd",
    [
        Triple("Nobody painted it.", "Who painted door 1?", "Ada Lane", ()),  # does not stand in the text
        Triple("Ada Lanes painted it.", "Who painted door 1?", "Ada Lane", ()),  # nor in whole words
        Triple("Ada Lane painted it.", "Who is Ada Lane?", "Ada Lane", ()),  # the question names it
        Triple("It is Ada Lane.", "What is its name?", "Ada Lane", ()),  # asked otherwise than all others
        Triple("It was ada lane.", "Who painted it?", "ada lane", ()),  # of another form
        Triple(" ".join(NAMES), "Who is the first?", "Ada Lane", ()),  # the text has all other answers, too
    ],
)
def test_where_none_fits_a_question_stays_as_it_is(odd):
    assert all(swapped(odd, seed=seed) is odd for seed in range(10))


def test_a_question_that_names_another_answer_never_gets_that_one():
    asked = Triple("Ada Lane painted it.", f"Who painted it, {' or '.join(NAMES[2:])}?", "Ada Lane", ())
    assert {swapped(asked, seed=seed).response for seed in range(30)} == {"Ada Lane", "Tom Reed"}


def test_last_names_are_those_of_people_whom_the_prompt_does_not_name():
    """Else the question would ask about nobody, and towers would change their names."""
    family = Triple("Ada Lane painted it, as all Lanes do. Lane is old.", "Who is the oldest Lane?", "Ada Lane", ())
    place = [Triple(f"{n} lies by the sea. The {n.split()[1]} runs there.", "Where is it?", n, ()) for n in NAMES]
    made = swapped(family, seed=1)
    assert made.context == f"{made.response} painted it, as all Lanes do. Lane is old." and made is not family
    made = swapped(place[0], others=place, seed=1)
    assert made.context == f"{made.response} lies by the sea. The Lane runs there." and made is not place[0]


def test_what_was_put_in_is_not_changed_again():
    pairs = [Triple(f"{a} and {b} sang.", "Who sang?", f"{a} and {b}", ()) for a, b in zip(NAMES, NAMES[::-1], strict=True) if a != b]
    for t in pairs:
        for seed in range(20):
            made = swapped(t, others=pairs, seed=seed)
            assert made.response in made.context


def test_a_few_answers_are_no_choice():
    assert swapped(ASKED[0], others=ASKED[: FEWEST - 1]) is ASKED[0]


@pytest.mark.parametrize(
    ("prompt", "answer", "wanted"),
    [
        ("when was it cut?", "June 12, 1931", ("when", "A", "00", ",", "0000")),
        ("How many doors?", "the 12 of them", ("how many", "the", "00", "of", "a")),
        ("in which year", "1931", ("which", "0000")),
        ("it is made by", "Élan & Co", ("", "A", "&", "A")),
    ],
)
def test_a_form_is_how_it_is_asked_and_how_the_answer_looks(prompt, answer, wanted):
    assert form(prompt, answer) == wanted


def test_training_asks_about_the_text_that_says_otherwise(base):
    config = ICAEConfig(segment_length=64)

    def samples(**settings):
        data = Triples([Pool(ASKED)], base, config, TrainConfig(objective="instruct", steps=9, batch_size=1, **settings))
        return [data[i] for i in range(len(data))]

    plain, half, every = samples(), samples(counterfactual=0.5), samples(counterfactual=1.0)
    changed = [sum(a.target != b.target for a, b in zip(plain, other, strict=True)) for other in (half, every)]
    assert 0 < changed[0] < changed[1] >= 6
    for before, after in zip(plain, every, strict=True):
        text, answer = base.decode(after.segments[0]), base.decode(after.target[:-1])
        assert answer in text and after.prompt == before.prompt and (before.segments == after.segments) == (before.target == after.target)


def test_the_text_as_it_was_never_stands_beside_the_changed_one(base):
    """It would answer the question with the other answer."""
    rows = [*ASKED, *(Triple(line, "What?", line.split()[0], ()) for line in LINES)]
    settings = {"counterfactual": 1.0, "distractors": 9, "distractor_share": 1.0, "batch_size": 1}
    data = Triples([Pool(rows)], base, ICAEConfig(segment_length=128), TrainConfig(objective="instruct", steps=40, **settings))
    originals = {base.decode(base.encode(t.prompt)): t.context for t in ASKED}
    for i in range(len(data)):
        example = data[i]
        texts = [base.decode(segment) for segment in example.segments]
        assert len(texts) > 1
        prompt = next((p for p in originals if p in base.decode(example.prompt)), None)
        if prompt is not None and base.decode(example.target[:-1]) not in originals[prompt]:
            assert originals[prompt] not in texts


def test_the_held_out_loss_is_of_the_texts_as_they_are(base, tmp_path):
    rows = [{"input": t.context, "prompt": t.prompt, "answer": t.response} for t in ASKED]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = TrainConfig(objective="instruct", train=str(tmp_path / "t.jsonl"), held_out=str(tmp_path / "t.jsonl"), counterfactual=1.0)
    samples, held_out = make_data(told, base, ICAEConfig(segment_length=64), 1)
    plain = make_data(told.replace(counterfactual=0.0), base, ICAEConfig(segment_length=64), 1)[1]
    assert [held_out[i] for i in range(len(held_out))] == [plain[i] for i in range(len(plain))]
    answers = {t.response for t in ASKED}
    assert (
        {base.decode(held_out[i].target[:-1]) for i in range(len(held_out))}
        == answers
        == {base.decode(samples[i].target[:-1]) for i in range(60)}
    )


def test_an_answer_too_long_for_the_bases_positions_is_not_put_in(base):
    config, text = ICAEConfig(segment_length=64), base.encode(" ".join(LINES * 60))
    names = [f"Ada L{'ane' * (100 if i == 0 else i)}" for i in range(FEWEST)]
    around = base.decode(text[: base.max_positions - 90])
    rows = [Triple(f"{n} painted it. {around if i else ''}", "Who?", n, ()) for i, n in enumerate(names)]
    data = Triples([Pool(rows)], base, config, TrainConfig(objective="instruct", counterfactual=1.0, steps=20))
    room = {i: base.max_positions - config.marker_length - sum(map(len, data[i].segments)) - len(data[i].prompt) for i in range(80)}
    assert min(room.values()) >= 1 and len(set(room.values())) > FEWEST
    assert len(base.encode(names[0])) > 90


def test_a_run_says_how_many_prompts_another_answer_fits_and_refuses_none(base, capsys):
    told = TrainConfig(objective="instruct", counterfactual=0.5)
    Triples([Pool(ASKED)], base, ICAEConfig(), told)
    count, total = (int(word) for word in capsys.readouterr().err.split() if word.isdigit())
    assert 6 <= count <= total == len(ASKED)
    free = [Triple(line, "Summarise it.", f"It is about {i}.", ()) for i, line in enumerate(LINES)]
    with pytest.raises(ICAEError) as error:
        Triples([Pool(free)], base, ICAEConfig(), told)
    one_line(error.value, "counterfactual", f"{len(LINES)} prompts")
    Triples([Pool(free)], base, ICAEConfig(), told.replace(counterfactual=0.0))
