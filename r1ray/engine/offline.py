"""Many requests through an engine at once, without a server: for evaluation and sampling sweeps.

Takes any Engine; knows no text. Keeps the engine's slots full without ever overrunning its queue.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from r1ray.engine.protocol import Engine, FinishReason, GenerationRequest

__all__ = ["Completion", "generate_all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished request. `ttft_s` and `seconds` count from when the engine had it, time in its queue included.

    `logprobs` has an entry per token where the request asked for them.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    ttft_s: float
    seconds: float
    prompt_logprobs: tuple[float, ...] = ()
    logprobs: tuple[float, ...] = ()


def generate_all(
    engine: Engine, requests: Sequence[GenerationRequest], on_done: Callable[[Completion], None] | None = None
) -> list[Completion]:
    """Run all to the end and return them in the order given. Starts the engine if need be and leaves it running.

    Not to be called from inside an event loop. The first request that fails cancels the others and raises its error.
    """
    return asyncio.run(_all(engine, requests, on_done))


async def _all(engine: Engine, requests: Sequence[GenerationRequest], on_done: Callable[[Completion], None] | None) -> list[Completion]:
    await engine.start()
    done: dict[str, Completion] = {}
    todo = sorted(requests, key=lambda r: -len(r.prompt_ids))  # long ones first: the last steps are then short ones

    async def work() -> None:
        while todo:
            completion = await _one(engine, todo.pop(0))
            done[completion.request_id] = completion
            if on_done is not None:
                on_done(completion)

    stats = engine.stats()
    num_workers = min(2 * stats.num_slots, stats.num_slots + stats.max_waiting)  # a successor waits when a slot falls free
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(num_workers, len(requests))):
                group.create_task(work())
    except* Exception as errors:
        raise errors.exceptions[0] from None
    return [done[r.id] for r in requests]


async def _one(engine: Engine, request: GenerationRequest) -> Completion:
    begin = time.perf_counter()
    ttft_s: float | None = None
    tokens: list[int] = []
    of_prompt: tuple[float, ...] = ()
    of_tokens: list[float] = []
    finish: FinishReason = "abort"
    async with aclosing(engine.generate(request)) as chunks:
        async for chunk in chunks:
            ttft_s = time.perf_counter() - begin if ttft_s is None else ttft_s
            tokens.extend(chunk.token_ids)
            of_tokens.extend(entry.logprob for entry in chunk.logprobs)
            finish = chunk.finish_reason or finish
            of_prompt = of_prompt or chunk.prompt_logprobs
    seconds = time.perf_counter() - begin
    return Completion(
        request_id=request.id,
        token_ids=tuple(tokens),
        finish_reason=finish,
        ttft_s=seconds if ttft_s is None else ttft_s,
        seconds=seconds,
        prompt_logprobs=of_prompt,
        logprobs=tuple(of_tokens),
    )
