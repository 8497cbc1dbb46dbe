"""The simulator: against a plain step-by-step play of the same rules, against queueing theory, and its fit against known costs."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1ray.engine.simulate import Limits, Sample, StepCost, Trace, fit, lengths, poisson, read_trace, simulate
from r1ray.errors import InvalidValue

COST = StepCost(fixed=0.01, per_prefill_token=1e-4, per_row=5e-4, per_context_token=1e-7)


def trace(*requests):
    arrivals, prompts, answers = zip(*requests, strict=True)
    return Trace(np.array(arrivals, dtype=float), np.array(prompts), np.array(answers))


def step_by_step(played, cost, limits):
    """The same rules without leaps and without a cache limit: (first, last) token's time per request."""
    waiting = list(zip(range(len(played.arrivals)), played.arrivals, played.prompts, played.answers, strict=True))
    now, reading, decoding, first, last = 0.0, [], [], {}, {}
    while waiting or reading or decoding:
        while waiting and waiting[0][1] <= now and len(reading) + len(decoding) < limits.num_slots:
            number, _, prompt, answer = waiting.pop(0)
            reading.append({"n": number, "left": prompt, "prompt": prompt, "answer": answer, "made": 0})
        if not reading and not decoding:
            now = waiting[0][1]
            continue
        budget = limits.prefill_chunk * (1 if decoding else limits.idle_factor)
        read = 0
        for job in reading:
            piece = min(budget - read, job["left"])
            job["left"], read = job["left"] - piece, read + piece
        now += cost.seconds(read, len(decoding), sum(job["prompt"] + job["made"] for job in decoding))
        for job in decoding:
            job["made"] += 1
        for job in [job for job in reading if not job["left"]]:
            reading.remove(job)
            job["made"], first[job["n"]] = 1, now
            decoding.append(job)
        for job in [job for job in decoding if job["made"] == job["answer"]]:
            decoding.remove(job)
            last[job["n"]] = now
    return first, last


@settings(max_examples=60, deadline=None)
@given(
    gaps=st.lists(st.floats(0, 0.3), min_size=1, max_size=25),
    seed=st.integers(0, 99),
    num_slots=st.integers(1, 6),
    prefill_chunk=st.integers(8, 64),
)
def test_leaps_change_nothing(gaps, seed, num_slots, prefill_chunk):
    rng = np.random.default_rng(seed)
    played = Trace(np.cumsum(gaps), rng.integers(1, 120, len(gaps)), rng.integers(1, 30, len(gaps)))
    limits = Limits(num_slots=num_slots, prefill_chunk=prefill_chunk)
    outcome = simulate(played, COST, limits)
    first, last = step_by_step(played, COST, limits)
    numbers = range(len(gaps))
    assert outcome.ttft == pytest.approx([first[n] - played.arrivals[n] for n in numbers], abs=1e-9)
    assert outcome.total == pytest.approx([last[n] - played.arrivals[n] for n in numbers], abs=1e-9)


def test_a_lone_request_pays_for_its_prompt_and_each_of_its_tokens():
    outcome = simulate(trace((5.0, 100, 11)), COST, Limits(num_slots=4, prefill_chunk=256))
    assert outcome.ttft == pytest.approx([0.01 + 100 * 1e-4])
    assert outcome.tpot == pytest.approx([0.0105 + 1e-7 * (101 + 110) / 2])


def test_a_long_prompt_is_read_in_pieces_beside_decoding_and_in_larger_ones_alone():
    limits = Limits(num_slots=2, prefill_chunk=100, idle_factor=4)
    assert simulate(trace((0, 400, 1)), COST, limits).num_steps == 1
    beside = simulate(trace((0, 10, 200), (0.02, 400, 1)), COST, limits)
    assert beside.ttft[1] > 4 * 0.01


def test_without_a_free_slot_a_request_waits_for_the_first_to_end():
    outcome = simulate(trace((0, 10, 50), (0, 10, 50)), COST, Limits(num_slots=1))
    assert outcome.queued[0] == 0
    assert outcome.queued[1] == pytest.approx(outcome.total[0])
    assert outcome.mean_running == pytest.approx(1)


def test_a_full_cache_preempts_and_everything_still_finishes():
    played = poisson(rate=50, num=200, prompt="10-60", answer="20-60", seed=1)
    roomy = simulate(played, COST, Limits(num_slots=16))
    tight = simulate(played, COST, Limits(num_slots=16, cache_tokens=300))
    assert len(tight.ttft) == len(roomy.ttft) == 200
    assert tight.num_preempted > 0
    assert tight.most_cached <= 300
    assert tight.seconds > roomy.seconds
    assert tight.num_tokens == roomy.num_tokens


def test_a_queue_limit_refuses_what_comes_too_many():
    outcome = simulate(trace(*((0.0, 10, 20) for _ in range(10))), COST, Limits(num_slots=2, max_waiting=3))
    assert (outcome.num_rejected, len(outcome.ttft)) == (5, 5)


def test_a_single_slot_obeys_the_pollaczek_khinchine_formula():
    """Poisson arrivals, one server, uniform service times: mean wait = rate * E[S^2] / (2 (1 - load))."""
    cost = StepCost(fixed=0.01, per_prefill_token=0, per_row=0, per_context_token=0)
    played = poisson(rate=6, num=60_000, prompt="1", answer="1-20", seed=3)
    service = 0.01 * np.arange(1, 21)
    load = 6 * service.mean()
    expected = 6 * (service**2).mean() / (2 * (1 - load))
    assert simulate(played, cost, Limits(num_slots=1)).queued.mean() == pytest.approx(expected, rel=0.05)


def test_ten_thousand_requests_take_less_than_ten_seconds():
    played = poisson(rate=4, num=10_000, prompt="~512", answer="~200", seed=0)
    begin = time.perf_counter()
    outcome = simulate(played, COST, Limits(num_slots=64, cache_tokens=30_000))
    assert time.perf_counter() - begin < 10
    assert len(outcome.ttft) == 10_000


def test_the_same_seed_gives_the_same_outcome_and_another_does_not():
    first, again, other = (
        simulate(poisson(rate=3, num=300, prompt="~90", answer="5-40", seed=s), COST, Limits(num_slots=4)) for s in (1, 1, 2)
    )
    assert first.percentiles() == again.percentiles() != other.percentiles()


def test_fit_finds_the_costs_that_made_the_samples():
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(60):
        steps, rows = int(rng.integers(1, 20)), int(rng.integers(0, 32))
        prefill, context = int(rng.integers(0, 512)), rows * int(rng.integers(50, 2000))
        exact = steps * COST.fixed + prefill * COST.per_prefill_token + rows * COST.per_row + context * COST.per_context_token
        samples.append(Sample(seconds=exact * rng.normal(1, 0.01), steps=steps, rows=rows, prefill_tokens=prefill, context_tokens=context))
    found = fit(samples)
    assert (found.fixed, found.per_prefill_token) == pytest.approx((COST.fixed, COST.per_prefill_token), rel=0.05)
    assert (found.per_row, found.per_context_token) == pytest.approx((COST.per_row, COST.per_context_token), rel=0.15)


def test_noise_makes_no_cost_smaller():
    """Step times of a busy machine: most are quick, some take several times as long. What counts for waiting is their mean."""
    rng = np.random.default_rng(0)
    samples = []
    for _ in range(4000):
        rows, prefill = int(rng.integers(1, 9)), int(rng.integers(0, 3) * 80)
        exact = COST.seconds(prefill, rows, rows * 100)
        samples.append(Sample(seconds=exact * rng.gamma(4, 1 / 4), rows=rows, prefill_tokens=prefill, context_tokens=rows * 100))
    found = fit(samples)
    for rows, prefill in ((1, 0), (8, 0), (4, 160)):
        assert found.seconds(prefill, rows, rows * 100) == pytest.approx(COST.seconds(prefill, rows, rows * 100), rel=0.05)


def test_fit_gives_no_negative_cost():
    samples = [Sample(seconds=0.1 - 0.001 * rows, rows=rows, context_tokens=100 * rows, prefill_tokens=rows % 3) for rows in range(1, 9)]
    found = fit(samples)
    assert min(found.fixed, found.per_row, found.per_context_token, found.per_prefill_token) >= 0


def test_lengths_are_read_in_three_forms():
    rng = np.random.default_rng(0)
    assert set(lengths("7", 20, rng)) == {7}
    assert set(lengths("3-5", 200, rng)) == {3, 4, 5}
    assert np.median(lengths("~400", 4000, rng)) == pytest.approx(400, rel=0.05)
    with pytest.raises(InvalidValue, match="~512"):
        lengths("many", 3, rng)


def test_a_trace_is_read_from_csv(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("arrival_s,prompt_tokens,answer_tokens\n0.5,10,3\n1.5,20,4\n", encoding="utf-8")
    assert list(read_trace(file).prompts) == [10, 20]
    file.write_text("arrival_s,prompt\n0.5,10\n", encoding="utf-8")
    with pytest.raises(InvalidValue, match="answer_tokens"):
        read_trace(file)


def test_a_request_that_never_fits_the_cache_is_refused_at_once():
    with pytest.raises(InvalidValue, match="never fits"):
        simulate(trace((0, 90, 20)), COST, Limits(num_slots=1, cache_tokens=100))
