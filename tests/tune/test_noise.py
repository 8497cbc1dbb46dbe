"""What is better by luck is not taken for better, and what is better is."""

import numpy as np
import pytest

from r1ray.tune.noise import gains


def answers(rng, num_examples, probability, hardness):
    """Right or wrong per example, as shares of one metric; `hardness` is common to all settings."""
    return {"exact_match": [(float(right), 1.0) for right in rng.random(num_examples) + hardness < probability + 0.5]}


def smallest_gains(rng, probabilities, num_examples=150):
    hardness = rng.random(num_examples)
    shares = [answers(rng, num_examples, probability, hardness) for probability in probabilities]
    return [gain.at_least for gain in gains(shares, 0, confidence=0.95, seed=0)][1:]


def test_of_nineteen_equal_settings_hardly_ever_one_seems_better():
    rng = np.random.default_rng(1)
    wrong = sum(max(smallest_gains(rng, [0.5] * 20)) > 0 for _ in range(60))
    assert wrong <= 8  # 5 % of 60 are 3; the chance of more than 8 is below 0.5 %


def test_the_best_of_nineteen_equal_settings_looks_better_without_the_bound():
    rng = np.random.default_rng(1)
    hardness = rng.random(24)
    shares = [answers(rng, 24, 0.5, hardness) for _ in range(20)]
    found = gains(shares, 0, confidence=0.95, seed=0)
    assert max(gain.gain for gain in found) > 0.05
    assert max(gain.at_least for gain in found) <= 0


def test_a_setting_that_is_far_better_is_found():
    rng = np.random.default_rng(2)
    found = sum(smallest_gains(rng, [0.5, 0.5, 0.85])[1] > 0 for _ in range(20))
    assert found >= 18


def test_a_difference_counts_more_when_the_same_examples_are_hard_for_both():
    num = 200
    hard = [i % 2 for i in range(num)]
    baseline = {"rouge_l": [(0.2 if is_hard else 0.8, 1.0) for is_hard in hard]}
    better = {"rouge_l": [((0.2 if is_hard else 0.8) + 0.01 * (i % 3), 1.0) for i, is_hard in enumerate(hard)]}
    own, gain = gains([baseline, better], 0, confidence=0.95, seed=0)
    assert gain.gain == pytest.approx(0.01, abs=1e-3)
    assert gain.gain_se < own.quality_se / 10
    assert gain.at_least > 0


def test_equal_answers_gain_nothing_and_the_baseline_is_all_zero():
    shares = {"intent_accuracy": [(1.0, 1.0), (0.0, 1.0), (1.0, 1.0)]}
    for gain in gains([shares, shares], 1, confidence=0.95, seed=0):
        assert (gain.gain, gain.gain_se, gain.at_least) == (0.0, 0.0, 0.0)
        assert gain.quality_se > 0


def test_quality_is_the_mean_of_metrics_that_count_by_their_own_denominators():
    baseline = {"a": [(1.0, 1.0), (0.0, 1.0)], "b": [(0.0, 0.0), (2.0, 4.0)]}
    other = {"a": [(1.0, 1.0), (1.0, 1.0)], "b": [(0.0, 0.0), (4.0, 4.0)], "c": [(1.0, 1.0), (1.0, 1.0)]}
    assert gains([baseline, other], 0, confidence=0.9, seed=0)[1].gain == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no metric in common"):
        gains([baseline, {"c": [(1.0, 1.0), (1.0, 1.0)]}], 0, confidence=0.9, seed=0)


def test_one_example_proves_nothing():
    worse, better = {"a": [(0.0, 1.0)]}, {"a": [(1.0, 1.0)]}
    assert gains([worse, better], 0, confidence=0.95, seed=0)[1].gain_se == 0  # so a smallest number of examples is the rule's business
