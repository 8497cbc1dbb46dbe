"""A line every few seconds while rows stream by; their number is not known before."""

from __future__ import annotations

import time

__all__ = ["Progress"]


class Progress:
    """`every_s` None is silent."""

    def __init__(self, every_s: float | None) -> None:
        self._every_s = every_s
        self._begin = self._said = time.monotonic()

    def at(self, num_in: int, num_dropped: int, what: str) -> None:
        """Say where the job is, if it is time."""
        now = time.monotonic()
        if self._every_s is None or now - self._said < self._every_s:
            return
        self._said = now
        seconds = now - self._begin
        print(f"{what}: {num_in:,} rows in, {num_dropped:,} dropped, {num_in / seconds:,.0f} rows/s, {seconds:.0f} s", flush=True)
