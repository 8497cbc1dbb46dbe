"""OpenAI response bodies and chunks, built from events. Dicts, since they are JSON next; the fields are those of the wire.

Reasoning goes out under both names in use, `reasoning_content` (DeepSeek, SGLang, LiteLLM) and `reasoning` (vLLM). Usage carries
OpenAI's details and DeepSeek's cache fields.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from r1ray.serve.chat import Card
from r1ray.serve.logprobs import chat_logprobs, completion_logprobs
from r1ray.serve.protocol import Delta, Done, Fault, TokenScore

__all__ = ["ChatWire", "Choice", "CompletionWire", "Wire", "error_body", "model_body", "usage_body"]


@dataclass(slots=True)
class Choice:
    """One answer as it grows."""

    reasoning: str = ""
    content: str = ""
    scores: list[TokenScore] = field(default_factory=list)
    num_reasoning_scores: int = 0
    done: Done | None = None

    def add(self, delta: Delta) -> None:
        self.reasoning += delta.reasoning
        self.content += delta.content
        if delta.scores:
            self.scores += delta.scores
            self.num_reasoning_scores += delta.num_reasoning_scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """What all bodies of one response share."""

    id: str
    model: str
    show_reasoning: bool = True
    with_logprobs: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def _head(self, kind: str, done: Done | None = None) -> dict[str, Any]:
        head: dict[str, Any] = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return head | ({"system_fingerprint": done.ref} if done else {})

    def _chunk(self, choice: dict[str, Any], done: Done | None = None) -> dict[str, Any]:
        raise NotImplementedError

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk before the first text of a choice."""
        raise NotImplementedError

    def deltas(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """Chunks for new text and scores, none when there are none."""
        raise NotImplementedError

    def closing(self, index: int, done: Done) -> dict[str, Any]:
        """The chunk with the finish reason."""
        raise NotImplementedError

    def body(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """The whole response of a request without stream."""
        raise NotImplementedError

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last chunk of a stream that asked for usage."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatWire(Wire):
    """chat.completion and chat.completion.chunk."""

    def _chunk(self, choice: dict[str, Any], done: Done | None = None) -> dict[str, Any]:
        return self._head("chat.completion.chunk", done) | {"choices": [choice]}

    def opening(self, index: int) -> dict[str, Any]:
        return self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None})

    def deltas(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        found: list[tuple[dict[str, Any], Sequence[TokenScore]]] = []
        num = delta.num_reasoning_scores
        scores = delta.scores if self.show_reasoning else delta.scores[num:]
        if delta.reasoning and self.show_reasoning:
            found.append(({"content": None, "reasoning_content": delta.reasoning, "reasoning": delta.reasoning}, scores[:num]))
            scores = scores[num:]
        if delta.content or scores:
            found.append(({"content": delta.content}, scores))
        return [
            self._chunk({"index": index, "delta": text, "logprobs": _logprobs(of_text), "finish_reason": None}) for text, of_text in found
        ]

    def closing(self, index: int, done: Done) -> dict[str, Any]:
        return self._chunk({"index": index, "delta": {}, "logprobs": None, "finish_reason": done.finish_reason}, done)

    def body(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        shown = [self._choice(index, choice) for index, choice in enumerate(choices)]
        return self._head("chat.completion", choices[0].done) | {"choices": shown, "usage": usage}

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self._head("chat.completion.chunk") | {"choices": [], "usage": usage}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.content, "refusal": None}
        if choice.reasoning and self.show_reasoning:
            message |= {"content": choice.content or None, "reasoning_content": choice.reasoning, "reasoning": choice.reasoning}
        reason = choice.done.finish_reason if choice.done else None
        scores = choice.scores if self.show_reasoning else choice.scores[choice.num_reasoning_scores :]
        logprobs = chat_logprobs(scores) if self.with_logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionWire(Wire):
    """text_completion, whose chunks look like its bodies."""

    def _chunk(self, choice: dict[str, Any], done: Done | None = None) -> dict[str, Any]:
        return self._head("text_completion", done) | {"choices": [choice]}

    def opening(self, index: int) -> None:  # noqa: ARG002 completions have no role to open with
        return None

    def deltas(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        if not delta.content and not delta.scores:
            return []
        return [self._chunk(_text_choice(index, delta.content, None, completion_logprobs(delta.scores) if delta.scores else None))]

    def closing(self, index: int, done: Done) -> dict[str, Any]:
        return self._chunk(_text_choice(index, "", done.finish_reason), done)

    def body(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        shown = [self._choice(index, choice) for index, choice in enumerate(choices)]
        return self._head("text_completion", choices[0].done) | {"choices": shown, "usage": usage}

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self._head("text_completion") | {"choices": [], "usage": usage}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        logprobs = completion_logprobs(choice.scores) if self.with_logprobs else None
        return _text_choice(index, choice.content, choice.done.finish_reason if choice.done else None, logprobs)


def _logprobs(scores: Sequence[TokenScore]) -> dict[str, Any] | None:
    return chat_logprobs(scores) if scores else None


def _text_choice(index: int, text: str, finish_reason: str | None, logprobs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def usage_body(ends: Sequence[Done], choices_per_prompt: int) -> dict[str, Any]:
    """Usage of one request: a prompt counts once however many choices it has, every completion counts."""
    prompts = ends[::choices_per_prompt]
    num_prompt, num_cached = sum(end.num_prompt_tokens for end in prompts), sum(end.num_cached_tokens for end in prompts)
    num_completion, num_reasoning = sum(end.num_completion_tokens for end in ends), sum(end.num_reasoning_tokens for end in ends)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        "prompt_tokens_details": {"cached_tokens": num_cached},
        "completion_tokens_details": {"reasoning_tokens": num_reasoning},
        "prompt_cache_hit_tokens": num_cached,
        "prompt_cache_miss_tokens": num_prompt - num_cached,
    }


def error_body(fault: Fault) -> dict[str, Any]:
    """OpenAI's error object, all four fields, code a string."""
    return {"error": {"message": fault.message, "type": fault.type, "param": fault.param, "code": fault.code}}


def model_body(card: Card) -> dict[str, Any]:
    """One entry of /v1/models."""
    return {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": "r1ray",
        "root": card.root,
        "parent": card.parent,
        "max_model_len": card.max_model_len,
        "permission": [],
    }
