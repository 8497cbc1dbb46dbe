"""Which adapters a request may name: from when one is loaded until it is unloaded, and what happens to those that use it meanwhile.

An unloaded adapter takes no new requests from that moment on; its memory is given back when the last stream that uses it has ended.
Each load has a number of its own, so that what was computed with one adapter is never found by the streams of another of that name.
Knows no weights and no threads: the engine asks under its lock.
"""

from __future__ import annotations

from collections.abc import Collection
from concurrent.futures import Future

from r1ray.errors import UnknownAdapter

__all__ = ["LoadedAdapters"]


class LoadedAdapters:
    """Names and numbers; 0 is the model without an adapter."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._leaving: dict[str, Future[None]] = {}
        self._awaited: set[Future[None]] = set()
        self._last = 0

    @property
    def awaited(self) -> list[Future[None]]:
        """Promises that are not kept yet."""
        return list(self._awaited)

    def promise(self) -> Future[None]:
        """For who waits until a load or an unload is done."""
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # a waiter that is cancelled cannot cancel it
        self._awaited.add(done)
        return done

    def keep(self, promises: Collection[Future[None]], error: Exception | None = None) -> None:
        """Tell them that it is done, or why it is not."""
        self._awaited.difference_update(promises)
        for done in promises:
            done.set_result(None) if error is None else done.set_exception(error)

    @property
    def are_leaving(self) -> bool:
        """Whether some are unloaded and still used."""
        return bool(self._leaving)

    def new_number(self) -> int:
        """One that no other load and no other stream has."""
        self._last += 1
        return self._last

    def number(self, name: str | None, *, carries_on: bool = False) -> int:
        """Of the adapter that a request names; `carries_on`: it continues one that used the adapter before it was unloaded.

        Raises:
            UnknownAdapter: not loaded, or unloaded.
        """
        if name is None:
            return 0
        if name not in self._numbers or (name in self._leaving and not carries_on):
            raise UnknownAdapter(f"No adapter {name!r} is loaded; loaded: {sorted(self._numbers.keys() - self._leaving)}. Load it first.")
        return self._numbers[name]

    def came(self, name: str) -> tuple[int, Future[None] | None]:
        """It was loaded: its number, and who waits for its predecessor to go, which the load has just replaced."""
        self._numbers[name] = self.new_number()
        return self._numbers[name], self._leaving.pop(name, None)

    def leave(self, name: str, done: Future[None]) -> None:
        """No new requests for it from now on; `done` waits until it is gone."""
        self._leaving[name] = done

    def unused(self, users: Collection[str | None]) -> list[str]:
        """Those that leave and that none of the `users` names."""
        return [name for name in self._leaving if name not in users]

    def gone(self, name: str) -> Future[None]:
        """Its memory was given back: who waits for that."""
        del self._numbers[name]
        return self._leaving.pop(name)
