"""Streams side by side: order kept, nothing delayed that is alone, everything closed at the end."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

import pytest

from r1ray.serve.batches import coalesced, merged


class Source:
    """Counts up; says whether it was closed."""

    def __init__(self, num: int, *, delay_s: float = 0.0, fail_at: int | None = None) -> None:
        self.num, self.delay_s, self.fail_at, self.closed = num, delay_s, fail_at, False

    async def items(self):
        try:
            for item in range(self.num):
                await asyncio.sleep(self.delay_s)
                if item == self.fail_at:
                    raise ValueError("broken")
                yield item
        finally:
            self.closed = True


def test_the_first_item_comes_at_once_and_the_rest_in_batches() -> None:
    async def run():
        return [batch async for batch in coalesced(Source(50).items(), 0.02)]

    batches = asyncio.run(run())
    assert batches[0][0] == 0 and [item for batch in batches for item in batch] == list(range(50))
    assert len(batches) < 10


def test_slow_items_are_not_held_back() -> None:
    async def run():
        arrivals, started = [], time.perf_counter()
        async for batch in coalesced(Source(4, delay_s=0.03).items(), 0.01):
            arrivals.append((time.perf_counter() - started, batch))
        return arrivals

    arrivals = asyncio.run(run())
    assert [batch for _, batch in arrivals] == [[0], [1], [2], [3]]


def test_an_error_comes_after_what_was_yielded_before_it() -> None:
    async def run():
        seen = []
        with pytest.raises(ValueError, match="broken"):
            async for batch in coalesced(Source(9, fail_at=3).items(), 0.001):
                seen += batch
        return seen

    assert asyncio.run(run()) == [0, 1, 2]


@pytest.mark.parametrize("num_read", [0, 1])
def test_leaving_closes_every_source(num_read: int) -> None:
    async def run():
        sources = [Source(1000, delay_s=0.001) for _ in range(3)]
        streams = [source.items() for source in sources]
        firsts = [await anext(stream) for stream in streams]
        async with aclosing(merged(streams)) as events:
            for _ in range(num_read):
                await anext(events)
        for stream in streams:
            await stream.aclose()
        return firsts, [source.closed for source in sources]

    assert asyncio.run(run()) == ([0, 0, 0], [True, True, True])


def test_merged_keeps_the_order_of_each_source_and_lets_all_progress() -> None:
    async def run():
        return [pair async for pair in merged([Source(5, delay_s=0.004).items(), Source(5, delay_s=0.004).items()])]

    pairs = asyncio.run(run())
    assert [item for index, item in pairs if index == 0] == list(range(5))
    assert {index for index, _ in pairs[:4]} == {0, 1}
