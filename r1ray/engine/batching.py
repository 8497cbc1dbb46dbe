"""The in-house engine: continuous batching over a backend, in one thread of its own.

Every step computes one token for each running stream and the next piece of the waiting prompts together, so streams join and leave at
any step. Event loops send orders to the thread through an inbox and get their chunks through mailboxes; what both sides share is the
register. Here is the event loops' side and the thread's loop, `core.py` has its body. Knows no text, no HTTP, no model.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path

import torch

from r1ray.engine.admission import check_prompt, clipped_max_tokens, drawable
from r1ray.engine.backend import BLOCK_SIZE, Backend
from r1ray.engine.beam import Ranking, search_beams
from r1ray.engine.config import EngineConfig
from r1ray.engine.core import EngineCore
from r1ray.engine.deadlines import deadline_of
from r1ray.engine.mailbox import Mailbox, chunks_of, deliver
from r1ray.engine.protocol import EngineStats, GenerationRequest, TokenChunk
from r1ray.engine.register import Register
from r1ray.engine.sampler import new_rng
from r1ray.engine.scheduler import Stream
from r1ray.errors import R1RayError

__all__ = ["BatchingEngine"]

log = logging.getLogger(__name__)

DRAIN_POLL_S = 0.02
JOIN_TIMEOUT_S = 60.0

Inbox = queue.SimpleQueue[Callable[[], None] | None]
"""What the thread shall do before its next step; None ends it."""


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
        self._register = Register(num_slots=config.num_slots, max_waiting=config.max_waiting)
        self._core = EngineCore(backend, config, self._register)
        self._inbox: Inbox = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="r1ray-engine", daemon=True)

    @property
    def backend(self) -> Backend:
        """For measurements before the start; afterwards it is the engine's thread's alone."""
        return self._backend

    # --- called from event loops -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        if not self._register.start():
            return
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
        self._register.begin_search(request)
        submit = partial(self._submit, deadline=deadline_of(request))  # of all its streams, whenever they begin
        try:
            async with aclosing(search_beams(request, self._ranking(request), submit, self._abandon)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            self._register.end_search(request)
            self._inbox.put(self._core.let_go)

    def _ranking(self, request: GenerationRequest) -> Ranking:
        has_room = self._register.num_free >= request.num_beams
        return Ranking(
            num_beams=request.num_beams if has_room else min(self.config.busy_beams or request.num_beams, request.num_beams),
            length_penalty=request.length_penalty,
            max_tokens=clipped_max_tokens(request, context_length=self.context_length),
            stop_ids=() if request.ignore_eos else self.eos_token_ids | frozenset(request.stop_token_ids),
            vocab_size=self._backend.vocab_size,
        )

    def _submit(self, request: GenerationRequest, *, room: int = 1, deadline: float | None = None) -> Stream:
        """`room` as `Register.enter` takes it."""
        check_prompt(request, context_length=self.context_length, vocab_size=self._backend.vocab_size)
        stream = Stream(
            request=request,
            mailbox=Mailbox(),
            max_tokens=clipped_max_tokens(request, context_length=self.context_length),
            stop_ids=self.eos_token_ids | frozenset(request.stop_token_ids),
            rng=new_rng(request.sampling),
            deadline=deadline_of(request) if deadline is None else deadline,
        )
        self._register.enter(stream, room=room)
        self._inbox.put(lambda: self._core.begin(stream))
        return stream

    def _abandon(self, stream: Stream) -> None:
        self._inbox.put(lambda: self._core.abort(stream))

    async def abort(self, request_id: str) -> None:
        for stream in self._register.of_request(request_id):
            self._abandon(stream)

    async def load_adapter(self, name: str, path: Path) -> None:
        done = self._register.promise()
        self._inbox.put(lambda: self._core.load(done, name, path))
        await asyncio.wrap_future(done)

    async def unload_adapter(self, name: str) -> None:
        done = self._register.unload(name)
        self._inbox.put(self._core.let_go)
        await asyncio.wrap_future(done)

    async def stop(self, drain_s: float = 0.0) -> None:
        before = self._register.drain()
        deadline = time.monotonic() + drain_s
        while before in ("running", "draining") and self._register.num_open and time.monotonic() < deadline:
            await asyncio.sleep(DRAIN_POLL_S)
        self._inbox.put(None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, JOIN_TIMEOUT_S)
        if before == "new":  # else the thread does it at its end
            await asyncio.to_thread(self._backend.close)
        self._register.stop()

    def stats(self) -> EngineStats:
        return self._core.stats()

    def _fail(self, reason: str) -> None:
        """From any thread, for good. Does not wait for the engine's own thread, which may hang in a pass that will never come back."""
        deliver([(stream.mailbox, self._register.death()) for stream in self._register.fail(reason)])
        self._inbox.put(None)

    # --- the engine's thread -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _run(self) -> None:
        if self.config.num_threads is not None:
            torch.set_num_threads(self.config.num_threads)
        try:
            while self._take_orders():
                self._core.step()
        except Exception as error:
            log.exception("the engine's step loop died")
            self._fail(str(error) if isinstance(error, R1RayError) else f"{type(error).__name__}: {error}.")
        finally:
            self._core.end()

    def _take_orders(self) -> bool:
        """Run what the event loops ask for; sleep when there is nothing to compute. False at the end."""
        while True:
            try:
                order = self._inbox.get(block=self._core.is_idle)
            except queue.Empty:
                return True
            if order is None:
                return False
            order()
            self._core.flush()


def _halt(inbox: Inbox, thread: threading.Thread) -> None:
    """At interpreter exit: a thread inside torch while the interpreter goes down would abort the process."""
    inbox.put(None)
    thread.join(JOIN_TIMEOUT_S)
