"""From the engine's thread to the event loops that read: one mailbox per stream, one wake-up per loop and step.

Knows of the items only what ends a stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Generic, TypeVar

from r1ray.engine.protocol import TokenChunk

__all__ = ["Mailbox", "chunks_of", "deliver"]

T = TypeVar("T")


class Mailbox(Generic[T]):
    """An unbounded queue that belongs to the event loop it was made on."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[T] = asyncio.Queue()

    async def get(self) -> T:
        return await self._queue.get()

    def put_here(self, item: T) -> None:
        """Only on the mailbox's own loop; other threads call `deliver`."""
        self._queue.put_nowait(item)


async def chunks_of(mailbox: Mailbox[TokenChunk | Exception], leave: Callable[[], object]) -> AsyncGenerator[TokenChunk, None]:
    """A stream's chunks to its last, or to the error that ended it; `leave` is called when the reader goes before that."""
    ended = False
    try:
        while not ended:
            item = await mailbox.get()
            ended = isinstance(item, Exception) or item.finish_reason is not None
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        if not ended:
            leave()


def deliver(post: Iterable[tuple[Mailbox[T], T]]) -> None:
    """Put each item into its mailbox, from any thread. A loop that is closed has no readers left, so its items are dropped."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Mailbox[T], T]]] = {}
    for mailbox, item in post:
        by_loop.setdefault(mailbox.loop, []).append((mailbox, item))
    for loop, items in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_put_all, items)


def _put_all(items: list[tuple[Mailbox[T], T]]) -> None:
    for mailbox, item in items:
        mailbox.put_here(item)
