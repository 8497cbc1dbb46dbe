"""Distinct-n and spread say what their definitions say; class limits drop no row too many."""

import numpy as np
import pytest

from r1ray.data.balance import beyond_cap, beyond_ratio, draw
from r1ray.data.diversity import distinct, diversity, hashed_ngrams, spread


def test_distinct_n_counts_words_and_chinese_characters():
    assert distinct(["a b a b"], 1) == 0.5
    assert distinct(["a b a b"], 2) == pytest.approx(2 / 3)
    assert distinct(["我的卡", "我的卡"], 1) == 0.5
    assert distinct([""], 1) == 0


def test_spread_is_one_minus_the_mean_cosine_of_all_pairs():
    vectors = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = [units[i] @ units[j] for i in range(20) for j in range(20) if i != j]
    assert spread(vectors) == pytest.approx(1 - np.mean(pairs), abs=1e-6)


def test_repeated_questions_have_no_spread_and_different_ones_much():
    assert spread(hashed_ngrams(["where is my card"] * 5)) == pytest.approx(0, abs=1e-6)
    assert spread(hashed_ngrams(["where is my card", "贷款利率是多少", "open an account", "ok"])) > 0.8


def test_an_embedder_can_be_passed_in():
    assert diversity(["a", "b"], lambda texts: np.eye(len(texts), dtype=np.float32))["spread"] == pytest.approx(1)
    assert diversity(["a"]) == {}


@pytest.mark.parametrize(("negatives", "positives", "kept"), [(30, 10, (15, 10)), (10, 30, (10, 10)), (12, 10, (12, 10)), (0, 5, (0, 5))])
def test_negatives_per_positive_are_brought_between_1_and_1_5(negatives, positives, kept):
    total = negatives + positives
    negative = np.arange(total) < negatives
    gone = beyond_ratio(negative, ~negative, np.random.default_rng(0).random(total), np.ones(total, bool), (1.0, 1.5))
    assert ((negative & ~gone).sum(), (~negative & ~gone).sum()) == kept


def test_a_cap_spares_rows_without_a_label():
    labels = np.array([0, 0, 0, 1, -1, -1, -1])
    gone = beyond_cap(labels, np.linspace(0, 1, 7), np.ones(7, bool), 2)
    assert list(gone) == [False, False, True, False, False, False, False]


def test_draws_are_uniform_and_shared_by_copies():
    draws = [draw(0, "x", f"row-{n}") for n in range(2000)]
    assert abs(np.mean(draws) - 0.5) < 0.02
    assert draw(0, "x", "a") == draw(0, "x", "a#2") != draw(1, "x", "a")
