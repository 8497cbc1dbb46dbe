"""Who computes what in the next step: continuous batching with chunked prefill over a pool of KV blocks.

A stream is waiting, or running with a list of blocks; what is left to compute of it decides what it does: one token is decoding, more is
prefill. A stream that finds no block for its next token takes them from the one that came last, which waits again and computes anew
later (preemption): nobody fails for want of memory. In a pipeline several steps are under way at once, each of other streams.
Knows no torch and no threads.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from r1ray.engine.backend import BLOCK_SIZE
from r1ray.engine.blocks import BlockPool, prefix_keys
from r1ray.engine.mailbox import Mailbox
from r1ray.engine.protocol import FinishReason, GenerationRequest, TokenChunk

__all__ = ["IDLE_CHUNK_FACTOR", "Scheduler", "Segment", "Stream"]

IDLE_CHUNK_FACTOR = 4  # with nobody decoding there is nobody to stall, and large products use the processor better


@dataclass(slots=True, eq=False)
class Stream:
    """One accepted request on its way. `num_computed` counts the leading tokens whose keys and values are in its `blocks`.

    `keys` are those of its leading full blocks as far as they were needed; `num_cached` counts prompt tokens that were found computed.
    `adapter_number` tells the adapter that computes it from others, earlier ones of the same name included. `drawn_at` is when it got its
    latest token, 0 before the first and after it gave way; it ends at its `deadline` (time.monotonic's clock).
    """

    request: GenerationRequest
    mailbox: Mailbox[TokenChunk | Exception]
    max_tokens: int
    stop_ids: frozenset[int]
    num_computed: int = 0
    num_cached: int = 0
    generated: list[int] = field(default_factory=list)
    rng: random.Random = field(default_factory=random.Random)
    penalties: Any = None
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    arrival: int = 0
    adapter_number: int = 0
    drawn_at: float = 0.0
    deadline: float = math.inf

    @property
    def num_tokens(self) -> int:
        """Prompt and answer so far."""
        return len(self.request.prompt_ids) + len(self.generated)

    @property
    def num_pending(self) -> int:
        return self.num_tokens - self.num_computed

    def ids(self, start: int, num: int) -> list[int]:
        """Tokens [start, start + num) of prompt and answer."""
        prompt = self.request.prompt_ids
        inside = len(prompt)
        if start >= inside:
            return self.generated[start - inside : start - inside + num]
        return [*prompt[start : start + num], *self.generated[: max(0, start + num - inside)]]

    @property
    def is_scored(self) -> bool:
        """Whether nothing is left to say of the prompt's own tokens."""
        return not self.request.prompt_logprobs or len(self.prompt_logprobs) >= len(self.request.prompt_ids) - 1

    @property
    def salt(self) -> str:
        """What must be equal for two streams to share blocks."""
        return f"{self.adapter_number}\0{self.request.cache_salt}"

    def renumber(self, adapter_number: int) -> None:
        """Its adapter was replaced: what it computes from now on is not what others find, or would find, under the old number."""
        self.adapter_number = adapter_number
        self.keys = []

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why it ends after its latest token, None when it goes on."""
        if not self.request.ignore_eos and self.generated and self.generated[-1] in self.stop_ids:
            return "stop"
        return "length" if len(self.generated) >= self.max_tokens else None


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, start + num) of a stream, to be computed in this step; its blocks hold them all."""

    stream: Stream
    start: int
    num: int

    @property
    def completes(self) -> bool:
        """After it nothing of the stream is left to compute, so its next token is drawn."""
        return self.start + self.num == self.stream.num_tokens

    @property
    def num_logits(self) -> int:
        """Of how many of its last tokens the logits are wanted."""
        return int(self.completes) if self.stream.is_scored else self.num


class Scheduler:
    """`num_slots` bounds how many streams run together, the pool how long they may all be; `depth` steps may be under way at once."""

    def __init__(self, *, num_slots: int, prefill_chunk: int, pool: BlockPool, prefix_cache: bool = True, depth: int = 1) -> None:
        self.num_slots = num_slots
        self.limit = num_slots  # of streams that may run now; the engine lowers it when tokens come too late
        self.prefill_chunk = prefill_chunk
        self.most_tokens = prefill_chunk * IDLE_CHUNK_FACTOR  # of prompts in a step, and the streams that run:
        self.most_streams = num_slots  # lowered while larger steps do not fit into the memory
        self.pool = pool
        self.prefix_cache = prefix_cache
        self.depth = depth
        self.running: list[Stream] = []  # by arrival: the last one is the first to give way
        self.num_preempted = 0
        self._waiting: list[tuple[int, int, Stream]] = []
        self._planned: dict[Stream, Segment] = {}  # of the step being planned; who is preempted leaves it
        self._under_way: dict[Stream, Segment] = {}  # of the steps planned before and not computed yet
        self._arrivals = itertools.count()

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, stream: Stream) -> None:
        stream.arrival = next(self._arrivals)
        self._wait(stream)

    def plan(self) -> list[Segment]:
        """What the step computes: a token for every decoding stream, then prompts within the budget, oldest first."""
        self._planned.clear()
        most = min(self.most_streams, -(-len(self.running) // self.depth))
        for stream in list(self.running):
            if stream.num_pending == 1 and len(self._planned) < most:
                self._compute(stream, 1)
        # a pipeline wants more and smaller passes: its stages idle while the first one fills it and the last one empties it
        budget = self.prefill_chunk * (1 if self._planned else max(1, IDLE_CHUNK_FACTOR // self.depth))
        budget = min(budget, self.most_tokens)
        for stream in list(self.running):
            if stream.num_pending > 1 and budget > 0 and len(self._planned) < self.most_streams:
                budget -= self._compute(stream, budget)
        while budget > 0 and (admitted := self._admit()):
            budget -= self._compute(admitted, budget)
        self._under_way |= self._planned
        return list(self._planned.values())

    def computed(self, plan: Sequence[Segment]) -> set[Stream]:
        """A step is done: its keys and values are in the cache, full blocks become findable. Gives the streams that are still there."""
        alive = {segment.stream for segment in plan if self._under_way.get(segment.stream) is segment}
        for segment in plan:
            if segment.stream in alive:
                del self._under_way[segment.stream]
                self._book(segment)
        return alive

    def _book(self, segment: Segment) -> None:
        stream = segment.stream
        stream.num_computed = segment.start + segment.num
        if self.prefix_cache:
            self._extend_keys(stream, stream.num_computed)
            first = segment.start // BLOCK_SIZE
            for block, key in zip(stream.blocks[first:], stream.keys[first : stream.num_computed // BLOCK_SIZE], strict=False):
                self.pool.publish(block, key)

    def take_back(self, plan: Sequence[Segment], keep: int) -> None:
        """A step could not be computed: nothing of it counts, and all but the `keep` oldest of its streams give way."""
        alive = [segment.stream for segment in plan if self._under_way.get(segment.stream) is segment]
        for stream in alive:
            del self._under_way[stream]
        for stream in reversed([stream for stream in self.running if stream in alive][keep:]):
            self._preempt(stream)

    def remove(self, stream: Stream) -> None:
        """Forget the stream, wherever it is; its blocks are free."""
        if stream in self.running:
            self.running.remove(stream)
            self._under_way.pop(stream, None)  # what it still computes is written before its blocks' next owner writes
            self._release(stream)
            return
        self._waiting = [entry for entry in self._waiting if entry[2] is not stream]
        heapq.heapify(self._waiting)

    def _wait(self, stream: Stream) -> None:
        heapq.heappush(self._waiting, (stream.request.priority, stream.arrival, stream))

    def _compute(self, stream: Stream, most: int) -> int:
        """Plan up to `most` tokens of a running stream; how many. None when it is under way, has given way, or must now."""
        num = min(most, stream.num_pending)
        if stream not in self.running or stream in self._under_way or not self._reserve(stream, stream.num_computed + num):
            return 0
        self._planned[stream] = Segment(stream, stream.num_computed, num)
        return num

    def _admit(self) -> Stream | None:
        """The next waiting stream, when a slot and blocks for all that it has to compute are free."""
        if not self._waiting or len(self.running) >= min(self.limit, self.most_streams):
            return None
        stream = self._waiting[0][2]
        found = self._find(stream)
        missing = -(-stream.num_tokens // BLOCK_SIZE) - len(found)
        if missing > self.pool.num_free:
            self.pool.release(found)
            return None
        heapq.heappop(self._waiting)
        stream.blocks = found
        stream.num_computed = len(found) * BLOCK_SIZE
        stream.num_cached = max(stream.num_cached, min(stream.num_computed, len(stream.request.prompt_ids)))
        self._run(stream)
        return stream

    def _run(self, stream: Stream) -> None:
        self.running.append(stream)
        self.running.sort(key=lambda s: (s.request.priority, s.arrival))

    def _find(self, stream: Stream) -> list[int]:
        """Blocks of the beginning that are known; the last token is always computed, since its logits are wanted."""
        if not self.prefix_cache or not stream.is_scored:
            return []
        self._extend_keys(stream, stream.num_tokens)
        return self.pool.find(stream.keys[: (stream.num_tokens - 1) // BLOCK_SIZE])

    def _extend_keys(self, stream: Stream, num_tokens: int) -> None:
        have = len(stream.keys)
        if num_tokens // BLOCK_SIZE > have:
            ids = stream.ids(0, num_tokens)
            stream.keys.extend(prefix_keys(ids, stream.salt, first=have, parent=stream.keys[-1] if have else b""))

    def _reserve(self, stream: Stream, num_tokens: int) -> bool:
        """Blocks for the first `num_tokens` tokens, taken from later streams if need be; False when there are none for now."""
        missing = -(-num_tokens // BLOCK_SIZE) - len(stream.blocks)
        while missing > 0 and (taken := self.pool.take(missing)) is None:
            later = [other for other in self.running[self.running.index(stream) :] if other not in self._under_way]
            if later[-1] is stream and self._under_way:
                return False  # who is under way comes back, and may end or give way then
            self._preempt(later[-1])
            if later[-1] is stream:
                return False
        if missing > 0 and taken is not None:
            stream.blocks.extend(taken)
        return True

    def _preempt(self, stream: Stream) -> None:
        self.running.remove(stream)
        self._planned.pop(stream, None)
        self._release(stream)
        stream.num_computed = 0
        stream.drawn_at = 0.0
        self.num_preempted += 1
        self._wait(stream)

    def _release(self, stream: Stream) -> None:
        self.pool.release(stream.blocks)
        stream.blocks = []
