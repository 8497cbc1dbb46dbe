"""The in-house engine: continuous batching of a transformers causal LM in one thread of its own.

Every step computes one token for each running stream and the next piece of the waiting prompts together, so streams join and leave at
any step. Event loops talk to the thread through an inbox and get their chunks through mailboxes. Knows no text and no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedModel

from r1ray.engine.admission import check_prompt, clipped_max_tokens
from r1ray.engine.config import EngineConfig
from r1ray.engine.mailbox import Mailbox, deliver
from r1ray.engine.protocol import EngineState, EngineStats, FinishReason, GenerationRequest, TokenChunk
from r1ray.engine.runner import ModelRunner
from r1ray.engine.sampler import new_rng
from r1ray.engine.scheduler import Scheduler, Stream
from r1ray.errors import EngineStopped, GenerationFailed, InvalidRequest, QueueFull, UnknownAdapter

__all__ = ["TorchEngine"]

log = logging.getLogger(__name__)

DRAIN_POLL_S = 0.02
JOIN_TIMEOUT_S = 60.0

Post = list[tuple[Mailbox[TokenChunk | Exception], TokenChunk | Exception]]


class TorchEngine:
    """Takes a loaded model; `eos_token_ids` defaults to those of its generation config."""

    capabilities: frozenset[str] = frozenset({"abort", "adapters", "chunked_prefill", "continuous_batching", "penalties", "seed"})

    def __init__(self, model: PreTrainedModel, config: EngineConfig | None = None, *, eos_token_ids: Sequence[int] | None = None) -> None:
        self.config = config or EngineConfig()
        longest = int(model.config.max_position_embeddings)
        self.context_length = min(longest, self.config.max_context or longest)
        self.eos_token_ids = frozenset(_eos_of(model) if eos_token_ids is None else eos_token_ids)
        self._runner = ModelRunner(model, num_slots=self.config.num_slots)
        self._scheduler = Scheduler(num_slots=self.config.num_slots, prefill_chunk=self.config.prefill_chunk)
        self._state: EngineState = "new"
        self._error: str | None = None
        self._lock = threading.Lock()
        self._open: dict[str, Stream] = {}
        self._loads: set[Future[None]] = set()
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="r1ray-engine", daemon=True)
        self._post: Post = []
        self._counts = {"prompt": 0, "generated": 0, "finished": 0, "aborted": 0, "failed": 0, "steps": 0}

    # --- called from event loops -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        with self._lock:
            if self._state != "new":
                return
            self._state = "running"
        self._thread.start()
        weakref.finalize(self, _halt, self._inbox, self._thread)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        stream = self._submit(request)
        ended = False
        try:
            while not ended:
                item = await stream.mailbox.get()
                ended = isinstance(item, Exception) or item.finish_reason is not None
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            if not ended:
                self._inbox.put(lambda: self._abort(stream))

    async def abort(self, request_id: str) -> None:
        with self._lock:
            stream = self._open.get(request_id)
        if stream is not None:
            self._inbox.put(lambda: self._abort(stream))

    async def load_adapter(self, name: str, path: Path) -> None:
        done: Future[None] = Future()
        with self._lock:
            self._check_running()
            self._loads.add(done)
        self._inbox.put(lambda: self._load(done, name, path))
        await asyncio.wrap_future(done)

    async def stop(self, drain_s: float = 0.0) -> None:
        with self._lock:
            started = self._state in ("running", "draining")
            if self._state in ("new", "running"):
                self._state = "draining"
        deadline = time.monotonic() + drain_s
        while started and self._open and time.monotonic() < deadline:
            await asyncio.sleep(DRAIN_POLL_S)
        self._inbox.put(None)
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join, JOIN_TIMEOUT_S)
        if self._state != "failed":
            self._state = "stopped"

    def stats(self) -> EngineStats:
        num_running, num_open = self._scheduler.num_running, len(self._open)
        return EngineStats(
            state=self._state,
            num_slots=self.config.num_slots,
            num_free_slots=self.config.num_slots - num_running,
            num_running=num_running,
            num_waiting=max(0, num_open - num_running),
            max_waiting=self.config.max_waiting,
            num_prompt_tokens=self._counts["prompt"],
            num_generated_tokens=self._counts["generated"],
            num_finished=self._counts["finished"],
            num_aborted=self._counts["aborted"],
            num_failed=self._counts["failed"],
            num_steps=self._counts["steps"],
            error=self._error,
        )

    def _submit(self, request: GenerationRequest) -> Stream:
        check_prompt(request, context_length=self.context_length, vocab_size=self._runner.vocab_size)
        if request.adapter is not None and request.adapter not in self._runner.adapters.names:
            raise UnknownAdapter(f"No adapter {request.adapter!r} is loaded; loaded: {sorted(self._runner.adapters.names)}. Load it first.")
        stream = Stream(
            request=request,
            mailbox=Mailbox(),
            max_tokens=clipped_max_tokens(request, context_length=self.context_length),
            stop_ids=self.eos_token_ids | frozenset(request.stop_token_ids),
            rng=new_rng(request.sampling),
        )
        with self._lock:
            self._check_running()
            if request.id in self._open:
                raise InvalidRequest(f"Request id {request.id} is running already. Give each request its own id.")
            if len(self._open) >= self.config.num_slots + self.config.max_waiting:
                raise QueueFull(f"{self.config.max_waiting} requests wait already, which is the limit. Retry later.")
            self._open[request.id] = stream
        self._inbox.put(lambda: self._scheduler.add(stream))
        return stream

    def _check_running(self) -> None:
        if self._state != "running":
            raise self._death()

    def _death(self) -> EngineStopped:
        cause = f": {self._error}" if self._error else ""
        return EngineStopped(f"The engine is {self._state}{cause}. Start it, or send the request to another replica.")

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
            self._state, self._error = "failed", f"{type(error).__name__}: {error}"
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

    def _step(self) -> None:
        """1. plan  2. compute every adapter's group  3. book the tokens  4. post them, one wake-up per event loop.

        Booking waits for all groups: a stream that ends moves others to new slots, and the plan names the old ones.
        """
        plan = self._scheduler.plan()
        results = [result for group in plan for result in self._runner.step(group)]
        completed = [s for group in plan for s in group.segments if s.completes]
        for segment in sorted(completed, key=lambda s: s.slot):
            self._scheduler.complete_prefill(segment.stream)
            self._counts["prompt"] += len(segment.stream.request.prompt_ids)
        for stream, token in results:
            self._book(stream, token)
        self._counts["steps"] += 1
        self._flush()

    def _book(self, stream: Stream, token: int | None) -> None:
        if token is None:
            text = f"Request {stream.request.id}: the model's logits are not finite. Its weights or its adapter are damaged; evaluate them."
            self._runner.clear(self._slot_of(stream))
            self._close(stream, GenerationFailed(text), "failed")
            return
        stream.generated.append(token)
        self._counts["generated"] += 1
        reason = stream.finish_reason
        chunk = _chunk(stream, () if reason == "stop" else (token,), reason)
        if reason is None:
            self._post.append((stream.mailbox, chunk))
        else:
            self._close(stream, chunk, "finished")

    def _abort(self, stream: Stream) -> None:
        if self._open.get(stream.request.id) is stream:
            self._close(stream, _chunk(stream, (), "abort"), "aborted")

    def _load(self, done: Future[None], name: str, path: Path) -> None:
        try:
            self._runner.adapters.load(name, path)
        except Exception as error:  # handed to whoever awaits it; the streams run on
            done.set_exception(error)
        else:
            done.set_result(None)
        self._loads.discard(done)

    def _close(self, stream: Stream, last: TokenChunk | Exception, counter: str) -> None:
        self._runner.move(self._scheduler.remove(stream))
        with self._lock:
            self._open.pop(stream.request.id, None)
        self._counts[counter] += 1
        self._post.append((stream.mailbox, last))

    def _slot_of(self, stream: Stream) -> int:
        return (self._scheduler.decoding + self._scheduler.prefilling).index(stream)

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
            loads, self._loads = self._loads, set()
        self._post += [(s.mailbox, self._death()) for s in streams]
        self._flush()
        for done in loads:
            done.set_exception(self._death())


def _chunk(stream: Stream, tokens: tuple[int, ...], reason: FinishReason | None) -> TokenChunk:
    request = stream.request
    return TokenChunk(request_id=request.id, token_ids=tokens, finish_reason=reason, num_prompt_tokens=len(request.prompt_ids))


def _halt(inbox: queue.SimpleQueue[Callable[[], None] | None], thread: threading.Thread) -> None:
    """At interpreter exit: a thread inside torch while the interpreter goes down would abort the process."""
    inbox.put(None)
    thread.join(JOIN_TIMEOUT_S)


def _eos_of(model: PreTrainedModel) -> list[int]:
    eos = getattr(model.generation_config, "eos_token_id", None)
    eos = model.config.eos_token_id if eos is None else eos
    return [eos] if isinstance(eos, int) else cast(list[int], list(eos or []))
