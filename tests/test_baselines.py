import numpy as np
import pytest
from tiny import base_logits, one_line, random_ids

from icae.baselines import cut_off, delete_by_surprise, surprise
from icae.errors import ICAEError


def test_cut_off_keeps_the_beginning():
    assert cut_off([5, 6, 7, 8], 3) == [5, 6, 7]
    assert cut_off([5, 6], 3) == [5, 6]


def test_surprise_is_the_bases_own_loss_token_by_token(base):
    (ids,) = random_ids(20)
    assert base.lead
    read = base.lead + ids
    likely = base_logits(base, read).log_softmax(-1)
    expected = [-float(likely[i - 1, read[i]]) for i in range(len(base.lead), len(read))]
    np.testing.assert_allclose(surprise(base, ids), expected, atol=1e-4)


def test_surprise_of_a_text_beyond_the_positions_is_read_in_pieces(base):
    (ids,) = random_ids(600)
    assert len(ids) > base.max_positions
    whole = surprise(base, ids)
    assert whole.shape == (600,)
    np.testing.assert_allclose(whole[300:], surprise(base, ids[300:]), atol=1e-4)


def test_deletion_keeps_exactly_the_most_surprising_tokens_in_order(base):
    (ids,) = random_ids(30)
    kept = delete_by_surprise(base, ids, 7)
    floor = np.sort(surprise(base, ids))[-7]
    assert kept == [i for i, s in zip(ids, surprise(base, ids), strict=True) if s >= floor]
    assert len(kept) == 7
    assert delete_by_surprise(base, ids, 30) == ids


@pytest.mark.parametrize("shorten", [lambda base, n: cut_off([1, 2], n), lambda base, n: delete_by_surprise(base, [1, 2], n)])
def test_a_budget_of_nothing_is_refused(base, shorten):
    with pytest.raises(ICAEError) as error:
        shorten(base, 0)
    one_line(error.value, "budget", 0)
