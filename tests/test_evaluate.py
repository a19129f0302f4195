import numpy as np
import pytest
from tiny import make_icae, random_ids, random_slots

from icae.data import Corpus
from icae.errors import ICAEError
from icae.evaluate import autoencoding, continuation, score_reconstruction


@pytest.fixture
def corpus():
    (ids,) = random_ids(300)
    return Corpus(np.array(ids, dtype=np.uint32), np.array([0, 120, 300]))


def test_autoencoding_gives_a_row_a_length_and_the_same_rows_for_the_same_seed(base, kind, corpus):
    model = make_icae(base, kind=kind, stirred=0.05)
    rows = autoencoding(model, corpus, lengths=[8, 20], samples=3, seed=4)
    assert [r["length"] for r in rows] == [8, 20]
    assert all(0 <= r["bleu"] <= 100 and 0 <= r["exact_match"] <= 1 and r["loss"] > 0 for r in rows)
    assert autoencoding(model, corpus, lengths=[20], samples=3, seed=4)[0] == rows[1]
    assert autoencoding(model, corpus, lengths=[20], samples=3, seed=5)[0]["loss"] != rows[1]["loss"]


def test_score_reconstruction_is_the_mean_over_all_tokens_of_all_segments(base, kind):
    model = make_icae(base, kind=kind, stirred=0.05, segment_length=8)
    ids = random_ids(19)[0]
    slots = model.compress_ids([ids])[0]
    assert len(slots.segments) == 3
    ends = np.cumsum([0] + [s.tokens for s in slots.segments])
    parts = [score_reconstruction(model, s, ids[a:b])[0] for s, a, b in zip(slots.split(), ends[:-1], ends[1:], strict=True)]
    whole = score_reconstruction(model, slots, ids)[0]
    assert whole == pytest.approx(np.average(parts, weights=np.diff(ends)), abs=1e-5)


def test_score_reconstruction_refuses_another_text(base):
    with pytest.raises(ICAEError, match="not the text"):
        score_reconstruction(make_icae(base), random_slots(), [1, 2, 3])


def test_continuation_from_text_is_the_bases_own_perplexity(base, corpus):
    from tiny import base_logits

    model = make_icae(base)
    result = continuation(model, corpus, length=12, target=5, samples=2, seed=1)
    chance = np.random.default_rng([1, 12, 5])
    nll = []
    for _ in range(2):
        window = corpus.window(chance, 17)
        read = base.lead + window
        likely = base_logits(base, read).log_softmax(-1)
        nll += [-float(likely[i - 1, read[i]]) for i in range(len(read) - 4, len(read))]
    assert result["ppl_text"] == pytest.approx(np.exp(np.mean(nll)), rel=1e-4)
    assert result["ppl_slots"] != result["ppl_none"]
