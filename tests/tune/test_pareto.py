"""The front holds what nothing beats; the rule takes from it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1ray.tune.pareto import best_within, dominates, front

MODES = ("max", "min")
NUMBERS = st.integers(-5, 5).map(float)
POINTS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=30)


def test_the_front_of_quality_and_latency():
    points = [(0.8, 2.0), (0.9, 3.0), (0.7, 2.5), (0.9, 3.5), (0.5, 1.0)]
    assert front(points, MODES) == [0, 1, 4]


def test_a_point_without_a_number_is_never_on_the_front():
    assert front([(math.nan, 0.0), (0.1, math.inf), (0.1, 1.0)], MODES) == [2]
    assert front([(math.nan, 1.0)], MODES) == []


@given(POINTS)
def test_nothing_dominates_the_front_and_all_else_is_dominated(points):
    chosen = front(points, MODES)
    assert chosen
    for i, point in enumerate(points):
        assert any(dominates(other, point, MODES) for other in points) == (i not in chosen)


@given(POINTS)
def test_the_front_of_the_front_is_itself_and_ignores_order(points):
    chosen = [points[i] for i in front(points, MODES)]
    assert [chosen[i] for i in front(chosen, MODES)] == chosen
    backwards = points[::-1]
    assert sorted(backwards[i] for i in front(backwards, MODES)) == sorted(chosen)


@given(POINTS, NUMBERS)
def test_the_best_within_a_limit_is_allowed_and_unbeaten_there(points, limit):
    quality, cost = zip(*points, strict=True)
    if min(cost) > limit:
        with pytest.raises(ValueError, match="empty"):
            best_within(quality, cost, limit)
        return
    best = best_within(quality, cost, limit)
    assert cost[best] <= limit
    assert not any(dominates(p, points[best], MODES) for p in points if p[1] <= limit)
    assert best in front(points, MODES)


def test_equal_quality_goes_to_the_cheaper_then_to_the_earlier():
    assert best_within([0.9, 0.9, 0.9], [2.0, 1.0, 1.0], 5.0) == 1
