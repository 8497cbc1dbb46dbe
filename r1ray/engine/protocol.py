"""The seam between token ids and everything above: what any engine takes, yields and raises.

    async with contextlib.aclosing(engine.generate(request)) as chunks:
        async for chunk in chunks: ...

An engine knows no text, no chat template and no HTTP; the server and the evaluator know no model. Who implements it is `create.py`'s
business (the in-house engine, a fake; later stages of a pipeline, ONNX, vLLM).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from r1ray.types import Sampling

__all__ = ["Engine", "EngineState", "EngineStats", "FinishReason", "GenerationRequest", "Mask", "TokenChunk", "TokenLogprobs"]

FinishReason = Literal["stop", "length", "abort"]
EngineState = Literal["new", "running", "draining", "stopped", "failed"]
Mask = Callable[[Sequence[int]], Sequence[int] | None]
"""A grammar: tokens drawn so far -> ids that may come next, None when all may. Runs in the engine's thread: it must be quick."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One generation. `sampling.stop` (texts) is not the engine's: it sees token ids only, so the caller watches for them and aborts.

    `stop_token_ids` end the answer in addition to the model's own end-of-text ids; `ignore_eos` disregards both. `min_tokens` keeps
    both from being drawn before that many tokens. `keep_stop` gives the stop token that was drawn as the answer's last, for those who
    train on it (capability `keep_stop`). A lower `priority` starts sooner; equal ones start in order of arrival.
    `logit_bias` is added to the logits of its token ids. `num_logprobs` asks for those of each token and of so many likeliest ones.
    `prompt_logprobs` asks for that of each prompt token but the first, and of the `num_prompt_logprobs` likeliest in its place; such a
    prompt is computed whole, cached or not.
    Only requests with the same `cache_salt` (a tenant's, say) share computed prefixes.
    `num_beams` above 1 searches for the likeliest answer instead of drawing one (capability `beam_search`): it comes as one chunk at the
    end, and the sum of its log-probabilities, divided by its length to the power of `length_penalty`, is the highest that was found.
    `timeout_s`: seconds from now, in the queue included, after which it ends with DeadlineExceeded, wherever it is.
    """

    id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    stop_token_ids: tuple[int, ...] = ()
    adapter: str | None = None
    priority: int = 0
    ignore_eos: bool = False
    min_tokens: int = 0
    keep_stop: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_logprobs: int | None = None
    prompt_logprobs: bool = False
    num_prompt_logprobs: int = 0
    cache_salt: str = ""
    mask: Mask | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Natural logarithms of probabilities after penalties and bias, before temperature and filters (OpenAI's meaning).

    `top` are the likeliest tokens, most likely first, as many as `num_logprobs` asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenChunk:
    """Tokens drawn since the last chunk. The last chunk of a stream, and no other, has a finish_reason; its token_ids may be empty.

    `prompt_logprobs` come with the first tokens: entry i is that of prompt token i + 1 after those before it,
    `prompt_top` (empty unless asked for) the likeliest in its place, as in TokenLogprobs.
    The token that ended an answer (`stop`) is not among the ids, so that they decode to the answer and nothing else; see `keep_stop`.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[float, ...] = ()
    prompt_top: tuple[tuple[tuple[int, float], ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot: gauges first, then counters since the start. `error` says why when `state` is failed."""

    state: EngineState
    num_slots: int
    num_free_slots: int
    num_running: int
    num_waiting: int
    max_waiting: int
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_finished: int = 0
    num_aborted: int = 0
    num_failed: int = 0
    num_preempted: int = 0
    num_steps: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    error: str | None = None


@runtime_checkable
class Engine(Protocol):
    """Every method may be called from any event loop of the process; a stream belongs to the loop that iterates over it."""

    capabilities: frozenset[str]
    context_length: int

    async def start(self) -> None:
        """Make it ready to generate; a second call does nothing."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk, None]:
        """Stream one answer. Closing the generator or cancelling its task aborts the request and frees its slot within one step.

        Raises at the first `__anext__`:
            InvalidRequest: an empty prompt, an id outside the vocabulary (stop ids too), or a request id that is already running.
            PromptTooLong: the prompt leaves no room for one token of the context. (A too large max_tokens is clipped to the context.)
            QueueFull: `max_waiting` requests wait already.
            UnknownAdapter: no adapter of that name was loaded.
        Raises at any time:
            GenerationFailed: the model gave no usable logits for this request; the others run on.
            DeadlineExceeded: its `timeout_s` is over; tokens drawn until then were yielded.
            EngineStopped: the engine died or was stopped.
        """

    async def abort(self, request_id: str) -> None:
        """End a request with finish_reason `abort`; an unknown id is ignored, since it may just have finished."""

    def stats(self) -> EngineStats: ...

    async def load_adapter(self, name: str, path: Path) -> None:
        """Make the adapter directory at `path` usable as `request.adapter = name`, while streams run. Replaces one of that name.

        Raises:
            AdapterMismatch: no adapter lies there, or the model cannot take it; one of that name stays as it was.
        """

    async def unload_adapter(self, name: str) -> None:
        """Refuse new requests for the adapter at once, let running ones end, then give its memory back; returns when that is done.

        It goes on when the caller is cancelled. Loading one of that name meanwhile makes the name usable again.

        Raises:
            UnknownAdapter: no adapter of that name is loaded, or it was unloaded before.
        """

    async def stop(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, give running ones `drain_s` seconds, then end the rest with EngineStopped."""
