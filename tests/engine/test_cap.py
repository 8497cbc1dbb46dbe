"""The cap settles where the step time meets the objective, and leaves it alone without one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from r1ray.engine.cap import BatchCap
from r1ray.engine.config import EngineConfig


def settled(cap, seconds_per_stream, waiting=True, steps=600):
    for _ in range(steps):
        running = cap.value if waiting else min(cap.value, 2)
        cap.step(0.002 + seconds_per_stream * running, running, someone_waits=waiting)
    return cap.value


@given(st.floats(0.0005, 0.01))
def test_it_settles_below_the_objective(seconds_per_stream):
    cap = BatchCap(least=4, most=32, objective_s=0.05)
    value = settled(cap, seconds_per_stream)
    assert 0.002 + seconds_per_stream * value <= 0.05 or value == 4
    assert value == 32 or (0.002 + seconds_per_stream * value) * (value + 1) / value > 0.05


def test_it_falls_when_the_machine_gets_slower():
    cap = BatchCap(least=2, most=16, objective_s=0.05)
    assert settled(cap, 0.001) == 16
    assert settled(cap, 0.01) == 4


@pytest.mark.parametrize(("objective_s", "waiting", "expected"), [(None, True, 16), (0.05, False, 4)])
def test_without_an_objective_or_a_queue_it_stays(objective_s, waiting, expected):
    assert settled(BatchCap(least=4, most=16, objective_s=objective_s), 0.001, waiting=waiting) == expected


def test_in_a_pipeline_the_cap_follows_what_a_stream_waits_and_not_what_a_pass_takes():
    """Four passes make a round: each gives a quarter of the streams a token, for which they have waited four passes."""
    cap, steps = BatchCap(least=4, most=32, objective_s=0.05), []
    for _ in range(2400):
        before = cap.value
        cap.step(0.002 * cap.value, cap.value, someone_waits=True, share=0.25)
        steps.append(cap.value != before)
    assert cap.value == 25  # 50 ms / 2 ms
    first = steps.index(True)
    assert first + 1 == 32, "eight rounds of four passes"


def test_a_profile_sets_what_is_not_set_beside_it():
    config = EngineConfig(profile="adaptive", num_slots=16)
    assert (config.min_slots, config.num_slots, config.tpot_objective_ms) == (4, 16, 100.0)
    assert EngineConfig().tpot_objective_ms is None
