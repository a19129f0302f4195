import math

import pytest

from icae.metrics import bleu, exact_match, interval, perplexity, rouge1, token_f1


def test_bleu_of_the_same_text_is_100_and_of_another_near_0():
    text = "the mill grinds grain with the force of the tide twice a day"
    assert bleu(text, text) == pytest.approx(100)
    assert bleu("a wholly other sentence about ships", text) < 5


@pytest.mark.parametrize(
    ("ids", "reference", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], 1.0),
        ([1, 2, 9, 4], [1, 2, 3, 4], 0.5),
        ([9, 2, 3], [1, 2, 3], 0.0),
        ([1, 2], [1, 2, 3, 4], 0.5),
        ([], [1], 0.0),
    ],
)
def test_exact_match_is_the_matching_prefix_over_the_reference_length(ids, reference, expected):
    assert exact_match(ids, reference) == expected


def test_perplexity_of_a_uniform_guess_among_n_is_n():
    assert perplexity([math.log(7)] * 5) == pytest.approx(7)


def test_token_f1_ignores_case_articles_and_punctuation_and_takes_the_best_reference():
    assert token_f1("The tide mill.", ["tide mill"]) == 1.0
    assert token_f1("a red gate", ["brass cup", "red lamp"]) == pytest.approx(0.5)
    assert token_f1("", ["brass"]) == 0.0


def test_rouge1_ignores_word_order():
    assert rouge1("mill tide the", "the tide mill") == pytest.approx(1.0)
    assert rouge1("ship", "the tide mill") == 0.0


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("Высокая башня, у моря", "у моря башня", 6 / 7),
        ("тысяча", "у моря башня", 0.0),
        ("灯在窗边", "灯在", 2 / 3),
        ("моря Beyoncé", "Beyoncé", 1.0),  # as rouge_score has it: letters of no other script count
        ("beyonc", "Beyoncé", 1.0),
        ("в 1998", "1998", 1.0),
    ],
)
def test_rouge1_knows_scripts_that_rouge_score_does_not(text, reference, expected):
    assert rouge1(text, reference) == pytest.approx(expected)


def test_interval_holds_the_mean_and_narrows_with_samples():
    few, many = [0.0, 1.0] * 5, [0.0, 1.0] * 500
    low, high = interval(few)
    assert low < 0.5 < high
    assert interval(many)[1] - interval(many)[0] < (high - low) / 5
