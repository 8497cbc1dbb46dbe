"""What each generation cost, counted at the one place that every route passes: `Meter.watch` around its stream.

Counts streams that are cut short too, since their tokens were computed. Knows neither HTTP nor the client's options: whether a
client asked for usage changes what it is shown, never what is counted.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol

from r1ray.serve.batches import close
from r1ray.serve.protocol import Delta, Done, Event, Fault

__all__ = ["GenerationRecord", "LogSink", "Meter", "RaySink", "Sink"]

ABORTED = "aborted"
SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300]
TOKENS = [1, 8, 32, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRecord:
    """One finished generation. `outcome` is a finish reason, a fault's code, or `aborted` when the client left."""

    request_id: str
    model: str
    ref: str
    outcome: str
    num_prompt_tokens: int
    num_completion_tokens: int
    num_reasoning_tokens: int
    num_cached_tokens: int
    ttft_s: float | None
    seconds: float

    @property
    def tpot_s(self) -> float | None:
        """Seconds per token after the first."""
        if self.ttft_s is None or self.num_completion_tokens < 2:
            return None
        return (self.seconds - self.ttft_s) / (self.num_completion_tokens - 1)


class Sink(Protocol):
    """Where records go: the log, Ray's metrics, later the audit and the bill."""

    def record(self, generation: GenerationRecord) -> None: ...


class Meter:
    """Hands one record per generation to every sink."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    async def watch(self, source: AsyncIterator[Event], *, request_id: str, model: str) -> AsyncGenerator[Event, None]:
        """The same events; closes `source` and reports when the stream ends, is closed or fails."""
        started = time.perf_counter()
        ttft_s: float | None = None
        num_prompt = num_tokens = 0
        end: Done | Fault | None = None
        try:
            async for event in source:
                if isinstance(event, Delta):
                    ttft_s = time.perf_counter() - started if ttft_s is None else ttft_s
                    num_prompt, num_tokens = event.num_prompt_tokens or num_prompt, num_tokens + event.num_tokens
                else:
                    end = event
                yield event
        finally:
            await close(source)
            done = end if isinstance(end, Done) else None
            self._report(
                GenerationRecord(
                    request_id=request_id,
                    model=model,
                    ref=done.ref if done else "",
                    outcome=end.finish_reason if isinstance(end, Done) else end.code if end else ABORTED,
                    num_prompt_tokens=done.num_prompt_tokens if done else num_prompt,
                    num_completion_tokens=done.num_completion_tokens if done else num_tokens,
                    num_reasoning_tokens=done.num_reasoning_tokens if done else 0,
                    num_cached_tokens=done.num_cached_tokens if done else 0,
                    ttft_s=ttft_s,
                    seconds=time.perf_counter() - started,
                )
            )

    def _report(self, record: GenerationRecord) -> None:
        for sink in self._sinks:
            sink.record(record)


class LogSink:
    """One JSON line per generation in Serve's log of the router."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def record(self, generation: GenerationRecord) -> None:
        self._logger.info("generation %s", json.dumps(asdict(generation), ensure_ascii=False))


class RaySink:
    """Counters and histograms in Ray's metrics (`ray_r1ray_*` at every node's export port), labelled by model."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Histogram

        self._requests = Counter("r1ray_requests_total", "Generations by outcome.", ("model", "outcome"))
        self._aborted = Counter("r1ray_requests_aborted_total", "Generations whose client left.", ("model",))
        self._tokens = Counter("r1ray_tokens_total", "Tokens by kind: prompt, cached, completion, reasoning.", ("model", "kind"))
        self._ttft = Histogram("r1ray_time_to_first_token_seconds", "From the router's call to the first token.", SECONDS, ("model",))
        self._tpot = Histogram("r1ray_time_per_output_token_seconds", "Per token after the first.", SECONDS, ("model",))
        self._length = Histogram("r1ray_completion_tokens", "Tokens of an answer.", TOKENS, ("model",))

    def record(self, generation: GenerationRecord) -> None:
        model = {"model": generation.model}
        self._requests.inc(1, model | {"outcome": generation.outcome})
        if generation.outcome == ABORTED:
            self._aborted.inc(1, model)
        for kind in ("prompt", "cached", "completion", "reasoning"):
            count = getattr(generation, f"num_{kind}_tokens")
            if count:
                self._tokens.inc(count, model | {"kind": kind})
        if generation.ttft_s is not None:
            self._ttft.observe(generation.ttft_s, model)
            self._length.observe(generation.num_completion_tokens, model)
        if generation.tpot_s is not None:
            self._tpot.observe(generation.tpot_s, model)
