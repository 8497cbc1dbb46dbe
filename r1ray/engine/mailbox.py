"""From the engine's thread to the event loops that read: one mailbox per stream, one wake-up per loop and step.

Knows nothing of what the items are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Generic, TypeVar

__all__ = ["Mailbox", "deliver"]

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
