"""Who is over time: requests with a `timeout_s` end when it is over, waiting or running. Knows no engine; each asks between two steps.

The time counts from when the engine took the request, its queue included.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Protocol, TypeVar

from r1ray.engine.protocol import GenerationRequest
from r1ray.errors import DeadlineExceeded

__all__ = ["Deadlines", "deadline_of", "over_time"]


class Timed(Protocol):
    """An open stream. `deadline` is on `time.monotonic`'s clock, infinite without one."""

    deadline: float


T = TypeVar("T", bound=Timed)


def deadline_of(request: GenerationRequest) -> float:
    """Of a request that was taken now."""
    return math.inf if request.timeout_s is None else time.monotonic() + request.timeout_s


def over_time(request: GenerationRequest) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"Request {request.id} was not done within its {request.timeout_s:g} s, time in the queue included. "
        "Give it more time, ask for fewer tokens, or send it when the server is less busy."
    )


class Deadlines:
    """The nearest deadline, so that a step in which none has come costs one comparison."""

    def __init__(self) -> None:
        self.next = math.inf

    def watch(self, stream: Timed) -> None:
        self.next = min(self.next, stream.deadline)

    def pass_by(self, open_streams: Iterable[T]) -> list[T]:
        """Those whose deadline has come; the next one is the nearest of the others'."""
        now = time.monotonic()
        if now < self.next:
            return []
        streams = list(open_streams)
        self.next = min((stream.deadline for stream in streams if stream.deadline > now), default=math.inf)
        return [stream for stream in streams if stream.deadline <= now]
