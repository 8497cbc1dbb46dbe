"""A Live request to what goes over the wire: server-sent events, or one body.

The invariant of a stream: it ends with a finish_reason for every choice, or with one error object, and then with [DONE].
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

from r1ray.serve.chat import Live
from r1ray.serve.faults import fault_of
from r1ray.serve.grounding import Grounding
from r1ray.serve.protocol import Delta, Done, Fault, Refused
from r1ray.serve.wire import Choice, Wire, error_body, usage_body

__all__ = ["DONE", "Answer", "event"]

DONE = b"data: [DONE]\n\n"


def event(body: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class Answer:
    """Writes one Live request, once, in either form."""

    def __init__(self, live: Live, wire: Wire, *, grounding: Grounding | None = None, include_usage: bool = False) -> None:
        self.live = live
        self._wire = wire
        self._grounding = grounding
        self._include_usage = include_usage
        self._choices = [Choice() for _ in range(live.num_choices)]

    async def body(self) -> dict[str, Any]:
        """The whole answer.

        Raises:
            Refused: the generation failed on the way.
        """
        async for index, item in self.live.events:
            self._note(index, item)
            if isinstance(item, Fault):
                raise Refused(item)
        return self._wire.body(self._choices, self._usage()) | self._sources(self._choices[0])

    async def sse(self) -> AsyncGenerator[bytes, None]:
        """The stream. Errors become its last event but one; only the client's leaving goes through."""
        try:
            async for written in self._chunks():
                yield written
        except Exception as error:  # a stream that just stops tells its reader nothing
            yield event(error_body(fault_of(error)))
        yield DONE

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        for index in range(self.live.num_choices):
            opening = self._wire.opening(index)
            if opening is not None:
                yield event(self._shown(opening))
        async for index, item in self.live.events:
            self._note(index, item)
            if isinstance(item, Fault):
                yield event(error_body(item))
                return
            if isinstance(item, Delta):
                text = b"".join(event(self._shown(chunk)) for chunk in self._wire.deltas(index, item))
                if text:
                    yield text
            else:
                yield event(self._shown(self._wire.closing(index, item) | self._sources(self._choices[index])))
        if self._include_usage:
            yield event(self._wire.usage_chunk(self._usage()))

    def _note(self, index: int, item: Delta | Done | Fault) -> None:
        if isinstance(item, Delta):
            self._choices[index].add(item)
        elif isinstance(item, Done):
            self._choices[index].done = item

    def _shown(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """OpenAI: with usage asked for, every chunk but the last has a null usage."""
        return chunk | {"usage": None} if self._include_usage else chunk

    def _usage(self) -> dict[str, Any]:
        return usage_body([choice.done for choice in self._choices if choice.done], self.live.choices_per_prompt)

    def _sources(self, choice: Choice) -> dict[str, Any]:
        """`retrieved` ids and `citations` of a grounded answer."""
        if self._grounding is None or not self.live.passages:
            return {}
        return {
            "retrieved": [passage.id for passage in self.live.passages],
            "citations": self._grounding.citations(choice.content, self.live.passages),
        }
