"""The chat service: an understood request in, open streams of events out. Plain Python; api.py gives it HTTP, router.py Ray.

    ground -> one stream per choice, metered -> first event of each awaited -> Live

A Live exists only when every choice has started, so whoever holds one may send a 200.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from r1ray.serve.batches import merged
from r1ray.serve.config import AppArgs
from r1ray.serve.faults import bad_request, model_not_found, too_slow
from r1ray.serve.grounding import Grounding
from r1ray.serve.meter import Meter
from r1ray.serve.protocol import Backend, BackendStats, Event, Fault, Refused, TextRequest
from r1ray.serve.request import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from r1ray.types import Message, Passage

__all__ = ["Card", "ChatService", "Live", "Served"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What /v1/models says about a model. Fixed when the application is built: listing models must not wake one up."""

    id: str
    created: int
    root: str
    max_model_len: int
    parent: str | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """One model of the service. `adapter`: its name to the backend, where it is one beside another model."""

    card: Card
    backend: Backend
    collection: str | None = None
    adapter: str | None = None


@dataclass(slots=True)
class Live:
    """A request whose first tokens exist. Iterate over `events` and close it, on every path."""

    model: str
    events: AsyncGenerator[tuple[int, Event], None]
    num_choices: int
    choices_per_prompt: int
    passages: tuple[Passage, ...] = ()
    streams: Sequence[AsyncGenerator[Event, None]] = field(default_factory=tuple)

    async def aclose(self) -> None:
        """Aborts what still runs; harmless after the end."""
        await self.events.aclose()
        await _close_all(self.streams)


class ChatService:
    """Every route that generates goes through `_open`; there is no other way to a model."""

    def __init__(self, models: Mapping[str, Served], args: AppArgs, meter: Meter, grounding: Grounding | None = None) -> None:
        self.models = dict(models)
        self.args = args
        self.grounding = grounding
        self._meter = meter

    async def chat(self, body: ChatBody, request_id: str) -> Live:
        """
        Raises:
            Refused: unknown model, wrong field, prompt too long, queue full, no replica.
        """
        served = self._ready_for(body, 1)
        shared = self._shared_fields(served, body)
        messages, passages = await self._grounded(served, body)
        template = TextRequest(id="", messages=messages, **shared)
        return await self._open(served, _choices(template, body.n or 1), request_id, passages=passages, choices_per_prompt=body.n or 1)

    async def complete(self, body: CompletionBody, request_id: str) -> Live:
        """Choices are ordered prompt by prompt, as OpenAI does. Raises as `chat`."""
        prompts = body.prompts()
        served = self._ready_for(body, len(prompts))
        shared = self._shared_fields(served, body) | {"echo": bool(body.echo), "prompt_only": body.prompt_only}
        requests: list[TextRequest] = []
        for prompt in prompts:
            given: dict[str, Any] = {"prompt": prompt} if isinstance(prompt, str) else {"prompt_ids": prompt}
            requests += _choices(TextRequest(id="", **given, **shared), body.n or 1)
        return await self._open(served, requests, request_id, choices_per_prompt=body.n or 1)

    async def tokenize(self, body: TokenizeBody) -> tuple[tuple[int, ...], int]:
        """(token ids, context length)."""
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("Give either prompt or messages.", param="prompt")
        served = self.find(body.model)
        messages = tuple(turn.to_message() for turn in body.messages or ())
        return await served.backend.tokenize(body.prompt, messages, served.adapter), served.card.max_model_len

    async def detokenize(self, body: DetokenizeBody) -> str:
        return await self.find(body.model).backend.detokenize(tuple(body.tokens))

    async def ready(self) -> bool:
        """Whether every model can take a request."""
        return all(await asyncio.gather(*(served.backend.ready() for served in self.models.values())))

    async def stats(self) -> dict[str, BackendStats]:
        """One replica's load per model; zeros where none runs."""
        models = {id_: served.backend for id_, served in self.models.items() if served.adapter is None}
        found = await asyncio.gather(*(backend.stats() for backend in models.values()))
        return dict(zip(models, found, strict=True))

    def find(self, model: str | None) -> Served:
        """The served model; the only one when none is named.

        Raises:
            Refused: a 404 that lists what is served.
        """
        if model is None and len(self.models) == 1:
            return next(iter(self.models.values()))
        if model not in self.models:
            raise model_not_found(str(model), list(self.models))
        return self.models[model]

    def _ready_for(self, body: ChatBody | CompletionBody, num_prompts: int) -> Served:
        """The model that the body asks for; looked at before anything is made for each of its choices."""
        served = self.find(body.model)
        body.check_supported()
        num, limit = num_prompts * (body.n or 1), self.args.router.max_choices
        if num > limit:
            raise bad_request(f"The request asks for {num} choices; the limit is {limit}. Ask for fewer.", param="n")
        return served

    def _shared_fields(self, served: Served, body: ChatBody | CompletionBody) -> dict[str, Any]:
        """What chats and completions say alike; a request's own time can only be shorter than the service's."""
        times = [seconds for seconds in (body.timeout, self.args.router.request_timeout_s) if seconds is not None]
        return {
            "overrides": body.overrides(),
            "task": body.task_name,
            "min_tokens": body.min_tokens or 0,
            "ignore_eos": bool(body.ignore_eos),
            "logit_bias": body.bias,
            "num_beams": body.num_beams or 1,
            "timeout_s": min(times, default=None),
            "priority": body.priority or 0,
            "cache_salt": body.cache_salt or "",
            "adapter": served.adapter,
            "num_logprobs": body.num_logprobs,
        }

    async def _grounded(self, served: Served, body: ChatBody) -> tuple[tuple[Message, ...], tuple[Passage, ...]]:
        messages = body.to_messages()
        if served.collection is None or self.grounding is None or body.retrieval is False:
            return messages, ()
        return await self.grounding.ground(served.collection, messages)

    async def _open(
        self,
        served: Served,
        requests: Sequence[TextRequest],
        request_id: str,
        *,
        passages: tuple[Passage, ...] = (),
        choices_per_prompt: int,
    ) -> Live:
        model = served.card.id
        streams = [self._meter.watch(served.backend.stream(request), request_id=request_id, model=model) for request in requests]
        try:
            firsts = await self._first_events(streams)
        except BaseException:
            await _close_all(streams)
            raise
        events = merged([_resumed(first, stream) for first, stream in zip(firsts, streams, strict=True)])
        return Live(model, events, len(requests), choices_per_prompt, passages, streams)

    async def _first_events(self, streams: Sequence[AsyncGenerator[Event, None]]) -> list[Event]:
        seconds = self.args.router.first_token_timeout_s
        try:
            firsts = await asyncio.wait_for(asyncio.gather(*(anext(stream) for stream in streams)), seconds)
        except TimeoutError as error:
            raise too_slow(seconds) from error
        for first in firsts:
            if isinstance(first, Fault):
                raise Refused(first)
        return list(firsts)


def _choices(template: TextRequest, num: int) -> list[TextRequest]:
    """`num` copies with ids of their own; a given seed is counted up, or all choices would be the same."""
    seed = template.overrides.get("seed")
    return [
        replace(
            template,
            id=uuid.uuid4().hex,
            overrides=template.overrides if seed is None else {**template.overrides, "seed": _wrapped(seed + index)},
        )
        for index in range(num)
    ]


def _wrapped(seed: int) -> int:
    """Within 64 bits, as engines want it."""
    return (seed + 2**63) % 2**64 - 2**63


async def _resumed(first: Event, rest: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
    yield first
    async for event in rest:
        yield event


async def _close_all(streams: Sequence[AsyncGenerator[Event, None]]) -> None:
    for stream in streams:
        await stream.aclose()
