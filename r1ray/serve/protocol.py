"""What the router and a model replica say to each other: text in, text events out. Plain and picklable.

A stream is `Delta* (Done | Fault)`, and its first event arrives with the first token, so that a refusal is a first event
and can still become a status code. Knows neither HTTP nor tokens; `Fault` carries the status that HTTP will show.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from r1ray.types import Message

__all__ = ["Backend", "BackendStats", "Delta", "Done", "Event", "Fault", "FinishReason", "Piece", "Refused", "TextRequest", "TokenScore"]

FinishReason = Literal["stop", "length"]
Piece = bytes | int
"""What a token spells: its bytes, which may be part of a character, or its id where the tokenizer has no text for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """One generation. Exactly one of `messages`, `prompt` and `prompt_ids` is given; only messages see the chat template.

    `adapter` is the model id of one that is served beside the model; None is the model itself.

    `overrides` holds the sampling fields that the request itself set; the replica puts them over its version's policy. `timeout_s` counts
    from when the replica has it. A lower `priority` starts sooner; only requests with the same `cache_salt` share computed prefixes.

    `num_logprobs` wants a TokenScore per token, with so many of the likeliest in its place. `echo` puts the prompt, scored alike, before
    the answer; `prompt_only` gives no answer. Both are for prompts: of messages the client may not see all that the model is shown.
    """

    id: str
    messages: tuple[Message, ...] = ()
    prompt: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    task: str | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    num_beams: int = 1
    timeout_s: float | None = None
    priority: int = 0
    cache_salt: str = ""
    adapter: str | None = None
    num_logprobs: int | None = None
    echo: bool = False
    prompt_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenScore:
    """How likely a token was, as the natural logarithm of its probability, and the likeliest in its place, most likely first.

    Nothing comes before the first token of a prompt, so that one has no `logprob`. `offset` is where its text begins in the content of
    a raw answer, in characters.
    """

    piece: Piece
    logprob: float | None
    top: tuple[tuple[Piece, float], ...] = ()
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """New text; both may be empty while a character or a stop text is still open. Reasoning comes before content.

    `scores` are those of the tokens whose text begins here; the first `num_reasoning_scores` belong to the reasoning. Tokens without a
    text of their own go with the next one that has some, or with the end. Empty unless they were asked for.
    """

    reasoning: str = ""
    content: str = ""
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    scores: tuple[TokenScore, ...] = ()
    num_reasoning_scores: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The end of a good stream. `ref` is the version that answered."""

    finish_reason: FinishReason
    num_prompt_tokens: int
    num_completion_tokens: int
    num_reasoning_tokens: int = 0
    num_cached_tokens: int = 0
    ref: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """The end of a bad one, in the terms of OpenAI's error object."""

    status: int
    code: str
    type: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None


Event = Delta | Done | Fault


class Refused(Exception):
    """A request that gets an error status. Internal to the router: across processes a Fault travels as data."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendStats:
    """One replica's load and the version it answers with; `pid` is for operators and tests."""

    ref: str
    pid: int
    num_running: int
    num_waiting: int
    num_slots: int
    num_free_slots: int


class Backend(Protocol):
    """A served model as the chat service sees it: a Serve handle in production, a ModelHost in tests."""

    def stream(self, request: TextRequest) -> AsyncIterator[Event]:
        """Closing the iterator aborts the generation."""
        ...

    async def tokenize(self, text: str | None, messages: tuple[Message, ...], adapter: str | None = None) -> tuple[int, ...]: ...

    async def detokenize(self, token_ids: tuple[int, ...]) -> str: ...

    async def stats(self) -> BackendStats: ...

    async def ready(self) -> bool:
        """Whether a request sent now would find a live replica, or one that may be woken."""
        ...
