"""What the in-house engine's thread does: step after step, one pass of the backend over the streams that the scheduler picks.

Takes streams from the register, gives chunks to their mailboxes. All but `stats` is called from that thread alone, between two steps.
Knows no event loops, no text and no model.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

from r1ray.engine.backend import Backend
from r1ray.engine.blocks import BlockPool
from r1ray.engine.cap import BatchCap
from r1ray.engine.config import EngineConfig
from r1ray.engine.deadlines import over_time
from r1ray.engine.mailbox import Mailbox, deliver
from r1ray.engine.passes import chunk_of, scored, waited
from r1ray.engine.protocol import EngineStats, TokenChunk
from r1ray.engine.register import Register
from r1ray.engine.relief import Relief
from r1ray.engine.sampler import Drawn, NoToken, sample
from r1ray.engine.scheduler import Scheduler, Segment, Stream
from r1ray.errors import GenerationFailed

__all__ = ["EngineCore"]

Post = list[tuple[Mailbox[TokenChunk | Exception], TokenChunk | Exception]]


class EngineCore:
    """Backend, scheduler and cache of one engine. `step` is the loop's body; `flush` sends what it and the orders wrote."""

    def __init__(self, backend: Backend, config: EngineConfig, register: Register) -> None:
        self.backend = backend
        self.pool = BlockPool(backend.num_blocks)
        self.scheduler = Scheduler(
            num_slots=config.num_slots,
            prefill_chunk=config.prefill_chunk,
            pool=self.pool,
            prefix_cache=config.prefix_cache,
            depth=backend.depth,
        )
        objective_s = None if config.tpot_objective_ms is None else config.tpot_objective_ms / 1000
        self._cap = BatchCap(least=config.min_slots, most=config.num_slots, objective_s=objective_s)
        self.scheduler.limit = self._cap.value
        self._relief = Relief(backend, self.scheduler)
        self._config = config
        self._register = register
        self._under_way: deque[tuple[list[Segment], object]] = deque()
        self._post: Post = []
        self.counts = {"prompt": 0, "cached": 0, "generated": 0, "finished": 0, "aborted": 0, "failed": 0, "steps": 0}

    @property
    def is_idle(self) -> bool:
        return self.scheduler.num_running == 0 and self.scheduler.num_waiting == 0

    def stats(self) -> EngineStats:
        """From any thread."""
        num_running = self.scheduler.num_running
        return EngineStats(
            state=self._register.state,
            num_slots=self._config.num_slots,
            num_free_slots=self._config.num_slots - num_running,
            num_running=num_running,
            num_waiting=max(0, self._register.num_open - num_running),
            max_waiting=self._config.max_waiting,
            num_prompt_tokens=self.counts["prompt"],
            num_cached_tokens=self.counts["cached"],
            num_generated_tokens=self.counts["generated"],
            num_finished=self.counts["finished"],
            num_aborted=self.counts["aborted"],
            num_failed=self.counts["failed"],
            num_preempted=self.scheduler.num_preempted,
            num_steps=self.counts["steps"],
            num_blocks=self.pool.num_blocks,
            num_free_blocks=self.pool.num_free,
            error=self._register.error,
        )

    # --- a step

    def step(self) -> None:
        """1. submit passes up to the backend's depth  2. wait for the oldest, draw and book its tokens  3. post them."""
        self._expire()
        self._submit()
        if self._under_way:
            self._collect(*self._under_way.popleft())
            self.counts["steps"] += 1
        self.flush()

    def flush(self) -> None:
        if self._post:
            deliver(self._post)
            self._post = []

    def _expire(self) -> None:
        for stream in self._register.take_late():
            self._close(stream, over_time(stream.request), "failed")

    def _submit(self) -> None:
        while len(self._under_way) < self.backend.depth and (plan := self.scheduler.plan()):
            if doubted := self.pool.take_doubted():
                self.backend.clear(doubted)
            try:
                submitted = self._relief.submit(plan)
            except GenerationFailed as error:
                self._close(plan[0].stream, error, "failed")
                continue
            if submitted is not None:
                self._under_way.append((plan, submitted))

    def _collect(self, plan: Sequence[Segment], submitted: object) -> None:
        logits = self.backend.collect(submitted)
        alive = self.scheduler.computed(plan)
        drawing = [segment.stream for segment in plan if segment.completes]
        if any(segment.num_logits != segment.completes for segment in plan):
            logits = scored(logits, plan)
        drawn = sample(logits, drawing) if drawing else []
        self._pace([stream for stream in drawing if stream in alive])
        for stream, token in zip(drawing, drawn, strict=True):
            if stream in alive:
                self._book(stream, token)

    def _pace(self, drawing: Sequence[Stream]) -> None:
        running = self.scheduler.running
        if self._cap.objective_s is not None and (found := waited(drawing, running, time.monotonic())):
            seconds, share = found
            self._cap.step(seconds, len(running), someone_waits=self.scheduler.num_waiting > 0, share=share)
            self.scheduler.limit = self._cap.value

    def _book(self, stream: Stream, drawn: Drawn | NoToken) -> None:
        if isinstance(drawn, NoToken):
            cause = "Its mask or its logit_bias allows none."
            if drawn is NoToken.DAMAGED:
                cause = "The weights or the adapter are damaged; evaluate them."
                self.pool.doubt(stream.blocks)
            text = f"Request {stream.request.id}: no token has a finite logit. {cause}"
            self._close(stream, GenerationFailed(text), "failed")
            return
        if not stream.generated:
            self.counts["prompt"] += len(stream.request.prompt_ids)
            self.counts["cached"] += stream.num_cached
        stream.generated.append(drawn.token)
        self.counts["generated"] += 1
        reason = stream.finish_reason
        hidden = reason == "stop" and not stream.request.keep_stop
        chunk = chunk_of(stream, reason) if hidden else chunk_of(stream, reason, drawn)
        if reason is None:
            self._post.append((stream.mailbox, chunk))
        else:
            self._close(stream, chunk, "finished")

    def _close(self, stream: Stream, last: TokenChunk | Exception, counter: str) -> None:
        self.scheduler.remove(stream)
        self._register.leave(stream)
        self.counts[counter] += 1
        self._post.append((stream.mailbox, last))
        self.let_go()

    # --- orders, between two steps

    def begin(self, stream: Stream) -> None:
        if self._register.holds(stream):  # it may be over time already
            self.scheduler.add(stream)

    def abort(self, stream: Stream) -> None:
        if self._register.holds(stream):
            self._close(stream, chunk_of(stream, "abort"), "aborted")

    def load(self, done: Future[None], name: str, path: Path) -> None:
        try:
            self.backend.load_adapter(name, path)
        except Exception as error:  # handed to whoever awaits it; the streams run on
            self._register.not_loaded(done, error)
            return
        self._register.loaded(name, done)

    def let_go(self) -> None:
        """Drop the unloaded adapters that nobody uses any more."""
        for name in self._register.take_unused():
            self.backend.unload_adapter(name)
            self._register.unloaded(name)

    def end(self) -> None:
        """Nobody waits for ever: every open stream and every awaited adapter hears that it is over."""
        streams = self._register.end()
        self._post += [(stream.mailbox, self._register.death()) for stream in streams]
        self.flush()
        self._register.break_promises()
        self.backend.close()
