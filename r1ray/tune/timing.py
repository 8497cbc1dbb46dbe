"""An engine that notes how long every answer took. Knows no sampling and no text."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

from r1ray.engine.protocol import Engine, EngineStats, GenerationRequest, TokenChunk

__all__ = ["TimedEngine"]


class TimedEngine:
    """Passes everything on to `engine`; `seconds` and `ttft_s` have one entry per finished answer."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.capabilities = engine.capabilities
        self.context_length = engine.context_length
        self.seconds: list[float] = []
        self.ttft_s: list[float] = []
        self.num_tokens = 0

    async def start(self) -> None:
        await self.engine.start()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        start = time.perf_counter()
        is_first = True
        async with aclosing(self.engine.generate(request)) as chunks:
            async for chunk in chunks:
                if is_first:
                    self.ttft_s.append(time.perf_counter() - start)
                    is_first = False
                self.num_tokens += len(chunk.token_ids)
                if chunk.finish_reason is not None:
                    self.seconds.append(time.perf_counter() - start)
                yield chunk

    async def abort(self, request_id: str) -> None:
        await self.engine.abort(request_id)

    def stats(self) -> EngineStats:
        return self.engine.stats()

    async def load_adapter(self, name: str, path: Path) -> None:
        await self.engine.load_adapter(name, path)

    async def stop(self, drain_s: float = 0.0) -> None:
        await self.engine.stop(drain_s)
