import unicodedata

import pytest

from icae.overlap import Texts, grams

TEXTS = [
    "The harbour master keeps a brass lamp in the window.",
    "The governors met in the old town hall, and the vote was close.",
    "A storm took the roof of the mill in the night.",
]


def overlaps(prompt, texts):
    known = Texts()
    for text in texts:
        known.add(text)
    return known.shared(prompt)


@pytest.mark.parametrize(
    ("prompt", "best"),
    [
        ("Who keeps the LAMP?", 0),
        ("Which governor voted?", 1),  # neither word stands there as it is spelled here
        ("when did the storms come?", 2),
    ],
)
def test_the_text_that_shares_rare_letters_is_found(prompt, best):
    scores = overlaps(prompt, TEXTS)
    assert max(range(3), key=scores.__getitem__) == best and scores[best] > 2 * sorted(scores)[-2]


def test_what_all_texts_have_says_next_to_nothing():
    everywhere = overlaps("in the", TEXTS)
    assert max(everywhere) < 1 < max(overlaps("in the mill", TEXTS))


def test_nothing_in_common_is_zero():
    assert overlaps("xyz", TEXTS) == overlaps("", TEXTS) == overlaps("?!", TEXTS) == [0.0] * 3
    assert overlaps("lamp", []) == [] and overlaps("lamp", ["", "..."]) == [0.0, 0.0]


def test_scripts_without_spaces_have_grams():
    scores = overlaps("港长在窗户里放什么?", ["港长在窗户里放着一盏黄铜灯。", "州长们在旧市政厅开会。"])
    assert scores[0] > 0 == scores[1]


def test_what_is_written_onto_letters_belongs_to_the_word():
    assert grams("हिन्दी") == [" हिन", "हिन्", "िन्द", "न्दी", "्दी "]
    assert grams(unicodedata.normalize("NFD", "résumé")) == grams("Résumé")


def test_the_score_of_a_rare_gram_does_not_depend_on_how_many_texts_there_are():
    few, many = (overlaps("zebra", ["a zebra", *["a horse of sorts"] * n]) for n in (4, 400))
    assert few[0] == pytest.approx(many[0], rel=0.2) and few[0] > 3


def test_a_text_twice_as_long_does_not_win_by_its_length():
    short, long = overlaps("lamp", ["a lamp", "a lamp " + "and much else " * 9])
    assert short > long > 0


def test_grams_of_short_words_and_long_ones():
    assert grams("The lamp") == [" the", "the ", " lam", "lamp", "amp "]
    assert grams("a 1913") == [" a ", " 191", "1913", "913 "]
