"""OpenAI request bodies: what clients send, read leniently, as text requests. Unknown fields are ignored, `null` means absent.

What is known but cannot be done (tools, logprobs, JSON schemas) is a 400 that says so, never a silently different answer.
Knows no passages and no streams.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from r1ray.serve.faults import bad_request
from r1ray.serve.policy import validate
from r1ray.types import Message, Role

__all__ = ["ChatBody", "CompletionBody", "DetokenizeBody", "TokenizeBody", "parse"]

SAMPLING_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "max_tokens",
    "stop",
    "seed",
)
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


class _Body(BaseModel):
    """Lenient: `extra` keys go by, since clients of many servers send them."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    include_usage: bool | None = None


class _GenerationBody(_Body):
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    n: int | None = Field(default=None, ge=1)
    best_of: int | None = None
    logit_bias: dict[int, float] | None = None
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool | None = None
    num_beams: int | None = Field(default=None, ge=1)
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    priority: int | None = None
    cache_salt: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    task: str | None = None
    metadata: dict[str, Any] | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def bias(self) -> tuple[tuple[int, float], ...]:
        """OpenAI's logit_bias: token id -> what is added to its logit.

        Raises:
            Refused: a value is outside -100 to 100.
        """
        found = tuple((self.logit_bias or {}).items())
        if wrong := next((value for _, value in found if not -100 <= value <= 100), None):
            raise bad_request(f"logit_bias has the value {wrong}; give -100 to 100.", param="logit_bias")
        return found

    @property
    def task_name(self) -> str | None:
        """The request's own `task`, else the one in its metadata."""
        named = self.task or (self.metadata or {}).get("task")
        return str(named) if named else None

    def overrides(self) -> dict[str, Any]:
        """The sampling fields that the request set, in our terms; checked against their limits.

        Raises:
            Refused: one is outside its limits.
        """
        fields = {name: value for name in SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        if isinstance(self.stop, str):
            fields["stop"] = [self.stop]
        if self.top_k is not None and self.top_k < 0:
            fields["top_k"] = 0  # vLLM's clients send -1 for "all"
        validate(fields)
        return fields


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    type: str
    text: str | None = None


class ChatTurn(BaseModel):
    """One message of a chat body."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    role: str
    content: str | list[_Part] | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @field_validator("role")
    @classmethod
    def _known(cls, role: str) -> str:
        if role not in ROLES:
            raise ValueError(f"unknown role {role!r}; use one of {', '.join(ROLES)}")
        return role

    def to_message(self) -> Message:
        """Text parts joined; any other part is refused, since the model would answer without having seen it."""
        content = self.content or ""
        if isinstance(content, list):
            other = next((part.type for part in content if part.text is None), None)
            if other is not None:
                raise bad_request(f"This model reads text only; a message has a part of type {other!r}.", param="messages")
            content = "".join(part.text or "" for part in content)
        return Message(role=ROLES[self.role], content=content, reasoning=self.reasoning_content or self.reasoning)


class ChatBody(_GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[ChatTurn] = Field(min_length=1)
    max_completion_tokens: int | None = None
    retrieval: bool | None = None
    include_reasoning: bool | None = None
    logprobs: bool | None = None
    tools: list[Any] | None = None
    response_format: dict[str, Any] | None = None

    def overrides(self) -> dict[str, Any]:
        if self.max_completion_tokens is not None:
            return self.model_copy(update={"max_tokens": self.max_completion_tokens, "max_completion_tokens": None}).overrides()
        return super().overrides()

    def check_supported(self) -> None:
        """Raises Refused for what this server knows but cannot do."""
        _check_best_of(self)
        if self.tools:
            raise _unsupported("tools")
        if self.logprobs:
            raise _unsupported("logprobs")
        if (self.response_format or {}).get("type", "text") != "text":
            raise _unsupported("response_format")

    def to_messages(self) -> tuple[Message, ...]:
        return tuple(turn.to_message() for turn in self.messages)


class CompletionBody(_GenerationBody):
    """POST /v1/completions. A prompt is text, token ids, or a list of either."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None

    def check_supported(self) -> None:
        """Raises Refused for what this server knows but cannot do."""
        _check_best_of(self)
        for name in ("echo", "logprobs", "suffix"):
            if getattr(self, name):
                raise _unsupported(name)

    def prompts(self) -> list[str | tuple[int, ...]]:
        """Each prompt by itself."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt:
            raise bad_request("prompt is empty; send text or token ids.", param="prompt")
        ids = [item for item in self.prompt if isinstance(item, int)]
        if ids:
            return [tuple(ids)]
        return [item if isinstance(item, str) else tuple(item) for item in self.prompt if not isinstance(item, int)]


def _check_best_of(body: _GenerationBody) -> None:
    """As many as are returned is no choice, so that much is fine."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise _unsupported("best_of")


class TokenizeBody(BaseModel):
    """POST /tokenize: a text, or messages under the chat template."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatTurn] | None = None


class DetokenizeBody(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str | None = None
    tokens: list[int]


B = TypeVar("B", bound=BaseModel)


def parse(schema: type[B], raw: bytes) -> B:
    """The body of a request.

    Raises:
        Refused: a 400 naming the first wrong field; never a 422, which OpenAI's clients do not know.
    """
    try:
        return schema.model_validate_json(raw)
    except ValidationError as error:
        raise _wrong_field(error) from error


def _wrong_field(error: ValidationError) -> Exception:
    problem = error.errors(include_url=False, include_context=False)[0]
    kind: Literal["missing_required_parameter", "invalid_json", "invalid_type"] = "invalid_type"
    if problem["type"] == "json_invalid":
        return bad_request(f"The body is no JSON object: {problem['msg']}.", code="invalid_json")
    if problem["type"] == "missing":
        kind = "missing_required_parameter"
    param = ".".join(str(part) for part in problem["loc"]) or None
    return bad_request(f"{param or 'body'}: {problem['msg']}.", param=param, code=kind)


def _unsupported(name: str) -> Exception:
    return bad_request(f"{name} is not supported by this server; leave it out.", param=name, code="unsupported_parameter")
