"""Async streams: batch what piles up, merge what runs side by side, end what nobody reads any more.

Knows neither tokens nor HTTP. Every source is closed when its consumer stops, on whichever path.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["close", "coalesced", "merged"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Ended:
    error: BaseException | None


@dataclass(frozen=True, slots=True)
class _Item(Generic[T]):
    index: int
    value: T


async def close(source: AsyncIterator[T]) -> None:
    """Close `source` if it is a generator; other iterators have nothing to end."""
    if isinstance(source, AsyncGenerator):
        await source.aclose()


async def coalesced(source: AsyncIterator[T], interval_s: float) -> AsyncGenerator[list[T], None]:
    """Items in batches: one alone at once when the last batch is longer ago than `interval_s`, else all that came until then.

    A slow stream is thus never delayed, and a fast one costs one hop per interval instead of one per item.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[_Item[T] | _Ended] = asyncio.Queue()
    pump = asyncio.create_task(_pump(0, source, queue))
    last = -interval_s
    try:
        while True:
            batch: list[T] = []
            end = _take(await queue.get(), batch)
            wait_s = last + interval_s - loop.time()
            if batch and wait_s > 0:
                await asyncio.sleep(wait_s)
            while end is None and not queue.empty():
                end = _take(queue.get_nowait(), batch)
            if batch:
                yield batch
                last = loop.time()
            if end is not None:
                if end.error is not None:
                    raise end.error
                return
    finally:
        await _end([pump], [source])


async def merged(sources: Sequence[AsyncIterator[T]]) -> AsyncGenerator[tuple[int, T], None]:
    """(index of the source, item) in order of arrival, until all have ended. An error of one ends all."""
    queue: asyncio.Queue[_Item[T] | _Ended] = asyncio.Queue()
    pumps = [asyncio.create_task(_pump(index, source, queue)) for index, source in enumerate(sources)]
    num_open = len(pumps)
    try:
        while num_open:
            item = await queue.get()
            if isinstance(item, _Item):
                yield item.index, item.value
                continue
            if item.error is not None:
                raise item.error
            num_open -= 1
    finally:
        await _end(pumps, sources)


async def _pump(index: int, source: AsyncIterator[T], queue: asyncio.Queue[_Item[T] | _Ended]) -> None:
    error: BaseException | None = None
    try:
        async for value in source:
            queue.put_nowait(_Item(index, value))
    except Exception as caught:  # handed to the consumer, who raises it
        error = caught
    finally:
        await close(source)
        queue.put_nowait(_Ended(error))


def _take(item: _Item[T] | _Ended, batch: list[T]) -> _Ended | None:
    if isinstance(item, _Ended):
        return item
    batch.append(item.value)
    return None


async def _end(pumps: Sequence[asyncio.Task[None]], sources: Sequence[AsyncIterator[T]]) -> None:
    """A pump that was cancelled before it ran has not closed its source, so each is closed here too."""
    for pump in pumps:
        pump.cancel()
    await asyncio.gather(*pumps, return_exceptions=True)
    for source in sources:
        await close(source)
