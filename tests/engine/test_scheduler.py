"""Every stream finds what it computed in its own blocks, whatever joins, leaves or gives way; nothing leaks."""

from hypothesis import given, settings
from hypothesis import strategies as st

from r1ray.engine.backend import BLOCK_SIZE
from r1ray.engine.blocks import BlockPool
from r1ray.engine.protocol import GenerationRequest
from r1ray.engine.scheduler import Scheduler, Stream
from r1ray.types import Sampling


def stream(name, prompt=range(5), adapter=0, priority=0):
    request = GenerationRequest(id=str(name), prompt_ids=tuple(prompt), sampling=Sampling(max_tokens=100), priority=priority)
    return Stream(request=request, mailbox=None, max_tokens=100, stop_ids=frozenset(), adapter_number=adapter)


def scheduler(num_slots=3, chunk=10, num_blocks=40, **rest):
    return Scheduler(num_slots=num_slots, prefill_chunk=chunk, pool=BlockPool(num_blocks), **rest)


class Memory:
    """What lies at each position of each block: the token and all before it, as keys and values depend on them."""

    def __init__(self):
        self.cells = {}

    def step(self, scheduler):
        plan = scheduler.plan()
        for segment in plan:
            one, ids = segment.stream, segment.stream.ids(0, segment.start + segment.num)
            assert segment.start == one.num_computed
            for position in range(segment.start):
                wrote = self.cells[one.blocks[position // BLOCK_SIZE], position % BLOCK_SIZE]
                assert wrote == (one.salt, tuple(ids[: position + 1])), "a stream reads what it would have computed"
            for position in range(segment.start, segment.start + segment.num):
                self.cells[one.blocks[position // BLOCK_SIZE], position % BLOCK_SIZE] = (one.salt, tuple(ids[: position + 1]))
        assert scheduler.computed(plan) == {segment.stream for segment in plan}
        for segment in plan:
            if segment.completes:
                segment.stream.generated.append(segment.stream.num_tokens % 3)
        return plan


events = st.tuples(st.sampled_from(["join", "leave", "step", "step"]), st.integers(1, 70), st.sampled_from([0, 1]))


@settings(max_examples=60, deadline=None)
@given(num_slots=st.integers(1, 5), chunk=st.integers(1, 40), num_blocks=st.integers(4, 12), events=st.lists(events, max_size=60))
def test_streams_read_their_own_past_in_any_schedule(num_slots, chunk, num_blocks, events):
    plan, memory, alive = scheduler(num_slots, chunk, num_blocks), Memory(), []
    for number, (event, size, adapter) in enumerate(events):
        if event == "join":
            alive.append(stream(number, prompt=[i % 7 for i in range(size)], adapter=adapter))
            plan.add(alive[-1])
        elif event == "leave" and alive:
            plan.remove(alive.pop(size % len(alive)))
        else:
            memory.step(plan)
            for done in [s for s in alive if s.num_tokens >= 90]:
                plan.remove(done)
                alive.remove(done)
        assert plan.num_running <= num_slots
        assert plan.num_running + plan.num_waiting == len(alive)
    for _ in range(3000):
        if not alive:
            break
        memory.step(plan)
        for done in [s for s in alive if s.num_tokens >= 90]:
            plan.remove(done)
            alive.remove(done)
    assert not alive, "everybody comes to an end"
    assert plan.pool.num_free == num_blocks
    assert plan.pool.num_held == 0


def test_a_step_computes_no_more_prompt_than_the_chunk_while_others_decode():
    plan, memory = scheduler(), Memory()
    plan.add(stream("first", range(3)))
    memory.step(plan)
    plan.add(stream("long", range(100, 135)))
    plan.add(stream("short", range(200, 208)))
    sizes = [sum(s.num for s in memory.step(plan) if s.stream.request.id != "first") for _ in range(6)]
    assert sizes == [10, 10, 10, 10, 4, 2]  # the long prompt decodes beside the rest of the short one


def test_the_latest_stream_gives_way_and_comes_back():
    plan, memory = scheduler(num_blocks=4, prefix_cache=False), Memory()
    old, young = stream("old", range(40)), stream("young", range(50, 90))
    plan.add(old)
    plan.add(young)
    while old.num_tokens < 80:
        memory.step(plan)
    assert plan.running == [old]
    assert plan.num_preempted == 1
    plan.remove(old)
    while young.num_tokens < 80:
        memory.step(plan)


def test_a_common_beginning_is_shared_and_outlives_its_first_stream():
    plan, memory = scheduler(chunk=1000), Memory()
    plan.add(first := stream("first", range(70)))
    memory.step(plan)
    plan.add(second := stream("second", [*range(64), 1, 2]))
    memory.step(plan)
    assert second.num_cached == 64
    assert second.blocks[:2] == first.blocks[:2]
    plan.remove(first)
    plan.remove(second)
    plan.add(third := stream("third", range(65)))
    plan.add(other := stream("other", range(65), adapter=1))
    memory.step(plan)
    assert (third.num_cached, other.num_cached) == (64, 0)


def test_doubted_blocks_stay_with_who_shares_them_and_are_cleared_when_the_last_lets_go():
    pool = BlockPool(4)
    shared, own = pool.take(2)
    pool.publish(shared, b"key")
    assert pool.find([b"key"]) == [shared]
    pool.doubt([shared, own])
    assert pool.find([b"key"]) == []
    pool.release([shared, own])
    assert pool.take_doubted() == [own]
    assert pool.num_held == 1
    pool.release([shared])
    assert pool.take_doubted() == [shared]
    assert (pool.num_free, pool.take_doubted()) == (4, [])
