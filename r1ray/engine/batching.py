"""The in-house engine: continuous batching over a backend, in one thread of its own.

Every step computes one token for each running stream and the next piece of the waiting prompts together, so streams join and leave at
any step. Event loops talk to the thread through an inbox and get their chunks through mailboxes. Knows no text, no HTTP, no model.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from functools import partial
from pathlib import Path

import torch

from r1ray.engine.admission import check_prompt, clipped_max_tokens, drawable
from r1ray.engine.backend import BLOCK_SIZE, Backend
from r1ray.engine.beam import BEAM, Ranking, search_beams
from r1ray.engine.blocks import BlockPool
from r1ray.engine.cap import BatchCap
from r1ray.engine.config import EngineConfig
from r1ray.engine.deadlines import Deadlines, deadline_of, over_time
from r1ray.engine.loaded import LoadedAdapters
from r1ray.engine.mailbox import Mailbox, chunks_of, deliver
from r1ray.engine.passes import chunk_of, scored, waited
from r1ray.engine.protocol import EngineState, EngineStats, GenerationRequest, TokenChunk
from r1ray.engine.relief import Relief
from r1ray.engine.sampler import Drawn, NoToken, new_rng, sample
from r1ray.engine.scheduler import Scheduler, Segment, Stream
from r1ray.errors import EngineStopped, GenerationFailed, InvalidRequest, QueueFull, R1RayError

__all__ = ["BatchingEngine"]

log = logging.getLogger(__name__)

DRAIN_POLL_S = 0.02
JOIN_TIMEOUT_S = 60.0

Post = list[tuple[Mailbox[TokenChunk | Exception], TokenChunk | Exception]]


class BatchingEngine:
    """Owns the backend. `context_length` is the model's; the KV cache may hold less than that, and then less is promised."""

    capabilities: frozenset[str] = frozenset(
        {"abort", "adapters", "beam_search", "chunked_prefill", "continuous_batching", "deadlines", "keep_stop", "logit_bias"}
        | {"logprobs", "masks", "penalties", "preemption", "prompt_logprobs", "prefix_cache", "seed"}
    )

    def __init__(self, backend: Backend, config: EngineConfig, *, context_length: int, eos_token_ids: Sequence[int] = ()) -> None:
        self.config = config
        self.context_length = min(context_length, config.max_context or context_length, backend.num_blocks * BLOCK_SIZE)
        self.eos_token_ids = drawable(eos_token_ids, backend.vocab_size)
        self.precision = backend.precision
        self.capabilities = BatchingEngine.capabilities - backend.lacks
        self._backend = backend
        self._pool = BlockPool(backend.num_blocks)
        self._scheduler = Scheduler(
            num_slots=config.num_slots,
            prefill_chunk=config.prefill_chunk,
            pool=self._pool,
            prefix_cache=config.prefix_cache,
            depth=backend.depth,
        )
        objective_s = None if config.tpot_objective_ms is None else config.tpot_objective_ms / 1000
        self._cap = BatchCap(least=config.min_slots, most=config.num_slots, objective_s=objective_s)
        self._scheduler.limit = self._cap.value
        self._relief = Relief(backend, self._scheduler)
        self._state: EngineState = "new"
        self._error: str | None = None
        self._lock = threading.Lock()
        self._open: dict[str, Stream] = {}
        self._deadlines = Deadlines()
        self._searches: list[GenerationRequest] = []
        self._adapters = LoadedAdapters()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="r1ray-engine", daemon=True)
        self._post: Post = []
        self._under_way: deque[tuple[list[Segment], object]] = deque()
        self._counts = {"prompt": 0, "cached": 0, "generated": 0, "finished": 0, "aborted": 0, "failed": 0, "steps": 0}

    @property
    def backend(self) -> Backend:
        """For measurements before the start; afterwards it is the engine's thread's alone."""
        return self._backend

    # --- called from event loops -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        with self._lock:
            if self._state != "new":
                return
            self._state = "running"
        self._backend.watch(self._fail)
        self._thread.start()
        weakref.finalize(self, _halt, self._inbox, self._thread)

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        if request.num_beams == 1:
            return self._one(request)
        return self._search(request)

    async def _one(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        stream = self._submit(request)
        async with aclosing(chunks_of(stream.mailbox, lambda: self._abandon(stream))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def _search(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        self._searches.append(request)  # its streams may all have ended when it begins another
        submit = partial(self._submit, deadline=deadline_of(request))  # of all its streams, whenever they begin
        try:
            async with aclosing(search_beams(request, self._ranking(request), submit, self._abandon)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            self._searches.remove(request)
            self._inbox.put(self._let_go)

    def _ranking(self, request: GenerationRequest) -> Ranking:
        has_room = self.config.num_slots - len(self._open) >= request.num_beams
        return Ranking(
            num_beams=request.num_beams if has_room else min(self.config.busy_beams or request.num_beams, request.num_beams),
            length_penalty=request.length_penalty,
            max_tokens=clipped_max_tokens(request, context_length=self.context_length),
            stop_ids=() if request.ignore_eos else self.eos_token_ids | frozenset(request.stop_token_ids),
            vocab_size=self._backend.vocab_size,
        )

    def _abandon(self, stream: Stream) -> None:
        self._inbox.put(lambda: self._abort(stream))

    async def abort(self, request_id: str) -> None:
        with self._lock:
            found = [stream for id_, stream in self._open.items() if id_ == request_id or id_.startswith(request_id + BEAM)]
        for stream in found:
            self._abandon(stream)

    async def load_adapter(self, name: str, path: Path) -> None:
        with self._lock:
            done = self._promise()
        self._inbox.put(lambda: self._load(done, name, path))
        await asyncio.wrap_future(done)

    async def unload_adapter(self, name: str) -> None:
        with self._lock:
            self._adapters.number(name)
            self._adapters.leave(name, done := self._promise())
        self._inbox.put(self._let_go)
        await asyncio.wrap_future(done)

    def _promise(self) -> Future[None]:
        """Kept by the engine's thread, at its end if need be, also when nobody waits any more."""
        self._check_running()
        return self._adapters.promise()

    async def stop(self, drain_s: float = 0.0) -> None:
        with self._lock:
            is_new, started = self._state == "new", self._state in ("running", "draining")
            if self._state in ("new", "running"):
                self._state = "draining"
        deadline = time.monotonic() + drain_s
        while started and self._open and time.monotonic() < deadline:
            await asyncio.sleep(DRAIN_POLL_S)
        self._inbox.put(None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, JOIN_TIMEOUT_S)
        if is_new:  # else the thread does it at its end
            await asyncio.to_thread(self._backend.close)
        if self._state != "failed":
            self._state = "stopped"

    def stats(self) -> EngineStats:
        num_running = self._scheduler.num_running
        return EngineStats(
            state=self._state,
            num_slots=self.config.num_slots,
            num_free_slots=self.config.num_slots - num_running,
            num_running=num_running,
            num_waiting=max(0, len(self._open) - num_running),
            max_waiting=self.config.max_waiting,
            num_prompt_tokens=self._counts["prompt"],
            num_cached_tokens=self._counts["cached"],
            num_generated_tokens=self._counts["generated"],
            num_finished=self._counts["finished"],
            num_aborted=self._counts["aborted"],
            num_failed=self._counts["failed"],
            num_preempted=self._scheduler.num_preempted,
            num_steps=self._counts["steps"],
            num_blocks=self._pool.num_blocks,
            num_free_blocks=self._pool.num_free,
            error=self._error,
        )

    def _submit(self, request: GenerationRequest, *, room: int = 1, deadline: float | None = None) -> Stream:
        """`room`: for how many streams there must be room in the queue; 0 for one that carries on what runs already."""
        check_prompt(request, context_length=self.context_length, vocab_size=self._backend.vocab_size)
        stream = Stream(
            request=request,
            mailbox=Mailbox(),
            max_tokens=clipped_max_tokens(request, context_length=self.context_length),
            stop_ids=self.eos_token_ids | frozenset(request.stop_token_ids),
            rng=new_rng(request.sampling),
            deadline=deadline_of(request) if deadline is None else deadline,
        )
        with self._lock:
            if room or self._state != "draining":
                self._check_running()
            stream.adapter_number = self._adapters.number(request.adapter, carries_on=not room)
            if request.id in self._open:
                raise InvalidRequest(f"Request id {request.id} is running already. Give each request its own id.")
            if room and len(self._open) + room > self.config.num_slots + self.config.max_waiting:
                raise QueueFull(f"{self.config.max_waiting} requests wait already, which is the limit. Retry later.")
            self._open[request.id] = stream
            self._deadlines.watch(stream)
        self._inbox.put(lambda: self._begin(stream))
        return stream

    def _check_running(self) -> None:
        if self._state != "running":
            raise self._death()

    def _death(self) -> EngineStopped:
        if self._error:
            return EngineStopped(f"The engine failed: {self._error} Send the request again when the replica is rebuilt.")
        return EngineStopped(f"The engine is {self._state}. Start it, or send the request to another replica.")

    def _fail(self, reason: str) -> None:
        """From any thread, for good. Does not wait for the engine's own thread, which may hang in a pass that will never come back."""
        with self._lock:
            if self._state in ("failed", "stopped"):
                return
            self._state, self._error = "failed", reason
            streams, self._open = list(self._open.values()), {}
        deliver([(stream.mailbox, self._death()) for stream in streams])
        self._inbox.put(None)

    # --- the engine's thread -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self) -> None:
        if self.config.num_threads is not None:
            torch.set_num_threads(self.config.num_threads)
        try:
            while self._take_orders():
                self._step()
        except Exception as error:
            log.exception("the engine's step loop died")
            self._fail(str(error) if isinstance(error, R1RayError) else f"{type(error).__name__}: {error}.")
        finally:
            self._end_all()

    def _take_orders(self) -> bool:
        """Run what the event loops ask for; sleep when there is nothing to compute. False at the end."""
        while True:
            idle = self._scheduler.num_running == 0 and self._scheduler.num_waiting == 0
            try:
                order = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            if order is None:
                return False
            order()
            self._flush()

    def _begin(self, stream: Stream) -> None:
        if self._open.get(stream.request.id) is stream:  # it may be over time already
            self._scheduler.add(stream)

    def _expire(self) -> None:
        with self._lock:
            late = self._deadlines.pass_by(self._open.values())
        for stream in late:
            self._close(stream, over_time(stream.request), "failed")

    def _step(self) -> None:
        """1. plan and submit passes up to the backend's depth  2. wait for the oldest  3. draw and book its tokens  4. post them."""
        self._expire()
        while len(self._under_way) < self._backend.depth and (plan := self._scheduler.plan()):
            if doubted := self._pool.take_doubted():
                self._backend.clear(doubted)
            try:
                submitted = self._relief.submit(plan)
            except GenerationFailed as error:
                self._close(plan[0].stream, error, "failed")
                continue
            if submitted is not None:
                self._under_way.append((plan, submitted))
        if not self._under_way:
            self._flush()
            return
        plan, submitted = self._under_way.popleft()
        logits = self._backend.collect(submitted)
        alive = self._scheduler.computed(plan)
        drawing = [segment.stream for segment in plan if segment.completes]
        if any(segment.num_logits != segment.completes for segment in plan):
            logits = scored(logits, plan)
        drawn = sample(logits, drawing) if drawing else []
        self._pace([stream for stream in drawing if stream in alive])
        for stream, token in zip(drawing, drawn, strict=True):
            if stream in alive:
                self._book(stream, token)
        self._counts["steps"] += 1
        self._flush()

    def _pace(self, drawing: Sequence[Stream]) -> None:
        running = self._scheduler.running
        if self._cap.objective_s is not None and (found := waited(drawing, running, time.monotonic())):
            seconds, share = found
            self._cap.step(seconds, len(running), someone_waits=self._scheduler.num_waiting > 0, share=share)
            self._scheduler.limit = self._cap.value

    def _book(self, stream: Stream, drawn: Drawn | NoToken) -> None:
        if isinstance(drawn, NoToken):
            cause = "Its mask or its logit_bias allows none."
            if drawn is NoToken.DAMAGED:
                cause = "The weights or the adapter are damaged; evaluate them."
                self._pool.doubt(stream.blocks)
            text = f"Request {stream.request.id}: no token has a finite logit. {cause}"
            self._close(stream, GenerationFailed(text), "failed")
            return
        if not stream.generated:
            self._counts["prompt"] += len(stream.request.prompt_ids)
            self._counts["cached"] += stream.num_cached
        stream.generated.append(drawn.token)
        self._counts["generated"] += 1
        reason = stream.finish_reason
        hidden = reason == "stop" and not stream.request.keep_stop
        chunk = chunk_of(stream, reason) if hidden else chunk_of(stream, reason, drawn)
        if reason is None:
            self._post.append((stream.mailbox, chunk))
        else:
            self._close(stream, chunk, "finished")

    def _abort(self, stream: Stream) -> None:
        if self._open.get(stream.request.id) is stream:
            self._close(stream, chunk_of(stream, "abort"), "aborted")

    def _load(self, done: Future[None], name: str, path: Path) -> None:
        try:
            self._backend.load_adapter(name, path)
        except Exception as error:  # handed to whoever awaits it; the streams run on
            self._adapters.keep([done], error)
            return
        with self._lock:
            number, waits = self._adapters.came(name)
            for stream in self._open.values():
                if stream.request.adapter == name:
                    stream.renumber(self._adapters.new_number() if stream.blocks else number)
        self._adapters.keep([done] if waits is None else [done, waits])

    def _let_go(self) -> None:
        """Drop the unloaded adapters that nobody uses any more."""
        with self._lock:
            users = {request.adapter for request in (*(stream.request for stream in self._open.values()), *self._searches)}
            unused = self._adapters.unused(users)
        for name in unused:
            self._backend.unload_adapter(name)
            with self._lock:
                self._adapters.keep([self._adapters.gone(name)])

    def _close(self, stream: Stream, last: TokenChunk | Exception, counter: str) -> None:
        self._scheduler.remove(stream)
        with self._lock:
            self._open.pop(stream.request.id, None)
        self._counts[counter] += 1
        self._post.append((stream.mailbox, last))
        if self._adapters.are_leaving:
            self._let_go()

    def _flush(self) -> None:
        if self._post:
            deliver(self._post)
            self._post = []

    def _end_all(self) -> None:
        """Nobody waits for ever: every open stream and every awaited adapter hears that it is over."""
        with self._lock:
            if self._state != "failed":
                self._state = "stopped"
            streams, self._open = list(self._open.values()), {}
            awaited = self._adapters.awaited
        self._post += [(s.mailbox, self._death()) for s in streams]
        self._flush()
        self._adapters.keep(awaited, self._death())
        self._backend.close()


def _halt(inbox: queue.SimpleQueue[Callable[[], None] | None], thread: threading.Thread) -> None:
    """At interpreter exit: a thread inside torch while the interpreter goes down would abort the process."""
    inbox.put(None)
    thread.join(JOIN_TIMEOUT_S)
