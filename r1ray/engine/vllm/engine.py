"""The engine whose model runs in vLLM: admission, mailboxes and death on this side, one actor on the other.

A thread of its own keeps one call to the actor outstanding; what it brings goes to the readers' mailboxes, so no event loop ever
waits for Ray. A dead actor, or a dead vLLM inside it, ends every open stream at once and leaves the engine failed: the replica is
rebuilt as one unit. Knows no text, no HTTP, and of vLLM only the actor's methods.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1ray.engine.admission import check_prompt, clipped_max_tokens, drawable
from r1ray.engine.config import EngineConfig
from r1ray.engine.deadlines import Deadlines, deadline_of, over_time
from r1ray.engine.mailbox import Mailbox, chunks_of, deliver
from r1ray.engine.protocol import EngineState, EngineStats, GenerationRequest, TokenChunk, TokenLogprobs
from r1ray.engine.vllm.arguments import sampling_arguments
from r1ray.engine.vllm.worker import Event
from r1ray.errors import AdapterMismatch, EngineStopped, GenerationFailed, InvalidRequest, QueueFull, UnknownAdapter

__all__ = ["VllmEngine", "adapter_rank"]

log = logging.getLogger(__name__)

POLL_S = 1.0
SOON_S = 0.01
DEAF_S = 120.0  # an actor that does not answer a poll for so long hangs
STOP_S = 30.0
DRAIN_POLL_S = 0.02
CAPABILITIES = frozenset(
    {
        "abort",
        "continuous_batching",
        "deadlines",
        "keep_stop",
        "logit_bias",
        "logprobs",
        "penalties",
        "preemption",
        "prompt_logprobs",
        "prefix_cache",
        "seed",
    }
)


@dataclass(slots=True)
class _Stream:
    request: GenerationRequest
    mailbox: Mailbox[TokenChunk | Exception]
    deadline: float
    num_tokens: int = 0


class VllmEngine:
    """`actor` has loaded the model and `found` is what it said of it (launch.py). `pid` is its process, vLLM's others are below it."""

    def __init__(self, actor: Any, found: Mapping[str, Any], config: EngineConfig, *, eos_token_ids: Sequence[int] = ()) -> None:
        self.config = config
        self.context_length: int = found["context"]
        self.eos_token_ids = drawable(eos_token_ids, found["vocab_size"])
        self.precision: str = found["dtype"]
        self.pid: int = found["pid"]
        self.capabilities = CAPABILITIES | {
            name for name, has in (("adapters", config.vllm.max_adapters), ("chunked_prefill", found["chunked_prefill"])) if has
        }
        self._vocab_size: int = found["vocab_size"]
        self._num_blocks: int = found["num_blocks"]
        self._actor = actor
        self._adapters: set[str] = set()
        self._state: EngineState = "new"
        self._error: str | None = None
        self._lock = threading.Lock()
        self._open: dict[str, _Stream] = {}
        self._deadlines = Deadlines()
        self._figures: Mapping[str, float] = {}
        self._counts = {"prompt": 0, "cached": 0, "generated": 0, "finished": 0, "aborted": 0, "failed": 0}
        self._halt = threading.Event()
        self._thread = threading.Thread(target=self._run, name="r1ray-vllm", daemon=True)

    # --- called from event loops -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        with self._lock:
            if self._state != "new":
                return
            self._state = "running"
        self._thread.start()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        stream = self._submit(request)
        async with aclosing(chunks_of(stream.mailbox, lambda: self._actor.abort.remote(request.id))) as chunks:
            async for chunk in chunks:
                yield chunk

    async def abort(self, request_id: str) -> None:
        if request_id in self._open:
            self._actor.abort.remote(request_id)

    async def load_adapter(self, name: str, path: Path) -> None:
        from ray.exceptions import RayActorError, RayTaskError

        self._check_running()
        if "adapters" not in self.capabilities:
            raise AdapterMismatch(f"vLLM was started without adapters, so {name} cannot be loaded. Set engine.vllm.max_adapters.")
        if (rank := adapter_rank(path)) > (most := self.config.vllm.max_adapter_rank):
            raise AdapterMismatch(f"The adapter at {path} has rank {rank}, the limit is {most}. Raise engine.vllm.max_adapter_rank.")
        try:
            await self._actor.load_adapter.remote(name, str(path))
        except RayActorError as error:
            raise self._death() from error
        except RayTaskError as error:
            raise AdapterMismatch(f"vLLM refuses the adapter at {path}: {error.cause}. Was it trained on this base?") from error
        self._adapters.add(name)

    async def unload_adapter(self, name: str) -> None:
        from ray.exceptions import RayActorError

        self._check_running()
        with self._lock:
            self._check_adapter(name)
            self._adapters.remove(name)
        try:
            await self._actor.unload_adapter.remote(name)
        except RayActorError as error:
            raise self._death() from error

    async def stop(self, drain_s: float = 0.0) -> None:
        with self._lock:
            if self._state in ("new", "running"):
                self._state = "draining"
        deadline = time.monotonic() + drain_s
        while self._state == "draining" and self._open and time.monotonic() < deadline:
            await asyncio.sleep(DRAIN_POLL_S)
        self._halt.set()
        await asyncio.to_thread(self._end)
        if self._state != "failed":
            self._state = "stopped"

    def stats(self) -> EngineStats:
        num_open, usage = len(self._open), self._figures.get("usage", 0.0)
        num_running = min(num_open, int(self._figures.get("running", 0)))
        return EngineStats(
            state=self._state,
            num_slots=self.config.num_slots,
            num_free_slots=max(0, self.config.num_slots - num_open),
            num_running=num_running,
            num_waiting=num_open - num_running,
            max_waiting=self.config.max_waiting,
            num_prompt_tokens=self._counts["prompt"],
            num_cached_tokens=self._counts["cached"],
            num_generated_tokens=self._counts["generated"],
            num_finished=self._counts["finished"],
            num_aborted=self._counts["aborted"],
            num_failed=self._counts["failed"],
            num_preempted=int(self._figures.get("preempted", 0)),
            num_steps=int(self._figures.get("steps", 0)),
            num_blocks=self._num_blocks,
            num_free_blocks=round(self._num_blocks * (1 - usage)),
            error=self._error,
        )

    def _submit(self, request: GenerationRequest) -> _Stream:
        check_prompt(request, context_length=self.context_length, vocab_size=self._vocab_size)
        if request.mask is not None:
            raise InvalidRequest(f"Request {request.id} has a mask, which vLLM cannot call in its process. Use engine type torch.")
        self._check_adapter(request.adapter)
        max_tokens = clipped_max_tokens(request, context_length=self.context_length)
        stream = _Stream(request, Mailbox(), deadline_of(request))
        with self._lock:
            self._check_running()
            if request.id in self._open:
                raise InvalidRequest(f"Request id {request.id} is running already. Give each request its own id.")
            if len(self._open) >= self.config.num_slots + self.config.max_waiting:
                raise QueueFull(f"{self.config.max_waiting} requests wait already, which is the limit. Retry later.")
            self._open[request.id] = stream
            self._deadlines.watch(stream)
        sampling = sampling_arguments(request, max_tokens=max_tokens, eos_token_ids=self.eos_token_ids)
        order = {name: getattr(request, name) for name in ("id", "prompt_ids", "priority", "cache_salt", "adapter", "keep_stop")}
        self._actor.submit.remote(order | {"sampling": sampling})
        return stream

    def _check_adapter(self, name: str | None) -> None:
        if name is not None and name not in self._adapters:
            raise UnknownAdapter(f"No adapter {name!r} is loaded; loaded: {sorted(self._adapters)}. Load it first.")

    def _check_running(self) -> None:
        if self._state != "running":
            raise self._death()

    def _death(self) -> EngineStopped:
        cause = f": {self._error}" if self._error else ""
        return EngineStopped(f"The engine is {self._state}{cause}. Start it, or send the request to another replica.")

    # --- the thread that polls ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        import ray

        try:
            while not self._halt.is_set():
                wait_s = min(POLL_S, max(SOON_S, self._deadlines.next - time.monotonic()))
                events, self._figures = ray.get(self._actor.poll.remote(wait_s), timeout=DEAF_S)
                deliver([*(self._book(event) for event in events if event[0] in self._open), *self._expire()])
        except Exception as error:  # whatever Ray or vLLM says here, no stream will ever go on
            if not self._halt.is_set():
                log.exception("vLLM is lost")
                cause = getattr(error, "cause", None) or error
                self._state, self._error = "failed", f"vLLM is gone ({type(error).__name__}: {cause})"
        finally:
            self._end_all()

    def _book(self, event: Event) -> tuple[Mailbox[TokenChunk | Exception], TokenChunk | Exception]:
        id_, tokens, reason, num_cached, logprobs, of_prompt, error = event
        stream = self._open[id_]
        if error is not None:
            self._close(id_, "failed")
            return stream.mailbox, _exception(id_, *error)
        num_prompt = len(stream.request.prompt_ids)
        if not stream.num_tokens and (tokens or reason == "stop"):
            self._counts["prompt"] += num_prompt
            self._counts["cached"] += num_cached
        stream.num_tokens += len(tokens)
        self._counts["generated"] += len(tokens)
        if reason is not None:
            self._close(id_, "aborted" if reason == "abort" else "finished")
        chunk = TokenChunk(
            request_id=id_,
            token_ids=tokens,
            finish_reason=reason,  # type: ignore[arg-type]  # the worker lets no other pass
            num_prompt_tokens=num_prompt,
            num_cached_tokens=num_cached,
            logprobs=tuple(TokenLogprobs(token=token, logprob=value, top=top) for token, value, top in logprobs or ()),
            prompt_logprobs=tuple(value for value, _ in of_prompt or ()),
            prompt_top=tuple(top for _, top in of_prompt or ()) if stream.request.num_prompt_logprobs else (),
        )
        return stream.mailbox, chunk

    def _expire(self) -> list[tuple[Mailbox[TokenChunk | Exception], Exception]]:
        with self._lock:
            late = self._deadlines.pass_by(self._open.values())
        for stream in late:
            self._actor.abort.remote(stream.request.id)
            self._close(stream.request.id, "failed")
        return [(stream.mailbox, over_time(stream.request)) for stream in late]

    def _close(self, id_: str, counter: str) -> None:
        with self._lock:
            self._open.pop(id_, None)
        self._counts[counter] += 1

    def _end_all(self) -> None:
        """Nobody waits for ever: every open stream hears that it is over."""
        with self._lock:
            if self._state != "failed":
                self._state = "stopped"
            streams, self._open = list(self._open.values()), {}
        deliver([(stream.mailbox, self._death()) for stream in streams])

    def _end(self) -> None:
        """Let vLLM end its processes, then the actor; a thread that polls it hears of it."""
        import ray
        from ray.exceptions import RayError

        try:
            ray.get(self._actor.stop.remote(), timeout=STOP_S)
        except RayError as error:
            log.info("vLLM is gone already: %s", type(error).__name__)
        ray.kill(self._actor)
        if self._thread.is_alive():
            self._thread.join(STOP_S)


def _exception(id_: str, kind: str, text: str) -> Exception:
    if kind == "unknown":
        return UnknownAdapter(f"The adapter {text!r} of request {id_} has just been unloaded. Load it first.")
    if kind == "invalid":
        return InvalidRequest(f"vLLM refuses request {id_}: {text}. Correct the request.")
    return GenerationFailed(f"vLLM failed request {id_}: {text}. The other requests run on.")


def adapter_rank(path: Path) -> int:
    """Raises AdapterMismatch when vLLM could not use the adapter: it is more than plain LoRA."""
    from r1ray.model.checkpoint import read_json
    from r1ray.model.lora import why_not_plain

    if why := why_not_plain(path):
        raise AdapterMismatch(f"vLLM cannot use the adapter at {path}: {why}. Merge it into its base first.")
    return int(read_json(path / "adapter_config.json")["r"])
