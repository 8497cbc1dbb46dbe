"""Layers into stages: contiguous, complete, and no split has a cheaper dearest stage."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1ray.errors import InvalidValue
from r1ray.model.split import split_layers


def dearest(ranges, costs, before, after):
    totals = [sum(costs[first:last]) for first, last in ranges]
    totals[0] += before
    totals[-1] += after
    return max(totals)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 4), st.integers(0, 20), st.integers(0, 20))
def test_no_other_split_is_better(costs, num_stages, before, after):
    num_stages = min(num_stages, len(costs))
    ranges = split_layers(costs, num_stages, before=before, after=after)
    assert [first for first, _ in ranges] == [0, *(last for _, last in ranges[:-1])]
    assert ranges[-1][1] == len(costs)
    cuts = itertools.combinations(range(1, len(costs)), num_stages - 1)
    best = min(dearest(list(itertools.pairwise((0, *cut, len(costs)))), costs, before, after) for cut in cuts)
    assert dearest(ranges, costs, before, after) == best


def test_more_stages_than_layers_are_refused():
    with pytest.raises(InvalidValue, match="5 stages for 4 layers"):
        split_layers([1, 1, 1, 1], 5)
