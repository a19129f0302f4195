import copy
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from tiny import LINES, one_line

import icae.data
from icae.base import Base
from icae.config import ICAEConfig, TrainConfig
from icae.data import Corpus, HeldOut, Windows, documents, load_corpus, load_texts, read_text
from icae.errors import ICAEError
from icae.objectives import Marker

CONFIG = ICAEConfig(segment_length=16)


def corpus_of(*lengths):
    """Documents of consecutive ids: 100, 101, ... ; 200, 201, ..."""
    ids = np.concatenate([np.arange(n, dtype=np.uint32) + 100 * (i + 1) for i, n in enumerate(lengths)])
    return Corpus(ids, np.cumsum([0, *lengths]))


def windows(base, corpus=None, *, processes=1, config=CONFIG, **settings):
    settings = {"steps": 30, "windows": [[0, 12]], "continuation_length": 6, **settings}
    return Windows(corpus or corpus_of(60, 50), base, config, TrainConfig(**settings), processes=processes)


def rows_to_jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows), "utf-8")
    return str(path)


def refused(call, *parts):
    with pytest.raises(ICAEError) as error:
        call()
    one_line(error.value, *parts)


# ---- text ----


@pytest.mark.parametrize("data", [b"plain\0zero", b"\xff\xfe\x00t", b"\xe9t\xe9", os.urandom(300) + b"\xff"])
def test_a_file_that_is_no_text_is_refused(tmp_path, data):
    (tmp_path / "a.bin").write_bytes(data)
    refused(lambda: read_text(tmp_path / "a.bin"), "a.bin", "not a text in UTF-8")


def test_missing_files_and_folders_are_refused(tmp_path):
    refused(lambda: read_text(tmp_path / "none.txt"), "none.txt")
    refused(lambda: read_text(tmp_path), str(tmp_path), "Is a directory")
    refused(lambda: list(documents(str(tmp_path / "none.txt"))), "none.txt")
    refused(lambda: list(documents(str(tmp_path))), "holds no .txt")


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read_text(tmp_path / "a.txt") == "hello"


def test_documents_of_a_folder_come_by_name_and_those_of_a_jsonl_by_line(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in {"b.txt": "second", "a.txt": "first", "sub/c.txt": "third", "d.md": "no"}.items():
        (tmp_path / name).write_text(text)
    assert list(documents(str(tmp_path))) == ["first", "second", "third"]
    assert list(documents(str(tmp_path / "b.txt"))) == ["second"]
    odd = "line separators \u2028 and \x85 stay inside"
    assert list(documents(rows_to_jsonl(tmp_path / "x.jsonl", [{"text": odd}, {"input": "context"}]))) == [odd, "context"]


@pytest.mark.parametrize("row", ['{"text": ', '{"other": "x"}', "[1]", '"text"', "3", '{"text": 5}', '{"text": "half of a text \\ud83d"}'])
def test_a_bad_line_of_a_jsonl_is_named(tmp_path, row):
    path = rows_to_jsonl(tmp_path / "x.jsonl", [{"text": "fine"}, row])
    refused(lambda: list(documents(path)), "x.jsonl, line 2", "text")


def test_what_is_json_is_no_text_and_nothing_is_nothing(tmp_path):
    (tmp_path / "squad.json").write_text('{"data": []}')
    refused(lambda: list(documents(str(tmp_path / "squad.json"))), "squad.json", ".jsonl")
    refused(lambda: list(documents("")), "empty")


# ---- corpus ----


def test_windows_lie_in_one_document_and_every_place_comes_up(base):
    corpus, chance = corpus_of(12, 3, 10), np.random.default_rng(0)
    drawn = [corpus.window(chance, 8) for _ in range(400)]
    assert all(w == list(range(w[0], w[0] + 8)) for w in drawn)
    starts = [w[0] for w in drawn]
    assert set(starts) == {100, 101, 102, 103, 104, 300, 301, 302}
    assert max(map(starts.count, set(starts))) < 3 * min(map(starts.count, set(starts)))


def test_windows_longer_than_every_document_are_refused():
    refused(lambda: corpus_of(12, 3).window(np.random.default_rng(0), 13), "no document has 13 tokens")


def test_a_corpus_is_its_documents_ids_end_to_end(base, home, tmp_path):
    for i, line in enumerate(LINES):
        (tmp_path / f"{i}.txt").write_text(line)
    corpus = load_corpus(str(tmp_path), base)
    assert corpus.ids.tolist() == [i for line in LINES for i in base.encode(line)]
    assert np.diff(corpus.starts).tolist() == [len(base.encode(line)) for line in LINES]
    assert load_corpus(str(tmp_path), base, max_tokens=1).starts.tolist() == [0, len(base.encode(LINES[0]))]


def test_a_corpus_is_tokenised_once_and_again_when_its_text_has_changed(base, home, tmp_path, monkeypatch):
    file = tmp_path / "a.txt"
    file.write_text(LINES[0])
    first = load_corpus(str(file), base)
    with monkeypatch.context() as m:
        m.setattr(icae.data, "documents", lambda *_: pytest.fail("read again"))
        assert load_corpus(str(file), base).ids.tolist() == first.ids.tolist()
    time.sleep(0.01)
    file.write_text(LINES[0][::-1])  # as long as before
    assert load_corpus(str(file), base).ids.tolist() == base.encode(LINES[0][::-1])


def test_a_corpus_is_tokenised_again_by_another_tokenizer(base, home, tmp_path):
    (tmp_path / "a.txt").write_text(LINES[0])
    first = load_corpus(str(tmp_path / "a.txt"), base)
    other = copy.deepcopy(base.tokenizer)
    other.add_tokens(["harbour", LINES[0].split()[1]])
    changed = Base(base.model, other, base.name, base.fingerprint)
    assert load_corpus(str(tmp_path / "a.txt"), changed).ids.tolist() == changed.encode(LINES[0]) != first.ids.tolist()


def test_a_window_that_the_base_has_no_positions_for_is_refused_at_the_start(base):
    long = base.max_positions // 2
    for settings in ({"windows": [[0, 8], [5, long]], "autoencoding_share": 1.0}, {"windows": [[0, long, 4]], "autoencoding_share": 0.0}):
        refused(lambda settings=settings: windows(base, corpus_of(8 * long), **settings), "positions", str(base.max_positions))


def test_several_sources_give_windows_by_size_or_by_share(base, home, tmp_path):
    texts = {str(tmp_path / "a.txt"): LINES[0] * 9, str(tmp_path / "b.txt"): LINES[1] * 3}
    for path, text in texts.items():
        Path(path).write_text(text)
    chance = np.random.default_rng(0)

    def share_of_first(source):
        mixture = load_texts(source, base)
        first = str(mixture.corpora[0].ids.tolist())[1:-1]
        return sum(str(mixture.window(chance, 12))[1:-1] in first for _ in range(400)) / 400

    assert share_of_first(list(texts)) == pytest.approx(0.75, abs=0.1)
    assert share_of_first(dict.fromkeys(texts, 2.0)) == pytest.approx(0.5, abs=0.1)
    refused(lambda: load_texts(list(texts), base).window(chance, 1000), "no document has 1000 tokens")


def test_recall_goes_on_from_a_place_inside_the_context(base):
    data = windows(base, autoencoding_share=0.0, recall_share=0.5, recall_cue=3)
    recalled = [e for e in (data[i] for i in range(60)) if e.prompt]
    assert 20 < len(recalled) < 40
    for e in recalled:
        context = [t for s in e.segments for t in s]
        assert e.marker == Marker.LM and len(e.prompt) == len(e.target) == 3
        assert e.prompt + e.target == list(range(e.prompt[0], e.prompt[0] + 6)) and {*e.prompt, *e.target} <= {*context}
    assert len({e.prompt[0] - e.segments[0][0] for e in recalled}) > 3


def test_a_source_without_text_is_refused(base, home, tmp_path):
    (tmp_path / "a.txt").write_text("")
    refused(lambda: load_corpus(str(tmp_path), base), "holds no text")


# ---- pretraining samples ----


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.25, 30), (0.5, 60), (0.7, 84), (1.0, 120)])
def test_lambdas_share_of_the_samples_autoencodes_exactly(base, share, count):
    data = windows(base, autoencoding_share=share)
    markers = [data[i].marker for i in range(len(data))]
    assert len(markers) == 120 and markers.count(Marker.AE) == count
    for at in range(0, 120, 20):
        assert markers[at : at + 20].count(Marker.AE) == round(20 * share)


def test_a_sample_is_a_function_of_seed_and_index(base):
    a, b, other = windows(base), windows(base), windows(base, seed=1)
    order = np.random.default_rng(0).permutation(40)
    assert [b[int(i)] for i in order] == [a[int(i)] for i in order]
    assert [a[i] for i in range(10)] != [other[i] for i in range(10)]
    assert len({str(a[i]) for i in range(40)}) > 30


def test_samples_are_windows_and_what_follows_them(base):
    data = windows(base, autoencoding_share=0.5)
    for i in range(40):
        e = data[i]
        context = [t for s in e.segments for t in s]
        assert context == list(range(context[0], context[0] + 12))
        if e.marker == Marker.AE:
            assert e.target == [*context, base.tokenizer.eos_token_id]
        else:
            assert e.target == list(range(context[-1] + 1, context[-1] + 7))


def test_where_the_base_teaches_it_reads_the_context_and_the_cue(base):
    data = windows(base, autoencoding_share=0.5, recall_share=0.5, recall_cue=2, continuation_distil=0.75, first_weight=8)
    seen = set()
    for i in range(40):
        e = data[i]
        context = [t for s in e.segments for t in s]
        taught = e.marker == Marker.LM
        assert (e.teacher, e.distil, e.first) == ((base.lead + context + e.prompt, 0.75, 1) if taught else ([], 0, 8))
        seen.add((taught, bool(e.prompt)))
    assert seen == {(False, False), (True, False), (True, True)}


def test_autoencoding_may_go_without_eos(base):
    e = windows(base, autoencoding_share=1.0, autoencoding_eos=False)[0]
    assert e.target == e.segments[0]


def test_the_curriculum_sets_the_window_by_step(base):
    data = windows(base, windows=[[0, 4], [2, 8], [5, 16]], batch_size=2, accumulation=2, steps=7, autoencoding_share=1.0)
    assert len(data) == 28
    assert [sum(map(len, data[i].segments)) for i in range(28)] == [4] * 8 + [8] * 12 + [16] * 8


def test_processes_and_accumulation_see_the_same_samples_in_the_same_step(base):
    settings = {"windows": [[0, 4], [3, 8]], "batch_size": 2, "ratios": [2, 4, 8]}
    one, two = windows(base, accumulation=2, **settings), windows(base, processes=2, **settings)
    assert len(one) == len(two)
    assert [one[i] for i in range(len(one))] == [two[i] for i in range(len(two))]


def test_a_batch_has_one_ratio_and_the_ratios_all_come_up(base):
    data = windows(base, ratios=[2, 4, 8], batch_size=4)
    ratios = [data[i].ratio for i in range(len(data))]
    assert all(len(set(ratios[at : at + 4])) == 1 for at in range(0, len(ratios), 4))
    assert set(ratios) == {2, 4, 8}


def test_continuations_draw_their_segments_and_never_more_target_than_window(base):
    data = windows(base, autoencoding_share=0.0, continuation_length=99, windows=[[0, 8, 3]], continuation_unscored=2)
    counts = [len(data[i].segments) for i in range(60)]
    assert set(counts) == {1, 2, 3}
    for i in range(60):
        assert {len(s) for s in data[i].segments} == {8} and len(data[i].target) == 8 and data[i].unscored == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"continuation_unscored": 12, "continuation_length": 20},  # the window is no longer
        {"continuation_unscored": 6, "continuation_length": 6},
        {"recall_share": 1.0, "continuation_length": 1},
    ],
)
def test_continuations_of_which_nothing_would_be_scored_are_refused(base, settings):
    refused(lambda: windows(base, autoencoding_share=0.5, **settings), "continuation_length")
    windows(base, autoencoding_share=1.0, **settings)


def test_held_out_samples_are_fixed_whatever_the_runs_seed_and_curriculum(base):
    a = HeldOut(windows(base, seed=0, windows=[[0, 4], [9, 12]], ratios=[8]), 10)
    b = HeldOut(windows(base, seed=7, windows=[[0, 12]], steps=3), 10)
    assert len(a) == 10 and [a[i] for i in range(10)] == [b[i] for i in range(10)]
    assert {sum(map(len, a[i].segments)) for i in range(10)} == {12} and {a[i].ratio for i in range(10)} == {None}
