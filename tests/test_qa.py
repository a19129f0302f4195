import json
import signal
from functools import partial

import numpy as np
import pytest
from tiny import LINES, load_script, make_icae, one_line, save_base

from icae.base import load_base
from icae.baselines import cut_off, delete_by_surprise
from icae.chat import full_text
from icae.errors import ICAEError
from icae.metrics import token_f1
from icae.model import ICAE
from icae.qa import SIDES, drawn, qa
from icae.several import PLACES, documents, places
from icae.shares import processes, qa_side_by_side
from icae.slots import MemorySlots
from icae.triples import Triple

TRIPLES = [Triple(f"{line} {i}", f"Question {i}?", f"answer {i}", (f"answer {i}", line.split()[1])) for i, line in enumerate(LINES * 2)]


def test_every_side_is_asked_what_its_name_says(base, kind):
    """Each response equals the one that is asked for alone, so that order and batches change nothing."""
    model = make_icae(base, kind=kind, stirred=0.05)
    results, rows = qa(model, TRIPLES, max_new_tokens=4, batch_size=3)
    counts = []
    for t, row in zip(TRIPLES, rows, strict=True):
        ids, (slots,) = base.encode(t.context), model.compress([t.context])
        counts.append(slots.count)
        shortened = {"cut": cut_off(ids, slots.count), "deleted": delete_by_surprise(base, ids, slots.count)}
        expected = {
            "slots": model.answer(slots, t.prompt, max_new_tokens=4),
            "text": model.answer_text(t.context, t.prompt, max_new_tokens=4),
            "none": model.answer(None, t.prompt, max_new_tokens=4),
            **{side: model.answer(None, full_text(base.decode(kept), t.prompt), max_new_tokens=4) for side, kept in shortened.items()},
        }
        assert {side: row[side] for side in SIDES} == expected
    assert results["n"] == 8 and results["budget"] == np.mean(counts)
    assert {f"{m}_{side}" for m in ("f1", "rouge1") for side in SIDES} <= results.keys()


@pytest.mark.parametrize("ask", [qa, documents, places])
def test_rows_are_heard_as_soon_as_all_sides_answered(base, ask):
    model, heard, done = make_icae(base), [], []
    fits = {"length": max(len(base.encode(t.context)) for t in TRIPLES)} if ask is places else {}
    _, rows = ask(
        model,
        TRIPLES,
        batch_size=3,
        max_new_tokens=2,
        heard=lambda row: heard.append(dict(row)),
        progress=lambda n, _: done.append(n),
        **fits,
    )
    assert sorted(heard, key=str) == sorted(rows, key=str) and done == [3, 6, 8]


def test_questions_shared_out_among_processes_have_the_same_answers_and_figures(tmp_path, monkeypatch):
    monkeypatch.setattr("icae.shares.QUESTIONS", 3)
    base = load_base(str(save_base(tmp_path / "base")))
    model = make_icae(base, stirred=0.05)
    model.save_pretrained(tmp_path / "adapter")
    begin = partial(ICAE.from_pretrained, tmp_path / "adapter", base=str(tmp_path / "base"))
    long = Triple(" ".join(LINES * 40), "Question?", "bell", ("bell",))
    asked, how = [*TRIPLES, *[long] * 4], {"sides": ["slots", "none"], "max_new_tokens": 3}  # a whole share is too long
    heard, done = [], []
    results, rows = qa_side_by_side(model, begin, asked, jobs=2, heard=heard.append, progress=lambda n, of: done.append((n, of)), **how)
    alone, expected = qa(model, asked, **how)
    assert rows == expected == heard and done == [(3, 8), (6, 8), (8, 8)]
    assert results == {**alone, "budget": pytest.approx(alone["budget"])}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_ended_takes_up_no_further_work(how):
    with pytest.raises(ICAEError) as error, processes(1, dict) as pool:
        list(pool.map(signal.raise_signal, [how, how]))
    one_line(error.value, "lower --jobs")


def test_what_no_side_could_read_whole_is_left_out_and_counted(base):
    model, long = make_icae(base), Triple(" ".join(LINES * 40), "Question?", "bell", ("bell",))
    results, rows = qa(model, [*TRIPLES[:2], long], sides=["text", "slots"], max_new_tokens=2)
    assert (results["n"], results["left_out"]) == (2, 1) and [r["prompt"] for r in rows] == [t.prompt for t in TRIPLES[:2]]
    assert qa(model, [TRIPLES[0], long], sides=["slots"], max_new_tokens=2)[0]["left_out"] == 1
    focused = make_icae(base, focus=2)
    assert qa(focused, [TRIPLES[0], long], sides=["slots"], max_new_tokens=2)[0]["left_out"] == 0
    with pytest.raises(ICAEError) as error:
        qa(model, [long], sides=["text"], max_new_tokens=2)
    one_line(error.value, "positions")


def test_differences_are_paired(base, monkeypatch):
    """Two sides whose questions differ by the same amount have a difference without spread, however their means spread."""
    model = make_icae(base)
    said = iter([["noon", "noon green", "bell", "bell green"], ["noon", "noon", "bell", "bell"]])
    monkeypatch.setattr(model, "answers", lambda *_, **__: next(said))
    triples = [Triple(LINES[0], "?", a, (a,)) for a in ("noon", "noon green", "bell", "bell green")]
    results, _ = qa(model, triples, sides=["slots", "none"], batch_size=4)
    differences = [token_f1(a, [a]) - token_f1(a.split()[0], [a]) for a in ("noon", "noon green", "bell", "bell green")]
    assert results["f1_slots_minus_none"] == pytest.approx(np.mean(differences))
    low, high = results["f1_slots_minus_none_interval"]
    assert min(differences) <= low <= results["f1_slots_minus_none"] <= high <= max(differences)
    assert results["f1_slots"] == 1 and results["f1_slots_interval"] == (1, 1)


def test_only_the_wanted_sides_are_asked_and_others_refused(base):
    model = make_icae(base)
    results, rows = qa(model, TRIPLES[:2], sides=["none"], max_new_tokens=2)
    assert set(rows[0]) == {"prompt", "answers", "none"} and "budget" not in results
    with pytest.raises(ICAEError) as error:
        qa(model, TRIPLES, sides=["slots", "half"])
    one_line(error.value, "half", "deleted")


def test_joined_documents_are_made_alone_and_hold_the_asked_one(base, kind):
    model = make_icae(base, kind=kind, stirred=0.05)
    results, rows = documents(model, TRIPLES, count=2, max_new_tokens=3, batch_size=3, seed=1)
    assert {row["place"] for row in rows} == {0, 1}
    everyone = {t.context: model.compress(t.context) for t in TRIPLES}
    for t, row in zip(TRIPLES, rows, strict=True):
        own = everyone[t.context]
        assert row["one"] == model.answer(own, t.prompt, max_new_tokens=3)
        pairs = [[own, s] if row["place"] == 0 else [s, own] for c, s in everyone.items() if c != t.context]
        assert row["several"] in {model.answer(MemorySlots.concatenate(pair), t.prompt, max_new_tokens=3) for pair in pairs}
    assert {"n", "documents", "f1_one", "f1_several", "several_over_one", "f1_first", "f1_last"} <= results.keys()
    assert documents(model, TRIPLES, count=2, max_new_tokens=3, batch_size=8, seed=1)[1] == rows


@pytest.mark.parametrize(
    ("ask", "how"),
    [(documents, {}), (places, {"length": 100}), (places, {"length": 100, "whole": True}), (places, {"length": 100, "sides": ["text"]})],
)
def test_a_question_that_leaves_no_room_is_left_out_and_counted(base, ask, how):
    model, long = make_icae(base), Triple(TRIPLES[0].context, "Why? " * 300, "bell", ("bell",))
    results, rows = ask(model, [*TRIPLES[:5], long], max_new_tokens=2, batch_size=9, **how)
    assert (results["n"], results["left_out"]) == (5, 1) and [r["prompt"] for r in rows] == [t.prompt for t in TRIPLES[:5]]
    _, expected = ask(model, TRIPLES[:5], max_new_tokens=2, batch_size=9, **how)
    if ask is places:  # whose surroundings are each question's own
        assert rows == expected
    with pytest.raises(ICAEError) as error:
        ask(model, [*TRIPLES[:5]], max_new_tokens=500, **how)
    one_line(error.value, "no context leaves room", "500")


def test_a_long_context_and_a_long_prompt_have_room_side_by_side(base):
    """Padding takes no positions: what each row has room for alone, it has in a batch."""
    model, long = make_icae(base), Triple(" ".join(LINES * 40), "Question?", "bell", ("bell",))
    ids = base.encode(long.context)[: base.max_positions - 40]
    asked = [Triple(base.decode(ids), "Question?", "bell", ("bell",)), Triple(TRIPLES[0].context, "Why? " * 60, "bell", ("bell",))]
    results, rows = qa(model, asked, sides=["slots"], max_new_tokens=2)
    alone = [qa(model, [t], sides=["slots"], max_new_tokens=2)[1][0] for t in asked]
    assert results["left_out"] == 0 and rows == alone


def test_shortened_text_that_the_base_cannot_read_is_left_out_too(base):
    model = make_icae(base, focus=2)
    room = base.max_positions * model.config.ratio
    long = Triple(base.decode((base.encode(" ".join(LINES)) * 99)[: room + 40]), "Question?", "bell", ("bell",))
    assert qa(model, [TRIPLES[0], long], sides=["slots"], max_new_tokens=2)[0]["left_out"] == 0
    for side in ("cut", "deleted"):
        assert qa(model, [TRIPLES[0], long], sides=["slots", side], max_new_tokens=2)[0]["left_out"] == 1


def test_a_reading_of_nothing_grounds_nothing(base, monkeypatch):
    model = make_icae(base)
    monkeypatch.setattr(model, "reconstruct_ids", lambda slots, **_: [[] for _ in slots])
    _, rows = qa(model, TRIPLES[:2], sides=["slots_free", "slots_read"], max_new_tokens=3)
    assert all(row["slots_read"] == row["slots_free"] for row in rows)


def test_a_paragraph_longer_than_its_place_is_left_out_and_counted(base):
    model, long = make_icae(base), Triple(" ".join(LINES * 3), "Question?", "bell", ("bell",))
    results, rows = places(model, [*TRIPLES[:5], long], length=100, max_new_tokens=2)
    assert (results["n"], results["left_out"]) == (5, 1) and all(row["prompt"] != "Question?" for row in rows)
    with pytest.raises(ICAEError) as error:
        places(model, [long], length=100, max_new_tokens=2)
    one_line(error.value, "--length")


@pytest.mark.parametrize("whole", [True, False])
def test_places_ask_the_same_question_of_the_paragraphs_in_another_order(base, monkeypatch, whole):
    model = make_icae(base, segment_length=32)
    seen = []
    compress_ids = type(model).compress_ids
    monkeypatch.setattr(type(model), "compress_ids", lambda self, ids, **k: seen.extend(ids) or compress_ids(self, ids, **k))
    results, rows = places(model, TRIPLES[:5], length=100, whole=whole, max_new_tokens=2, batch_size=1)
    assert {f"f1_slots_{place}" for place in PLACES} | {"worst_over_best_slots"} <= results.keys()
    if whole:
        asked = sorted(TRIPLES[:5], key=lambda t: len(t.context))
        assert len(seen) == 15
        for n, t in enumerate(asked):
            own, (start, middle, end) = base.encode(t.context), seen[3 * n : 3 * n + 3]
            assert len(start) == len(middle) == len(end)
            assert start[: len(own)] == own == end[-len(own) :]
            assert own in [middle[at : at + len(own)] for at in range(len(middle))] or len(start) < 2 * len(own)
    else:
        paragraphs = [tuple(ids) for ids in seen]
        pool = {tuple(base.encode(t.context)) for t in TRIPLES[:5]}
        assert all(paragraphs.count(p) <= 1 for p in pool)  # whole paragraphs are compressed once for all questions and places
    assert all({f"slots_{place}" for place in PLACES} <= row.keys() for row in rows)


def test_places_fill_their_length_and_refuse_what_they_cannot(base):
    model = make_icae(base)
    with pytest.raises(ICAEError) as error:
        places(model, TRIPLES[:2], length=300, max_new_tokens=2)
    one_line(error.value, "300", "--length")
    with pytest.raises(ICAEError) as error:
        documents(model, TRIPLES[:1], max_new_tokens=2)
    one_line(error.value, "2 documents")


def test_questions_are_drawn_by_seed():
    assert drawn(TRIPLES, None, 0) == drawn(TRIPLES, 99, 0) == TRIPLES
    some = drawn(TRIPLES, 4, 0)
    assert len(some) == 4 and some == drawn(TRIPLES, 4, 0) and [t for t in TRIPLES if t in some] == some
    assert any(drawn(TRIPLES, 4, seed) != some for seed in range(1, 5))


def test_the_made_table_shows_what_the_evaluations_return(base, tmp_path, monkeypatch):
    """docs/make.py, on the figures of a tiny model: every reader has its row, and slots their share of the upper bound."""
    make = load_script("docs/make.py")
    monkeypatch.setattr(make, "ROOT", tmp_path)
    assert make.answers_table() == "Not measured yet.\n"
    model = make_icae(base)
    triples = [Triple(line, "?", line.split()[1], (line.split()[1],)) for line in LINES]
    said = iter([["harbour", "kettle", "bell"]] * 99)
    monkeypatch.setattr(model, "answers", lambda _, asked, **__: next(said)[: len(asked)])
    figures = {
        "qa": qa(model, triples, batch_size=3)[0],
        "qa-full-text": qa(model, triples, sides=["text", "none"], batch_size=3)[0] | {"f1_text": 0.5},
        "qa-documents": documents(model, triples, batch_size=3)[0],
        "qa-places": places(model, triples, length=100, batch_size=3)[0],
    }
    (tmp_path / "results").mkdir()
    for name, results in figures.items():
        settings = {"data": "d.jsonl", "samples": None, "seed": 0}
        report = {"name": name, "checkpoint": f"of {name}", "settings": settings, "results": results, "commit": "c0ffee"}
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(report))
    table = make.answers_table()
    assert table.count("| c0ffee |") == 6 and f"| {figures['qa']['f1_slots'] / 0.5:.1%} |" in table
    assert f"{figures['qa-documents']['several_over_one']:.1%}" in table and "at the middle" in table


def test_the_made_table_passes_over_reports_without_slots_and_bounds_of_other_questions(tmp_path, monkeypatch):
    make = load_script("docs/make.py")
    monkeypatch.setattr(make, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    about = {"data": "d.jsonl", "samples": None, "seed": 0}
    figures = {f"{figure}_{side}": 0.5 for figure in ("f1", "rouge1") for side in ("slots", "text")}
    figures |= {"n": 3, "f1_slots_interval": [0.4, 0.6], "f1_text_interval": [0.4, 0.6]}

    def write(name, kind, results, **settings):
        report = {"name": kind, "checkpoint": "c", "settings": about | settings, "results": results, "commit": "c0ffee"}
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(report))

    write("qa-none", "qa", {"n": 3, "f1_none": 0.1, "rouge1_none": 0.1, "f1_none_interval": [0.0, 0.2]})
    assert make.answers_table() == "Not measured yet.\n" and make.results_table() == ""
    for mine, others, alike in ((None, None, True), ("a", None, True), ("a", "a", True), ("a", "b", False)):
        write("qa", "qa", figures, **({"data_sha256": mine} if mine else {}))
        write("qa-bound", "qa-full-text", figures, **({"data_sha256": others} if others else {}))
        assert ("by the base fine-tuned on it" in make.answers_table()) == alike


def test_the_made_table_of_serving_tells_where_each_part_was_measured_if_they_differ(tmp_path, monkeypatch):
    make = load_script("docs/make.py")
    monkeypatch.setattr(make, "ROOT", tmp_path)
    (tmp_path / "results").mkdir()
    part = {"measures": [], "commit": "c0ffee"}
    report = {"checkpoint": "kv", "machine": "2 cores", "results": {"load": part, "soak": part}}
    (tmp_path / "results" / "serving.json").write_text(json.dumps(report))
    assert make.serving_table().endswith("\n\nkv; 2 cores.\n")
    report["results"]["soak"] = part | {"checkpoint": "größer", "machine": "1 core"}
    (tmp_path / "results" / "serving.json").write_text(json.dumps(report, ensure_ascii=False), encoding="utf-8")
    assert make.serving_table().endswith("\n\nload: kv; 2 cores.\nsoak: größer; 1 core.\n")
