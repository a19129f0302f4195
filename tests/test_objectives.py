from dataclasses import replace

import torch

from icae.objectives import Marker, autoencoding, collate, continuation, instruction, padded, pieces

CONTEXT = [11, 12, 13, 14, 15, 16, 17]


def masks(example):
    """(ids, which are scored) of one example, padding cut off, after collating it with a longer neighbour."""
    batch = collate([example, autoencoding(list(range(20, 50)), 64, None)])
    real = batch["real"][0]
    assert real.tolist() == sorted(real.tolist(), reverse=True)
    assert not (batch["scored"] & ~batch["real"]).any()
    return batch["text_ids"][0][real].tolist(), batch["scored"][0][real].int().tolist()


def test_autoencoding_scores_the_whole_context_and_its_end():
    e = autoencoding(CONTEXT, 4, eos=1)
    assert (e.segments, e.marker) == ([[11, 12, 13], [14, 15, 16, 17]], Marker.AE)
    assert masks(e) == ([*CONTEXT, 1], [1] * 8)
    assert masks(autoencoding(CONTEXT, 4, eos=None)) == (CONTEXT, [1] * 7)


def test_an_eos_of_id_zero_is_an_eos():
    assert masks(autoencoding(CONTEXT, 4, eos=0)) == ([*CONTEXT, 0], [1] * 8)


def test_continuation_scores_what_follows_but_its_unscored_first_tokens():
    e = continuation(CONTEXT, [21, 22, 23], 64, unscored=1)
    assert (e.segments, e.marker) == ([CONTEXT], Marker.LM)
    assert masks(e) == ([21, 22, 23], [0, 1, 1])
    assert masks(continuation(CONTEXT, [21, 22, 23], 64)) == ([21, 22, 23], [1, 1, 1])


def test_instruction_scores_the_response_and_not_the_prompt():
    e = instruction(CONTEXT, [31, 32], [41, 42, 1], 64)
    assert (e.segments, e.marker) == ([CONTEXT], Marker.FT)
    assert masks(e) == ([31, 32, 41, 42, 1], [0, 0, 1, 1, 1])


def test_a_batch_holds_each_segment_once_in_order():
    a, b, c = autoencoding(CONTEXT, 3, 1), continuation([51, 52], [53], 3), instruction(CONTEXT[1:5], [31], [41], 3)
    batch = collate([a, b, c])
    assert batch["groups"] == [[0, 1, 2], [3], [4, 5]]
    assert batch["lengths"] == [2, 2, 3, 2, 2, 2]
    rows = [row[:n].tolist() for row, n in zip(batch["segment_ids"], batch["lengths"], strict=True)]
    assert rows == a.segments + b.segments + c.segments
    assert batch["markers"].tolist() == [0, 1, 2]
    assert batch["text_ids"].shape == (3, 8)
    assert batch["ratio"] is None


def test_padding_is_on_the_right():
    assert torch.equal(padded([[5], [6, 7]]), torch.tensor([[5, 0], [6, 7]]))


def test_pieces_join_to_the_context():
    assert pieces(CONTEXT, 3) == [[11, 12], [13, 14], [15, 16, 17]]


def test_a_teachers_text_is_scored_at_the_same_tokens():
    taught = replace(instruction(CONTEXT, [31, 32], [41, 42, 1], 64), teacher=[61, 62, 63, 64, 65], distil=0.5, by_tutor=True)
    other = replace(instruction(CONTEXT, [31], [43, 1], 64), teacher=[66], distil=1.0)
    batch = collate([autoencoding(CONTEXT, 64, None), taught, instruction(CONTEXT, [31], [41], 64), other])
    teacher = batch["teacher"]
    assert (teacher["rows"].tolist(), teacher["weights"].tolist(), teacher["aligned"].tolist()) == ([1, 3], [0.5, 1.0], [0.0, 0.0])
    assert teacher["shared"].tolist() == [3, 2] and teacher["by_tutor"].tolist() == [True, False]
    assert [ids[real].tolist() for ids, real in zip(teacher["ids"], teacher["real"], strict=True)] == [
        [61, 62, 63, 64, 65, 41, 42, 1],
        [66, 43, 1],
    ]
    for row, ids, scored in zip((1, 3), teacher["ids"], teacher["scored"], strict=True):
        assert ids[scored].tolist() == batch["text_ids"][row][batch["scored"][row]].tolist()
    assert "teacher" not in collate([instruction(CONTEXT, [31], [41], 64)])


def test_a_segment_of_two_contexts_is_in_the_batch_once():
    a, b = instruction(CONTEXT, [31], [41], 4), continuation(CONTEXT[:3], [53], 4)
    batch = collate([a, b])
    assert batch["groups"] == [[0, 1], [0]] and batch["lengths"] == [3, 4]


def test_the_first_scored_token_may_weigh_more():
    heavy = replace(continuation(CONTEXT, [21, 22, 23], 64, unscored=1), first=8.0)
    plain = instruction(CONTEXT, [31], [41, 42], 64)
    assert collate([heavy, plain])["weights"].tolist() == [[0, 8, 1], [0, 1, 1]]
