"""A line every few seconds: it reads the same on a terminal and in a job's log."""

from __future__ import annotations

import time
from typing import Self

__all__ = ["Progress"]


class Progress:
    """`every_s` None is silent. The last line says how long it took."""

    def __init__(self, every_s: float | None, what: str, total: int) -> None:
        self._every_s = every_s
        self._what = what
        self._total = total
        self._done = 0
        self._tokens = 0
        self._begin = self._said = time.monotonic()
        self._said_at = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._say()

    def one(self, num_tokens: int) -> None:
        """One more is done."""
        self._tokens += num_tokens
        self.at(self._done + 1)

    def at(self, done: int) -> None:
        self._done = done
        if self._every_s is not None and time.monotonic() - self._said >= self._every_s:
            self._say()

    def _say(self) -> None:
        if self._every_s is None or self._said_at == self._done:
            return
        self._said, self._said_at = time.monotonic(), self._done
        seconds = self._said - self._begin
        speed = f", {self._tokens / max(seconds, 1e-9):.0f} tokens/s" if self._tokens else ""
        print(f"{self._what}: {self._done}/{self._total} in {seconds:.1f} s{speed}", flush=True)
