"""An engine without a model: deterministic answers with the slots, queue, abort and death of a real one.

For tests of the server, the evaluator and the sweeps. Knows no torch. It polls instead of waiting on loop-bound locks, so that one
engine serves several event loops, as the real one does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path

from r1ray.engine.admission import check_prompt, clipped_max_tokens
from r1ray.engine.config import EngineConfig
from r1ray.engine.deadlines import deadline_of, over_time
from r1ray.engine.protocol import EngineState, EngineStats, FinishReason, GenerationRequest, TokenChunk
from r1ray.errors import EngineStopped, InvalidRequest, QueueFull, UnknownAdapter

__all__ = ["FakeEngine", "echo"]

POLL_S = 0.001


def echo(request: GenerationRequest) -> Sequence[int]:
    """The default answer: the prompt's own ids."""
    return request.prompt_ids


class FakeEngine:
    """Yields `answer(request)` one token at a time, then `stop`; `length` when max_tokens comes first."""

    def __init__(
        self,
        config: EngineConfig | None = None,
        *,
        answer: Callable[[GenerationRequest], Sequence[int]] = echo,
        context_length: int = 8192,
    ) -> None:
        self.config = config or EngineConfig(type="fake")
        self.capabilities = frozenset({"abort", "adapters", "deadlines", "seed"})
        self.context_length = min(context_length, self.config.max_context or context_length)
        self.adapters: dict[str, Path] = {}
        self._leaving: set[str] = set()
        self._answer = answer
        self._state: EngineState = "new"
        self._error: str | None = None
        self._waiting: list[GenerationRequest] = []
        self._running: dict[str, GenerationRequest] = {}
        self._aborted: set[str] = set()
        self._counts = {"prompt": 0, "generated": 0, "finished": 0, "aborted": 0}

    async def start(self) -> None:
        if self._state == "new":
            self._state = "running"

    def fail(self, reason: str = "told to fail") -> None:
        """The failure switch: every stream ends with EngineStopped, as if the step loop had died."""
        self._state, self._error = "failed", reason

    async def stop(self, drain_s: float = 0.0) -> None:
        self._state = "draining"
        deadline = asyncio.get_running_loop().time() + drain_s
        while (self._running or self._waiting) and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(POLL_S)
        self._state = "stopped"

    async def abort(self, request_id: str) -> None:
        if request_id in self._running or any(r.id == request_id for r in self._waiting):
            self._aborted.add(request_id)

    async def load_adapter(self, name: str, path: Path) -> None:
        self.adapters[name] = path
        self._leaving.discard(name)

    async def unload_adapter(self, name: str) -> None:
        if name not in self.adapters.keys() - self._leaving:
            raise self._unknown(name)
        self._leaving.add(name)
        while name in self._leaving and any(r.adapter == name for r in (*self._running.values(), *self._waiting)):
            await asyncio.sleep(POLL_S)
        if name in self._leaving:
            self._leaving.remove(name)
            del self.adapters[name]

    def stats(self) -> EngineStats:
        return EngineStats(
            state=self._state,
            num_slots=self.config.num_slots,
            num_free_slots=self.config.num_slots - len(self._running),
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            max_waiting=self.config.max_waiting,
            num_prompt_tokens=self._counts["prompt"],
            num_generated_tokens=self._counts["generated"],
            num_finished=self._counts["finished"],
            num_aborted=self._counts["aborted"],
            error=self._error,
        )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        self._admit(request)
        finish: FinishReason | None = None
        deadline = deadline_of(request)
        try:
            await self._slot(request, deadline)
            answer, limit = self._planned(request)
            for token in answer[:limit]:
                await asyncio.sleep(self.config.fake.token_delay_s)
                self._check_alive()
                _check_time(request, deadline)
                if request.id in self._aborted:
                    break
                self._counts["generated"] += 1
                yield TokenChunk(request_id=request.id, token_ids=(token,), finish_reason=None, num_prompt_tokens=len(request.prompt_ids))
            else:
                finish = "stop" if len(answer) <= limit else "length"
            finish = finish or "abort"
        finally:
            self._release(request, finish)
        yield TokenChunk(request_id=request.id, token_ids=(), finish_reason=finish, num_prompt_tokens=len(request.prompt_ids))

    def _planned(self, request: GenerationRequest) -> tuple[Sequence[int], int]:
        answer = self._answer(request)[: self.config.fake.max_answer_tokens]
        self._counts["prompt"] += len(request.prompt_ids)
        return answer, clipped_max_tokens(request, context_length=self.context_length)

    def _admit(self, request: GenerationRequest) -> None:
        if self._state != "running":
            raise self._death()
        check_prompt(request, context_length=self.context_length)
        if request.adapter is not None and request.adapter not in self.adapters.keys() - self._leaving:
            raise self._unknown(request.adapter)
        if request.id in self._running or any(r.id == request.id for r in self._waiting):
            raise InvalidRequest(f"Request id {request.id} is running already. Give each request its own id.")
        num_free = self.config.num_slots - len(self._running) - len(self._waiting)
        if num_free <= 0 and len(self._waiting) >= self.config.max_waiting:
            raise QueueFull(f"{len(self._waiting)} requests wait already, the limit is {self.config.max_waiting}. Retry later.")
        self._waiting.append(request)
        self._waiting.sort(key=lambda r: r.priority)

    async def _slot(self, request: GenerationRequest, deadline: float) -> None:
        while self._waiting[0] is not request or len(self._running) >= self.config.num_slots:
            self._check_alive()
            _check_time(request, deadline)
            if request.id in self._aborted:
                return
            await asyncio.sleep(POLL_S)
        self._waiting.remove(request)
        self._running[request.id] = request

    def _release(self, request: GenerationRequest, finish: FinishReason | None) -> None:
        self._running.pop(request.id, None)
        self._aborted.discard(request.id)
        if request in self._waiting:
            self._waiting.remove(request)
        self._counts["finished" if finish in ("stop", "length") else "aborted"] += 1

    def _unknown(self, name: str) -> UnknownAdapter:
        loaded = sorted(self.adapters.keys() - self._leaving)
        return UnknownAdapter(f"No adapter {name!r} is loaded; loaded: {loaded}. Load it first.")

    def _check_alive(self) -> None:
        limit = self.config.fake.fail_after_tokens
        if limit is not None and self._counts["generated"] >= limit:
            self.fail(f"fake.fail_after_tokens={limit} reached")
        if self._state in ("failed", "stopped"):
            raise self._death()

    def _death(self) -> EngineStopped:
        return EngineStopped(f"The engine is {self._state}{f' ({self._error})' if self._error else ''}. Start another one.")


def _check_time(request: GenerationRequest, deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise over_time(request)
