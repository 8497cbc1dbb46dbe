"""How Serve sees the models' deployments: one question to its controller, whoever asks meanwhile gets the same answer.

A call to a replica would wake a sleeping model; this one wakes nobody.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from ray import serve
from ray.serve.schema import ServeStatus

__all__ = ["Overview", "Seen"]


@dataclass(frozen=True, slots=True)
class Seen:
    """One deployment: how many of its replicas run, and whether it is as it should be."""

    num_running: int
    is_healthy: bool


class Overview:
    """`ask` is blocking; it answers for all applications at once."""

    def __init__(self, ask: Callable[[], ServeStatus] = serve.status) -> None:
        self._ask = ask
        self._asking: asyncio.Task[ServeStatus] | None = None
        self._asked_at = 0.0

    async def of(self, application: str, deployment: str, *, max_age_s: float = 0.0) -> Seen:
        """An answer that was asked for at most `max_age_s` ago, or is being waited for now."""
        if self._asking is None or (self._asking.done() and not self._is_fresh(self._asking, max_age_s)):
            self._asked_at = time.monotonic()
            self._asking = asyncio.create_task(asyncio.to_thread(self._ask))
        status = await asyncio.shield(self._asking)  # others wait for it too, should this one be cancelled
        found = status.applications[application].deployments[deployment]
        return Seen(found.replica_states.get("RUNNING", 0), found.status == "HEALTHY")

    def _is_fresh(self, asked: asyncio.Task[ServeStatus], max_age_s: float) -> bool:
        return not asked.cancelled() and asked.exception() is None and time.monotonic() - self._asked_at < max_age_s
