"""Slots stay compact whatever joins and leaves: decoding rows first, then prefilling ones, no gap."""

from hypothesis import given, settings
from hypothesis import strategies as st

from r1ray.engine.protocol import GenerationRequest
from r1ray.engine.scheduler import Scheduler, Stream
from r1ray.types import Sampling


def stream(name, num_prompt=5, adapter=None, priority=0):
    request = GenerationRequest(
        id=str(name), prompt_ids=tuple(range(num_prompt)), sampling=Sampling(max_tokens=100), adapter=adapter, priority=priority
    )
    return Stream(request=request, mailbox=None, max_tokens=100, stop_ids=frozenset())


class Rows:
    """A model of the KV cache: what lies in each row, kept true by the scheduler's moves alone."""

    def __init__(self, num_slots):
        self.rows = [[] for _ in range(num_slots)]

    def step(self, scheduler, seen):
        groups = scheduler.plan()
        completed = []
        for group in groups:
            for slot, one in zip(group.slots, group.decode, strict=True):
                assert self.rows[slot][: one.num_computed] == [one.request.id] * one.num_computed, "a stream reads its own row"
                self.rows[slot] = [one.request.id] * (one.num_computed + 1)
                one.num_computed += 1
            for s in group.segments:
                assert s.start == s.stream.num_computed
                assert self.rows[s.slot][: s.start] == [s.stream.request.id] * s.start
                self.rows[s.slot] = [s.stream.request.id] * (s.start + s.num)
                s.stream.num_computed += s.num
                if s.completes:
                    completed.append(s)
                seen.append(s.num)
        for s in sorted(completed, key=lambda s: s.slot):
            scheduler.complete_prefill(s.stream)
        return groups

    def apply(self, moves):
        for move in moves:
            self.rows[move.target] = self.rows[move.source][: move.num]


@settings(max_examples=60, deadline=None)
@given(
    num_slots=st.integers(1, 5),
    chunk=st.integers(1, 9),
    events=st.lists(
        st.tuples(st.sampled_from(["join", "leave", "step"]), st.integers(0, 30), st.sampled_from([None, "a", "b"])), max_size=60
    ),
)
def test_rows_follow_their_streams_in_any_schedule(num_slots, chunk, events):
    scheduler, rows, alive, seen = Scheduler(num_slots=num_slots, prefill_chunk=chunk), Rows(num_slots), [], []
    for number, (event, size, adapter) in enumerate(events):
        if event == "join":
            alive.append(stream(number, num_prompt=size + 1, adapter=adapter))
            scheduler.add(alive[-1])
        elif event == "leave" and alive:
            rows.apply(scheduler.remove(alive.pop(size % len(alive))))
        else:
            rows.step(scheduler, seen)
        assert scheduler.num_running <= num_slots
        assert scheduler.num_running + scheduler.num_waiting == len(alive)


def test_a_step_computes_no_more_prompt_than_the_chunk_while_others_decode():
    scheduler, rows, seen = Scheduler(num_slots=3, prefill_chunk=10), Rows(3), []
    scheduler.add(stream("first", num_prompt=3))
    rows.step(scheduler, seen)
    scheduler.add(stream("long", num_prompt=35))
    scheduler.add(stream("short", num_prompt=8))
    sizes = []
    for _ in range(6):
        groups = rows.step(scheduler, seen)
        sizes.append(sum(s.num for g in groups for s in g.segments))
    assert sizes == [10, 10, 10, 10, 3, 0]


def test_adapters_get_a_pass_of_their_own():
    scheduler, rows = Scheduler(num_slots=4, prefill_chunk=10), Rows(4)
    for name, adapter in enumerate([None, "a", None, "a"]):
        scheduler.add(stream(name, adapter=adapter))
    rows.step(scheduler, [])
    assert {g.adapter: g.slots for g in scheduler.plan()} == {None: [0, 2], "a": [1, 3]}
