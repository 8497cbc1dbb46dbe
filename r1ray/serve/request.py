"""OpenAI request bodies: what clients send, read leniently, as text requests. Unknown fields are ignored, `null` means absent.

What is known but cannot be done (tools, JSON schemas) is a 400 that says so, never a silently different answer.
Knows no passages and no streams.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

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
TEXT_PARTS = ("text", "input_text", "output_text")
UNSUPPORTED = "unsupported_parameter"
LIMITS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")
CODES = {"missing": "missing_required_parameter", **dict.fromkeys(LIMITS, "invalid_value")}
MOST_TOP_LOGPROBS = 20
MOST_COMPLETION_LOGPROBS = 5
MOST_TOP_K = 2**31 - 1
"""More than any vocabulary has; a larger number would not fit into an engine's tensors."""

LEAST_REPETITION_PENALTY = 0.01
"""It divides logits, and a smaller one would make them infinite, as those of damaged weights are."""

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
BRANCH = re.compile(r"str|int|float|bool|list\[.*\]")
"""What pydantic puts into the place of an error for the branch of a union that it tried."""


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
    repetition_penalty: float | None = Field(default=None, ge=LEAST_REPETITION_PENALTY)
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: int | None = Field(default=None, ge=1)
    best_of: int | None = None
    logit_bias: dict[int, float] | None = None
    min_tokens: int | None = Field(default=None, ge=0)
    ignore_eos: bool | None = None
    num_beams: int | None = Field(default=None, ge=1)
    timeout: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    priority: int | None = Field(default=None, ge=-(2**31), lt=2**31)
    cache_salt: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    task: str | None = None
    metadata: dict[str, Any] | None = None
    prompt_logprobs: int | None = None

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
        if self.top_k is not None:
            fields["top_k"] = min(max(self.top_k, 0), MOST_TOP_K)  # vLLM's clients send -1 for "all"
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
    tool_calls: list[Any] | None = None

    @field_validator("role")
    @classmethod
    def _known(cls, role: str) -> str:
        if role not in ROLES:
            raise ValueError(f"unknown role {role[:50]!r}; use one of {', '.join(ROLES)}")
        return role

    def to_message(self) -> Message:
        """Text parts joined; any other part is refused, since the model would answer without having seen it."""
        if self.tool_calls:
            raise bad_request("This server cannot show a model the tool_calls of a message; leave them out.", "messages", UNSUPPORTED)
        content = self.content or ""
        if isinstance(content, list):
            other = next((part.type for part in content if part.type not in TEXT_PARTS or part.text is None), None)
            if other is not None:
                raise bad_request(f"This model reads text only; a message has a part of type {other[:50]!r}.", param="messages")
            content = "".join(part.text or "" for part in content)
        return Message(role=ROLES[self.role], content=content, reasoning=self.reasoning_content or self.reasoning)


class ChatBody(_GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatTurn], Field(fail_fast=True)] = Field(min_length=1)
    max_completion_tokens: int | None = None
    retrieval: bool | None = None
    include_reasoning: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    echo: bool | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    modalities: list[str] | None = None
    response_format: dict[str, Any] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are wanted in each place; None where no log-probabilities are."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def overrides(self) -> dict[str, Any]:
        if self.max_completion_tokens is not None:
            return self.model_copy(update={"max_tokens": self.max_completion_tokens, "max_completion_tokens": None}).overrides()
        return super().overrides()

    def check_supported(self) -> None:
        """Raises Refused for what this server knows but cannot do."""
        _check_shared(self)
        for name in ("tools", "functions"):
            if getattr(self, name):
                raise _unsupported(name)
        if any(modality != "text" for modality in self.modalities or ()):
            raise _unsupported("modalities")
        if (self.response_format or {}).get("type", "text") != "text":
            raise _unsupported("response_format")
        if self.echo:
            text = "The prompt of a chat has text of the server's own and is not echoed; echo is for /v1/completions."
            raise bad_request(text, "echo", UNSUPPORTED)
        _check_logprobs("top_logprobs", self.top_logprobs, MOST_TOP_LOGPROBS)
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs is allowed with logprobs=true only; set that too.", "top_logprobs")

    def to_messages(self) -> tuple[Message, ...]:
        return tuple(turn.to_message() for turn in self.messages)


class CompletionBody(_GenerationBody):
    """POST /v1/completions. A prompt is text, token ids, or a list of either."""

    prompt: (
        str
        | Annotated[list[str], Field(fail_fast=True)]
        | Annotated[list[TokenId], Field(fail_fast=True)]
        | Annotated[list[Annotated[list[TokenId], Field(fail_fast=True)]], Field(fail_fast=True)]
    )
    echo: bool | None = None
    logprobs: bool | int | None = None
    suffix: str | None = None

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are wanted in each place; None where no log-probabilities are."""
        return None if self.logprobs is False else self.logprobs

    @property
    def prompt_only(self) -> bool:
        """OpenAI's way of scoring a text: its echo, and no token more."""
        return bool(self.echo) and self.max_tokens == 0

    def overrides(self) -> dict[str, Any]:
        if self.prompt_only:
            return self.model_copy(update={"max_tokens": 1}).overrides()  # an engine computes no prompt without an answer
        return super().overrides()

    def check_supported(self) -> None:
        """Raises Refused for what this server knows but cannot do."""
        _check_shared(self)
        if self.suffix:
            raise _unsupported("suffix")
        if self.logprobs is True:
            raise bad_request(f"logprobs is a number here; give 0 to {MOST_COMPLETION_LOGPROBS}.", "logprobs", "invalid_type")
        _check_logprobs("logprobs", self.num_logprobs, MOST_COMPLETION_LOGPROBS)
        if self.echo and self.num_logprobs is not None and (self.num_beams or 1) > 1:
            raise bad_request("A beam search computes no logprobs of the prompt; leave out echo, logprobs or num_beams.", "echo")

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


def _check_shared(body: _GenerationBody) -> None:
    """`best_of`: as many as are returned is no choice, so that much is fine."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise _unsupported("best_of")
    if body.prompt_logprobs is not None:
        text = "prompt_logprobs is not supported by this server; use echo with logprobs at /v1/completions."
        raise bad_request(text, "prompt_logprobs", UNSUPPORTED)


def _check_logprobs(name: str, num: int | None, most: int) -> None:
    if num is not None and not 0 <= num <= most:
        raise bad_request(f"{name} is {num}; give 0 to {most}.", name)


class TokenizeBody(BaseModel):
    """POST /tokenize: a text, or messages under the chat template."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatTurn], Field(fail_fast=True)] | None = Field(default=None, min_length=1)


class DetokenizeBody(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


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
    problem = _clearest(error.errors(include_url=False, include_context=False, include_input=False))
    if problem["type"] == "json_invalid":
        return bad_request(f"The body is no JSON object: {problem['msg']}.", code="invalid_json")
    param = ".".join(str(part) for part in problem["loc"] if not _is_branch(part)) or None
    return bad_request(f"{param or 'body'}: {problem['msg']}.", param=param, code=CODES.get(problem["type"], "invalid_type"))


def _clearest(problems: list[Any]) -> Any:
    """The first; where a union was tried, that of the branch which went furthest into what was sent and found the right type."""
    place = problems[0]["loc"]
    at = next((at for at, part in enumerate(place) if _is_branch(part)), len(place))
    return max((each for each in problems if each["loc"][:at] == place[:at]), key=lambda each: (len(each["loc"]), each["type"] in LIMITS))


def _is_branch(part: str | int) -> bool:
    return isinstance(part, str) and BRANCH.fullmatch(part) is not None


def _unsupported(name: str) -> Exception:
    return bad_request(f"{name} is not supported by this server; leave it out.", name, UNSUPPORTED)
