from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from r1ray.train.batches import BatchPlan, accumulation_steps, even_length

LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=120)


def plan(lengths, batch_size=8, epochs=1, seed=0, window=4) -> BatchPlan:
    return BatchPlan(lengths, batch_size=batch_size, num_epochs=epochs, seed=seed, group_window=window)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 16), st.integers(1, 4), st.integers(1, 8))
def test_every_row_is_trained_once_per_epoch_on_any_number_of_workers(lengths, batch_size, num_workers, micro) -> None:
    made = plan(lengths, batch_size, epochs=2)
    accumulation = accumulation_steps(batch_size, num_workers, micro)
    seen: Counter[int] = Counter()
    for step in range(made.num_steps):
        shares = [made.micro_batches(step, rank=rank, num_workers=num_workers, accumulation=accumulation) for rank in range(num_workers)]
        assert {len(share) for share in shares} == {accumulation}
        assert all(len(rows) <= micro for share in shares for rows in share)
        rows = [row for share in shares for rows in share for row in rows]
        assert sorted(rows) == sorted(made.batch(step))
        seen.update(rows)
    assert seen == Counter(dict.fromkeys(range(len(lengths)), 2))


def as_lists(lengths, batch_size, seed, epoch, window) -> list[tuple[int, ...]]:
    """The same order, told with lists of tuples: what the plan keeps in arrays."""
    rng = random.Random(f"{seed}/{epoch}")
    rows = list(range(len(lengths)))
    rng.shuffle(rows)
    size = batch_size * window
    if window > 1:
        rows = [row for start in range(0, len(rows), size) for row in sorted(rows[start : start + size], key=lengths.__getitem__)]
    batches = [tuple(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]
    complete = [batch for batch in batches if len(batch) == batch_size]
    rng.shuffle(complete)
    return complete + [batch for batch in batches if len(batch) < batch_size]


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 16), st.integers(1, 8), st.integers(0, 3))
def test_the_order_of_a_seed_stays_what_it_was(lengths, batch_size, window, seed) -> None:
    made = plan(lengths, batch_size, epochs=2, seed=seed, window=window)
    expected = [*as_lists(lengths, batch_size, seed, 0, window), *as_lists(lengths, batch_size, seed, 1, window)]
    assert [made.batch(step) for step in range(made.num_steps)] == expected


def test_same_seed_same_batches_other_seed_and_epoch_others() -> None:
    lengths = [(7 * i) % 90 + 5 for i in range(100)]
    batches = [plan(lengths, epochs=2).batch(step) for step in range(26)]
    assert batches == [plan(lengths, epochs=2).batch(step) for step in range(26)]
    assert batches[:13] != batches[13:]
    assert batches[:13] != [plan(lengths, seed=1).batch(step) for step in range(13)]


def test_grouping_by_length_saves_padding_and_workers_get_equal_shares() -> None:
    lengths = [(37 * i) % 200 + 10 for i in range(512)]
    grouped, mixed = plan(lengths, 16, window=8), plan(lengths, 16, window=1)
    assert grouped.padding_share(2, 2) < 0.1 < mixed.padding_share(2, 1)
    loads = [
        sum(lengths[r] for s in range(32) for rows in grouped.micro_batches(s, rank=k, num_workers=2, accumulation=2) for r in rows)
        for k in (0, 1)
    ]
    assert abs(loads[0] - loads[1]) < 0.01 * sum(loads)


@given(st.integers(1, 5000), st.integers(1, 64))
def test_rows_are_padded_to_the_fewest_positions_that_make_a_multiple_of_eight(longest, num_rows) -> None:
    length = even_length(longest, num_rows)
    assert length >= longest
    assert length * num_rows % 8 == 0
    assert all(shorter * num_rows % 8 for shorter in range(longest, length))
