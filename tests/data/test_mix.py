"""Shares hold in every batch, every row has its turn, and a resumed walk goes on with the very next row."""

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1ray.data.mix import Mixture, ShortSamples

SOURCES = {"domain": 90, "history": 40, "out_of_domain": 20}
STAGES = ((0, {"domain": 0.7, "history": 0.2, "out_of_domain": 0.1}), (10, {"domain": 0.2, "history": 0.8}))
LENGTHS = {name: [(7 * row) % 100 for row in range(num)] for name, num in SOURCES.items()}


def mixture(**more):
    return Mixture(**{"stages": STAGES, "sources": SOURCES, "batch_size": 20, "seed": 0, **more})


def test_each_batch_holds_its_stages_shares():
    walk = mixture()
    for step in range(20):
        counts = Counter(name for name, _ in walk.batch())
        wanted = STAGES[0 if step < 10 else 1][1]
        assert all(abs(counts[name] - 20 * share) <= 1 for name, share in wanted.items())
        assert sum(counts.values()) == 20


def test_every_row_has_its_turn_before_any_has_a_second():
    walk = Mixture(stages=((0, {"a": 1.0}),), sources={"a": 30}, batch_size=10, seed=1)
    first, second = [[row for _ in range(3) for _, row in walk.batch()] for _ in range(2)]
    assert sorted(first) == sorted(second) == list(range(30))
    assert first != second


def are_short(short, source):
    return short.are_short(source, len(LENGTHS[source]))


@pytest.mark.parametrize("longest", [None, 30, 60])
def test_short_samples_are_their_share_of_each_batch(longest):
    short = ShortSamples(lengths=LENGTHS, longest=longest, share=0.4)
    marks = {name: are_short(short, name) for name in SOURCES}
    walk = mixture(short=short)
    for step in range(15):
        batch = walk.batch()
        assert abs(sum(marks[name][row] for name, row in batch) - 8) <= 1
        counts = Counter(name for name, _ in batch)
        assert abs(counts["domain"] - 20 * STAGES[0 if step < 10 else 1][1]["domain"]) <= 1


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3),
    share=st.sampled_from([0.0, 0.25, 0.4, 0.5, 1.0]),
    longest=st.integers(0, 9),
    batch_size=st.integers(1, 12),
    seed=st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_the_shortest_rows_of_each_source_leave_no_row_out_while_others_come_again(sizes, share, longest, batch_size, seed):
    """Rows drawn in proportion to their sources: after one epoch at most what two roundings leave is missing of each."""
    sources = {str(number): size for number, size in enumerate(sizes)}
    lengths = {name: [(row * 7 + seed) % (longest + 1) for row in range(size)] for name, size in sources.items()}
    short = ShortSamples(lengths=lengths, share=share)
    stages = ((0, {name: float(size) for name, size in sources.items()}),)
    walk = Mixture(stages=stages, sources=sources, batch_size=batch_size, seed=seed, short=short)
    drawn = Counter(next(walk) for _ in range(sum(sizes)))
    for name, size in sources.items():
        assert sum((name, row) not in drawn for row in range(size)) <= (0 if len(sizes) == 1 else 2)
        assert max((times for (source, _), times in drawn.items() if source == name), default=0) <= 2


def test_a_source_is_not_read_in_step_with_the_short_rows():
    """Half short and two sources in turn: no source may give all the short ones."""
    sources, lengths = {"a": 50, "b": 50}, {name: list(range(50)) for name in "ab"}
    for short in (ShortSamples(lengths=lengths, share=0.5), ShortSamples(lengths=lengths, share=0.5, longest=24)):
        walk = Mixture(stages=((0, {"a": 1.0, "b": 1.0}),), sources=sources, batch_size=4, seed=0, short=short)
        assert len({next(walk) for _ in range(100)}) == 100


def test_equally_long_rows_are_short_up_to_the_share():
    short = ShortSamples(lengths={"a": [5] * 10}, share=0.4)
    assert short.are_short("a", 10).sum() == 4
    walk = Mixture(stages=((0, {"a": 1.0}),), sources={"a": 10}, batch_size=5, seed=0, short=short)
    assert len({next(walk) for _ in range(10)}) == 10


def test_a_source_without_short_rows_gives_long_ones():
    short = ShortSamples(lengths={"domain": [99] * 90, "history": [99] * 40, "out_of_domain": [99] * 20}, longest=30)
    assert len(mixture(short=short).batch()) == 20


def test_an_empty_source_gives_its_share_to_the_others():
    walk = mixture(sources={"domain": 90, "history": 0, "out_of_domain": 20})
    assert walk.weights(0) == pytest.approx({"domain": 0.875, "out_of_domain": 0.125})
    with pytest.raises(ValueError, match="no source with rows has a weight"):
        Mixture(stages=((0, {"b": 1.0}),), sources={"a": 3}, batch_size=1, seed=0).batch()


@given(st.integers(0, 400), st.integers(0, 5), st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_resumed_walk_goes_on_with_the_next_row(num_drawn, seed, with_short):
    short = ShortSamples(lengths=LENGTHS, longest=30, share=0.4) if with_short else None
    walk = mixture(seed=seed, short=short)
    for _ in range(num_drawn):
        next(walk)
    saved = json.loads(json.dumps(walk.position()))
    expected = [next(walk) for _ in range(60)]
    resumed = mixture(seed=seed, short=short).resume(saved)
    assert [next(resumed) for _ in range(60)] == expected


def test_a_position_of_other_sources_is_refused():
    with pytest.raises(ValueError, match="the position is of the sources"):
        Mixture(stages=((0, {"a": 1.0}),), sources={"a": 3}, batch_size=1, seed=0).resume(mixture().position())


def test_another_seed_gives_another_order():
    assert mixture().batch() != mixture(seed=1).batch()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"stages": ((5, {"domain": 1.0}),)}, "must begin at step 0"),
        ({"stages": ()}, "must begin at step 0"),
        ({"sources": {"domain": 0}}, "no source has a row"),
        ({"batch_size": 0}, "at least 1"),
        ({"stages": ((0, {"domain": -1.0}),)}, "negative"),
        ({"short": ShortSamples(lengths={**LENGTHS, "domain": [1]}, longest=3)}, "1 lengths for the 90 rows of domain"),
    ],
)
def test_settings_that_make_no_sense_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        mixture(**more)
