"""A streaming chat over any OpenAI-compatible endpoint, with nothing but the standard library.

`Chat` speaks HTTP and keeps the history; `converse` is the terminal. Knows neither the registry nor the cluster.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from typing import Any, Literal, Self

from rich.console import Console

from r1ray.errors import ServerUnreachable

__all__ = ["Chat", "Piece", "Source", "converse"]

_CONNECT_TIMEOUT_S = 10.0
_ANSWER_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Source:
    """A passage that the answer cites by `[citation:index]`."""

    index: int
    id: str
    title: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer as it arrives. `finish` carries the reason, `sources` the citations, `usage` the token counts."""

    kind: Literal["reasoning", "content", "sources", "finish", "usage"]
    text: str = ""
    sources: tuple[Source, ...] = ()


@dataclass(slots=True)
class Chat:
    """One conversation with one model."""

    url: str
    model: str
    system: str | None = None
    max_tokens: int | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    @classmethod
    def connect(cls, url: str, *, model: str | None = None, system: str | None = None, max_tokens: int | None = None) -> Self:
        """Ask the server what it serves.

        Raises:
            ServerUnreachable: nobody answers, or the server has no such model.
        """
        url = url.rstrip("/")
        with _opened(f"{url}/models", None) as response:
            served = [str(entry["id"]) for entry in json.load(response).get("data", [])]
        if not served:
            raise ServerUnreachable(f"{url} serves no model. See its deployments in the Ray dashboard.")
        if model is not None and model not in served:
            raise ServerUnreachable(f"{url} does not serve {model!r}; it has {', '.join(served)}. Pass one of them with --model.")
        return cls(url, model or served[0], system, max_tokens)

    def ask(self, question: str) -> Iterator[Piece]:
        """Stream the answer; both turns are remembered once it is complete. Closing the iterator stops the generation.

        Raises:
            ServerUnreachable: the server refuses, breaks off or sends an error object.
        """
        turn = {"role": "user", "content": question}
        opening = [{"role": "system", "content": self.system}] if self.system else []
        body: dict[str, Any] = {"model": self.model, "messages": [*opening, *self.messages, turn], "stream": True}
        body["stream_options"] = {"include_usage": True}
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        answer = ""
        with _opened(f"{self.url}/chat/completions", body) as response:
            for chunk in _chunks(response):
                for piece in _pieces(chunk):
                    answer += piece.text if piece.kind == "content" else ""
                    yield piece
        self.messages += [turn, {"role": "assistant", "content": answer}]


def converse(chat: Chat, console: Console, *, once: str | None = None) -> None:
    """Questions from the terminal until /quit or its end; `once` is asked alone. Ctrl-C stops an answer, not the chat."""
    if once is not None:
        _show(chat, once, console)
        return
    console.print(f"{chat.model} at {chat.url}. /new forgets, /quit ends.", style="dim", soft_wrap=True)
    while True:
        try:
            question = console.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if question == "/quit":
            return
        if question == "/new":
            chat.messages.clear()
        elif question:
            _answer(chat, question, console)


def _answer(chat: Chat, question: str, console: Console) -> None:
    """In a conversation a failed answer is a line, not the end."""
    try:
        _show(chat, question, console)
    except KeyboardInterrupt:
        console.print("\n(stopped)", style="dim")
    except ServerUnreachable as error:
        console.print(f"\nServerUnreachable: {error}", style="red", markup=False)


def _show(chat: Chat, question: str, console: Console) -> None:
    sources: tuple[Source, ...] = ()
    finish = usage = last = ""
    for piece in chat.ask(question):
        if piece.kind in ("reasoning", "content"):
            if last == "reasoning" and piece.kind == "content":
                console.print("\n")
            last = piece.kind
            style = "dim" if piece.kind == "reasoning" else ""
            console.print(piece.text, end="", style=style, markup=False, highlight=False, soft_wrap=True)
        sources = piece.sources or sources
        finish = piece.text if piece.kind == "finish" else finish
        usage = piece.text if piece.kind == "usage" else usage
    console.print()
    for source in sources:
        console.print(f"[{source.index}] {source.title} ({source.id})", style="cyan", markup=False, soft_wrap=True)
    note = ", ".join(part for part in (usage, "cut at the token limit" if finish == "length" else "") if part)
    console.print(note, style="dim", markup=False)


@contextmanager
def _opened(url: str, body: dict[str, Any] | None) -> Iterator[HTTPResponse]:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=_CONNECT_TIMEOUT_S if body is None else _ANSWER_TIMEOUT_S) as response:
            yield response
    except urllib.error.HTTPError as error:
        raise ServerUnreachable(f"{url} answers {error.code}: {_reason(error)}. Check --url, --model and OPENAI_API_KEY.") from error
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise ServerUnreachable(f"No answer from {url}: {reason}. Is it running? Start it with: serve run serve_config.yaml") from error


def _reason(error: urllib.error.HTTPError) -> str:
    text = error.read().decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:200] or str(error.reason)


def _chunks(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    """Server-sent events up to [DONE]; a stream that ends without it was cut."""
    for line in response:
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        chunk = json.loads(data)
        if "error" in chunk:
            raise ServerUnreachable(f"The server stopped the answer: {chunk['error'].get('message', chunk['error'])}. Ask again.")
        yield chunk
    raise ServerUnreachable("The stream ended before the answer did. The replica may have died: ask again.")


def _pieces(chunk: dict[str, Any]) -> Iterator[Piece]:
    if usage := chunk.get("usage"):
        yield Piece("usage", f"{usage.get('prompt_tokens', 0)} + {usage.get('completion_tokens', 0)} tokens")
    for choice in chunk.get("choices") or []:
        delta = choice.get("delta") or {}
        # DeepSeek and SGLang say reasoning_content, vLLM reasoning; a server that sends both means the same text
        if reasoning := delta.get("reasoning_content") or delta.get("reasoning"):
            yield Piece("reasoning", reasoning)
        if content := delta.get("content"):
            yield Piece("content", content)
        if finish := choice.get("finish_reason"):
            yield Piece("finish", finish)
    if sources := _sources(chunk):
        yield Piece("sources", sources=sources)


def _sources(chunk: dict[str, Any]) -> tuple[Source, ...]:
    """r1ray's `citations`, or the `url_citation` annotations that other servers send."""
    found = [
        Source(
            int(entry.get("index", number)), str(entry.get("id", "")), " / ".join(filter(None, (entry.get("source"), entry.get("heading"))))
        )
        for number, entry in enumerate(chunk.get("citations") or [], 1)
        if isinstance(entry, dict)
    ]
    for choice in chunk.get("choices") or []:
        for annotation in (choice.get("delta") or {}).get("annotations") or []:
            cited = annotation.get("url_citation") or {}
            found.append(Source(len(found) + 1, str(cited.get("url", "")), str(cited.get("title", ""))))
    return tuple(found)
