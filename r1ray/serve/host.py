"""One replica's model: text requests in, text events out, on the version that the registry's alias names at the moment.

A promotion is followed without a restart: the new version is loaded beside the old one, new requests go to it, and the old
engine is stopped when its last stream has ended. Adapters beside it (adapters.py) are followed alike, in the running engine.
Needs no Ray: replica.py wraps it in a deployment.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from r1ray.engine.protocol import Engine, FinishReason, GenerationRequest, TokenChunk
from r1ray.errors import EngineStopped, UnknownAdapter
from r1ray.serve.adapters import AdapterShelf, LoadedAdapter, is_used
from r1ray.serve.batches import coalesced
from r1ray.serve.codec import Codec, TokenizerCodec
from r1ray.serve.config import ModelArgs
from r1ray.serve.faults import bad_request, fault_of
from r1ray.serve.policy import resolve
from r1ray.serve.protocol import BackendStats, Delta, Done, Event, Fault, TextRequest
from r1ray.serve.scored import ScoredAssembler, echoed
from r1ray.serve.text import TextAssembler
from r1ray.types import Artifact, Message, Sampling

__all__ = ["LoadedVersion", "ModelHost", "registry_host", "warmed"]

logger = logging.getLogger("ray.serve")
DRAIN_POLL_S = 0.1


@dataclass(slots=True)
class LoadedVersion:
    """A version ready to answer. `artifact` is replaced when only its sampling policy changed."""

    artifact: Artifact
    codec: Codec
    engine: Engine
    adapters: dict[str, LoadedAdapter] = field(default_factory=dict)
    num_streams: int = 0


class ModelHost:
    """`find` asks the registry for the wanted version (blocking), `load` makes it ready. Both may raise any R1RayError."""

    def __init__(
        self,
        args: ModelArgs,
        find: Callable[[], Artifact],
        load: Callable[[Artifact], Awaitable[LoadedVersion]],
        shelf: AdapterShelf | None = None,
    ) -> None:
        self.args = args
        self._find = find
        self._load = load
        self._shelf = shelf
        self._live: LoadedVersion | None = None
        self._failed: tuple[str, ...] = ()
        self._drains: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Load the wanted version. Errors end the start: a replica without a model has no use."""
        self._live = await self._whole(await asyncio.to_thread(self._find))
        logger.info("%s answers with %s", self.args.id, self._live.artifact.ref)

    async def follow(self) -> None:
        """Look for a new version for ever. What fails is logged and leaves the running version in place."""
        while True:
            await asyncio.sleep(self.args.follow_interval_s)
            try:
                await self.refresh()
            except Exception:  # the registry may be away for a while; serving goes on
                logger.exception("%s could not follow %s; it stays on %s", self.args.id, self.args.ref, self._loaded().artifact.ref)

    async def refresh(self) -> bool:
        """One look at the registry; whether another version answers now. One that failed is tried again with other adapters only."""
        wanted = await asyncio.to_thread(self._find)
        live = self._loaded()
        if wanted.ref == live.artifact.ref:
            live.artifact = wanted
            await self._follow_adapters(live)
            return False
        together = (wanted.ref, *(await self._shelf.refs() if self._shelf else ()))
        if together == self._failed:
            await self._follow_adapters(live)
            return False
        try:
            fresh = await self._whole(wanted)
        except Exception:
            self._failed = together
            raise
        self._live, self._failed = fresh, ()
        logger.info("%s switched from %s to %s; %d streams drain", self.args.id, live.artifact.ref, wanted.ref, live.num_streams)
        self._start_drain(self._drain(live))
        return True

    async def _whole(self, wanted: Artifact) -> LoadedVersion:
        """The version with the adapters that are served beside it, which are looked at before anything is loaded."""
        if self._shelf is None:
            return await self._load(wanted)
        beside = await self._shelf.find(wanted)
        fresh = await self._load(wanted)
        try:
            fresh.adapters = await self._shelf.fill(beside, fresh.engine)
        except BaseException:
            await fresh.engine.stop()
            raise
        return fresh

    async def _follow_adapters(self, live: LoadedVersion) -> None:
        if self._shelf is not None:
            for old in await self._shelf.follow(live.adapters, live.artifact, live.engine):
                self._start_drain(self._drain_adapter(live, old))

    async def stream(self, request: TextRequest) -> AsyncGenerator[Event, None]:
        """Events of one generation; never raises for what can be said as a Fault. Closing it frees the engine's slot."""
        try:
            live = self._loaded()
            voice = _voice(live, request.adapter)
            with _counted(live, voice):
                async with aclosing(self._answer(live, voice, request)) as events:
                    async for event in events:
                        yield event
        except Exception as error:  # every failure becomes the stream's last event: a client must never see silence
            yield fault_of(error)

    async def tokenize(self, text: str | None, messages: tuple[Message, ...], adapter: str | None = None) -> tuple[int, ...]:
        voice = _voice(self._loaded(), adapter)
        return tuple(voice.codec.render(self._instructed(voice, messages, adapter)) if text is None else voice.codec.encode(text))

    async def detokenize(self, token_ids: tuple[int, ...]) -> str:
        return self._loaded().codec.decode(token_ids)

    async def stats(self) -> BackendStats:
        live = self._loaded()
        stats = live.engine.stats()
        return BackendStats(
            ref=live.artifact.ref,
            pid=os.getpid(),
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_slots=stats.num_slots,
            num_free_slots=stats.num_free_slots,
        )

    async def ready(self) -> bool:
        return self._live is not None and self._live.engine.stats().state == "running"

    def check(self) -> None:
        """Raises EngineStopped when the engine is dead, so that the replica is replaced."""
        stats = self._loaded().engine.stats()
        if stats.state in ("failed", "stopped"):
            why = (stats.error or "no reason given").rstrip(".")
            raise EngineStopped(f"The engine of {self.args.id} is {stats.state}: {why}. The replica is replaced.")

    async def stop(self) -> None:
        """End the engine and every drain."""
        for drain in self._drains:
            drain.cancel()
        if self._live is not None:
            await self._live.engine.stop()

    def _loaded(self) -> LoadedVersion:
        if self._live is None:
            raise EngineStopped(f"{self.args.id} has not started. Await start() first.")
        return self._live

    def _start_drain(self, draining: Coroutine[Any, Any, None]) -> None:
        drain = asyncio.create_task(draining)
        self._drains.add(drain)
        drain.add_done_callback(self._drains.discard)

    async def _drain(self, old: LoadedVersion) -> None:
        await self._unused(old)
        await old.engine.stop()
        logger.info("%s has let go of %s", self.args.id, old.artifact.ref)

    async def _drain_adapter(self, live: LoadedVersion, old: LoadedAdapter) -> None:
        """The engine waits for streams that are longer than `drain_timeout_s`: it cannot take an adapter from under one."""
        await self._unused(old)
        if not is_used(old.artifact, live.adapters):  # by another id, or by the same one after a rollback
            with suppress(EngineStopped):  # its base was replaced meanwhile, and all of its adapters with it
                await live.engine.unload_adapter(old.artifact.ref)
            logger.info("%s has let go of %s", self.args.id, old.artifact.ref)

    async def _unused(self, old: LoadedVersion | LoadedAdapter) -> None:
        deadline = asyncio.get_running_loop().time() + self.args.drain_timeout_s
        while old.num_streams and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(DRAIN_POLL_S)

    async def _answer(self, live: LoadedVersion, voice: LoadedVersion | LoadedAdapter, request: TextRequest) -> AsyncGenerator[Event, None]:
        """`voice`: whose template, policy and words; the engine's adapter of that version, unless it is the loaded one itself."""
        _check_scorable(live.engine, request)
        prompt_ids = self._prompt_ids(voice, request)
        sampling = resolve(voice.artifact.policy, request.task, request.overrides)
        sampling = _searching(sampling, request.overrides) if request.num_beams > 1 else sampling
        prefilled = voice.codec.thinking(prompt_ids) if request.messages else None
        echo = "" if not request.echo else voice.codec.decode(prompt_ids) if request.prompt is None else request.prompt
        text = _assembler(voice.codec, sampling.stop, prefilled, request, offset=len(echo))
        adapter = None if voice is live else voice.artifact.ref
        chunks = live.engine.generate(_generation(request, prompt_ids, sampling, adapter))
        last: TokenChunk | None = None
        async with aclosing(coalesced(chunks, self.args.coalesce_ms / 1000)) as batches:
            async for batch in batches:
                if request.echo and last is None and batch[0].finish_reason != "abort":
                    yield echoed(voice.codec, echo, prompt_ids, batch[0], scored=request.num_logprobs is not None)
                last = batch[-1]
                if request.prompt_only:
                    break
                yield replace(_fed(text, batch), num_prompt_tokens=last.num_prompt_tokens)
                if text.stopped:
                    break
        if not text.stopped:
            yield text.flush()
        reason = "stop" if text.stopped else "length" if request.prompt_only and last else last.finish_reason if last else None
        yield self._ending(voice.artifact.ref, text, last, reason)

    def _ending(self, ref: str, text: TextAssembler, last: TokenChunk | None, reason: FinishReason | None) -> Done | Fault:
        if last is None or reason is None or reason == "abort":
            return fault_of(EngineStopped(f"{self.args.id} ended the generation before its end. Send the request again."))
        return Done(
            finish_reason=reason,
            num_prompt_tokens=last.num_prompt_tokens,
            num_completion_tokens=text.num_tokens,
            num_reasoning_tokens=text.num_reasoning_tokens,
            num_cached_tokens=last.num_cached_tokens,
            ref=ref,
        )

    def _prompt_ids(self, voice: LoadedVersion | LoadedAdapter, request: TextRequest) -> tuple[int, ...]:
        if request.prompt_ids is not None:
            return request.prompt_ids
        if request.prompt is not None:
            return tuple(voice.codec.encode(request.prompt))
        if not request.messages:
            raise bad_request("messages is empty; send at least one.", param="messages")
        return tuple(voice.codec.render(self._instructed(voice, request.messages, request.adapter)))

    def _instructed(self, voice: LoadedVersion | LoadedAdapter, messages: tuple[Message, ...], adapter: str | None) -> tuple[Message, ...]:
        """The system message of the version's training, when the request brings none."""
        args = next((each for each in self.args.adapters if each.id == adapter), self.args)
        system = args.system_prompt if args.system_prompt is not None else voice.artifact.manifest.system_prompt
        if not system or any(message.role == "system" for message in messages):
            return messages
        return (Message(role="system", content=system), *messages)


def _voice(live: LoadedVersion, adapter: str | None) -> LoadedVersion | LoadedAdapter:
    """Who answers to this name.

    Raises:
        UnknownAdapter: this replica serves none of that name, as while a deployment with another one rolls out.
    """
    if adapter is None:
        return live
    if adapter not in live.adapters:
        raise UnknownAdapter(f"No adapter {adapter!r} is served here. Served: {', '.join(live.adapters) or 'none'}. Send it again later.")
    return live.adapters[adapter]


@contextmanager
def _counted(live: LoadedVersion, voice: LoadedVersion | LoadedAdapter) -> Iterator[None]:
    """Neither is let go of meanwhile."""
    parts = (live,) if voice is live else (live, voice)
    for part in parts:
        part.num_streams += 1
    try:
        yield
    finally:
        for part in parts:
            part.num_streams -= 1


def _check_scorable(engine: Engine, request: TextRequest) -> None:
    """Raises Refused (400) for log-probabilities that this engine does not give."""
    if request.num_logprobs is None:
        return
    if "logprobs" not in engine.capabilities:
        raise bad_request("The engine of this model gives no logprobs; leave logprobs out.", "logprobs", "unsupported_parameter")
    if request.echo and "prompt_logprobs" not in engine.capabilities:
        raise bad_request("The engine of this model gives no logprobs of prompts; leave echo out.", "echo", "unsupported_parameter")


def _assembler(codec: Codec, stops: Sequence[str], prefilled: bool | None, request: TextRequest, *, offset: int) -> TextAssembler:
    if request.num_logprobs is None:
        return TextAssembler(codec.decode, stops, prefilled=prefilled)
    return ScoredAssembler(codec, stops, prefilled=prefilled, offset=offset)


def _fed(text: TextAssembler, batch: list[TokenChunk]) -> Delta:
    tokens = [token for chunk in batch for token in chunk.token_ids]
    if isinstance(text, ScoredAssembler):
        return text.feed_scored(tokens, [entry for chunk in batch for entry in chunk.logprobs])
    return text.feed(tokens)


def _generation(request: TextRequest, prompt_ids: tuple[int, ...], sampling: Sampling, adapter: str | None) -> GenerationRequest:
    return GenerationRequest(
        id=request.id,
        prompt_ids=prompt_ids,
        sampling=sampling,
        ignore_eos=request.ignore_eos,
        min_tokens=request.min_tokens,
        logit_bias=request.logit_bias,
        num_beams=request.num_beams,
        timeout_s=request.timeout_s,
        priority=request.priority,
        cache_salt=request.cache_salt,
        adapter=adapter,
        num_logprobs=request.num_logprobs,
        prompt_logprobs=request.echo and request.num_logprobs is not None,
        num_prompt_logprobs=(request.num_logprobs or 0) if request.echo else 0,
    )


def _searching(sampling: Sampling, overrides: Mapping[str, Any]) -> Sampling:
    """Without what a version's policy says about drawing: a beam search draws nothing. What the request itself asks for is kept."""
    neutral = {"temperature": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}
    return sampling.model_copy(update={name: value for name, value in neutral.items() if name not in overrides})


def registry_host(args: ModelArgs) -> ModelHost:
    """A host on this machine's registry: what a replica runs."""
    from r1ray.engine.create import create_engine
    from r1ray.registry import Registry

    registry = Registry()

    async def load(artifact: Artifact) -> LoadedVersion:
        codec = await asyncio.to_thread(TokenizerCodec, artifact, chat_template=Path(args.chat_template) if args.chat_template else None)
        return await warmed(artifact, codec, await asyncio.to_thread(create_engine, artifact, args.engine, registry))

    shelf = AdapterShelf(args.adapters, find=registry.resolve, codec=TokenizerCodec)
    return ModelHost(args, find=lambda: registry.resolve(args.ref), load=load, shelf=shelf)


async def warmed(artifact: Artifact, codec: Codec, engine: Engine) -> LoadedVersion:
    """Started and ready; where that fails, the engine's memory, threads and actors are given back before the error goes on."""
    try:
        await engine.start()
        await _warm_up(artifact, codec, engine)
    except BaseException:
        await engine.stop()
        raise
    return LoadedVersion(artifact, codec, engine)


async def _warm_up(artifact: Artifact, codec: Codec, engine: Engine) -> None:
    """One short answer before the first client's: the first step of a process loads libraries for seconds."""
    started = time.perf_counter()
    prompt_ids = tuple(codec.render([Message(role="user", content="hi")]))
    request = GenerationRequest(id="warm-up", prompt_ids=prompt_ids, sampling=Sampling(max_tokens=2), ignore_eos=True)
    async with aclosing(engine.generate(request)) as chunks:
        async for _ in chunks:
            pass
    logger.info("%s is warm after %.1f s", artifact.ref, time.perf_counter() - started)
