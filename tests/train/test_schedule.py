from __future__ import annotations

from itertools import pairwise

import pytest

from r1ray.train.schedule import Schedule


def schedule(**changes) -> Schedule:
    return Schedule(**{"total_steps": 100, "warmup_share": 0.05, "floor_share": 0.1, **changes})


def test_warm_up_rises_to_the_peak_and_the_cosine_falls_to_the_floor() -> None:
    factors = [schedule().factor(step) for step in range(101)]
    assert 0 < factors[0] < factors[1] < factors[3] < 1
    assert factors[5] == pytest.approx(1)
    assert all(a >= b for a, b in pairwise(factors[5:]))
    assert factors[100] == pytest.approx(0.1)


def test_no_factor_exceeds_the_peak_however_short_the_run() -> None:
    for total in (1, 2, 3, 10, 19):
        assert max(schedule(total_steps=total).factor(step) for step in range(total)) <= 1


def test_a_time_budget_brings_the_rate_to_its_floor_before_the_steps_do() -> None:
    timed = schedule(total_steps=10_000, max_seconds=60.0, elapsed_s=60.0)
    assert timed.factor(40) == pytest.approx(0.1)
    assert timed.is_over(40, step_seconds=1)


def test_without_a_budget_time_changes_nothing() -> None:
    assert schedule(elapsed_s=1e6).factor(50) == schedule().factor(50)
    assert not schedule(elapsed_s=1e6).is_over(99, step_seconds=1)
    assert schedule().is_over(100, step_seconds=1)
