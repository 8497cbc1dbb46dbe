"""Who computes what in the next step: continuous batching over a fixed number of slots.

Knows no torch and no threads. A stream's slot is its rank in `decoding + prefilling`, so the decoding rows of the KV cache are always
the first ones and attention reads them as a view. What that costs: when a stream leaves, the last decoding row moves into its place.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from r1ray.engine.mailbox import Mailbox
from r1ray.engine.protocol import FinishReason, GenerationRequest, TokenChunk

__all__ = ["Group", "Move", "Scheduler", "Segment", "Stream"]

IDLE_CHUNK_FACTOR = 4  # with nobody decoding there is nobody to stall, and large products use the processor better


@dataclass(slots=True, eq=False)
class Stream:
    """One accepted request on its way. `num_computed` counts the leading tokens whose keys and values are in the cache."""

    request: GenerationRequest
    mailbox: Mailbox[TokenChunk | Exception]
    max_tokens: int
    stop_ids: frozenset[int]
    num_computed: int = 0
    generated: list[int] = field(default_factory=list)
    rng: random.Random = field(default_factory=random.Random)
    penalties: Any = None

    @property
    def last_token(self) -> int:
        return self.generated[-1] if self.generated else self.request.prompt_ids[-1]

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ends after its latest token, None when it goes on."""
        if not self.request.ignore_eos and self.generated and self.generated[-1] in self.stop_ids:
            return "stop"
        return "length" if len(self.generated) >= self.max_tokens else None


@dataclass(frozen=True, slots=True)
class Segment:
    """Prompt tokens [start, start + num) of a stream, to be computed in `slot`."""

    stream: Stream
    slot: int
    start: int
    num: int

    @property
    def completes(self) -> bool:
        return self.start + self.num == len(self.stream.request.prompt_ids)


@dataclass(frozen=True, slots=True)
class Group:
    """One forward pass: the streams of one adapter. `slots[i]` is the row of `decode[i]`."""

    adapter: str | None
    decode: list[Stream]
    slots: list[int]
    segments: list[Segment]


@dataclass(frozen=True, slots=True)
class Move:
    """Copy the first `num` positions of cache row `source` to row `target`."""

    source: int
    target: int
    num: int


class Scheduler:
    """Waiting, prefilling, decoding; a stream is in exactly one of them until `remove`."""

    def __init__(self, *, num_slots: int, prefill_chunk: int) -> None:
        self.num_slots = num_slots
        self.prefill_chunk = prefill_chunk
        self.decoding: list[Stream] = []
        self.prefilling: list[Stream] = []
        self._waiting: list[tuple[int, int, Stream]] = []
        self._arrivals = itertools.count()

    @property
    def num_running(self) -> int:
        return len(self.decoding) + len(self.prefilling)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, stream: Stream) -> None:
        heapq.heappush(self._waiting, (stream.request.priority, next(self._arrivals), stream))

    def plan(self) -> list[Group]:
        """Fill free slots from the queue, then say what the step computes, grouped by adapter."""
        while self._waiting and self.num_running < self.num_slots:
            self.prefilling.append(heapq.heappop(self._waiting)[2])
        groups: dict[str | None, Group] = {}
        for slot, stream in enumerate(self.decoding):
            group = _group_of(groups, stream)
            group.decode.append(stream)
            group.slots.append(slot)
        for segment in self._segments():
            _group_of(groups, segment.stream).segments.append(segment)
        return list(groups.values())

    def _segments(self) -> Iterator[Segment]:
        """Oldest prompts first, so that they complete in order and take the slots right after the decoding ones."""
        budget = self.prefill_chunk * (1 if self.decoding else IDLE_CHUNK_FACTOR)
        for slot, stream in enumerate(self.prefilling, start=len(self.decoding)):
            num = min(budget, len(stream.request.prompt_ids) - stream.num_computed)
            if num <= 0:
                return
            yield Segment(stream, slot, stream.num_computed, num)
            budget -= num

    def complete_prefill(self, stream: Stream) -> None:
        """Its first token is drawn: it decodes from now on, in the slot it has."""
        assert self.prefilling[0] is stream, "prompts complete in slot order"
        self.decoding.append(self.prefilling.pop(0))

    def remove(self, stream: Stream) -> list[Move]:
        """Forget the stream; the moves that close the gap it leaves, to be done in order."""
        if stream in self.decoding:
            return self._remove_decoding(self.decoding.index(stream))
        if stream in self.prefilling:
            index = self.prefilling.index(stream)
            self.prefilling.pop(index)
            return self._shift(index)
        self._waiting = [entry for entry in self._waiting if entry[2] is not stream]
        heapq.heapify(self._waiting)
        return []

    def _remove_decoding(self, index: int) -> list[Move]:
        last = self.decoding.pop()
        moves = []
        if index < len(self.decoding):
            self.decoding[index] = last
            moves = [Move(len(self.decoding), index, last.num_computed)]
        return moves + self._shift(0)

    def _shift(self, index: int) -> list[Move]:
        """Prefilling streams from `index` on have come one slot down; at most one of them has anything computed."""
        first = len(self.decoding) + index
        return [Move(first + i + 1, first + i, s.num_computed) for i, s in enumerate(self.prefilling[index:]) if s.num_computed]


def _group_of(groups: dict[str | None, Group], stream: Stream) -> Group:
    adapter = stream.request.adapter
    if adapter not in groups:
        groups[adapter] = Group(adapter, [], [], [])
    return groups[adapter]
