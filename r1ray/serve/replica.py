"""The ModelReplica deployment: a ModelHost with Ray around it, and the other end, a Backend over its handle.

Thin on purpose; what it does is in host.py. The engine queues, not Serve: a replica accepts whatever comes and its engine admits
or refuses exactly, so `max_ongoing_requests` is only a roof.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from r1ray.errors import QueueFull, R1RayError
from r1ray.serve.config import ModelArgs
from r1ray.serve.faults import fault_of, replica_lost
from r1ray.serve.host import registry_host
from r1ray.serve.overview import Overview, Seen
from r1ray.serve.protocol import BackendStats, Event, Fault, Refused, TextRequest
from r1ray.types import Message

__all__ = ["HandleBackend", "ModelReplica"]

logger = logging.getLogger("ray.serve")
LOST = (RayActorError, TaskCancelledError, RayServeException)
READY_FOR_S = 1.0


class ModelReplica:
    """One model on one engine."""

    async def __init__(self, args: ModelArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        self._host = registry_host(args)
        await self._host.start()
        self._following = asyncio.create_task(self._host.follow())

    async def stream(self, request: TextRequest) -> AsyncGenerator[Event, None]:
        async with aclosing(self._host.stream(request)) as events:
            async for event in events:
                yield event

    async def tokenize(self, text: str | None, messages: tuple[Message, ...], adapter: str | None = None) -> tuple[int, ...]:
        return await self._host.tokenize(text, messages, adapter)

    async def detokenize(self, token_ids: tuple[int, ...]) -> str:
        return await self._host.detokenize(token_ids)

    async def stats(self) -> BackendStats:
        return await self._host.stats()

    async def check_health(self) -> None:
        """Serve calls it; an exception has the replica replaced."""
        self._host.check()

    async def __del__(self) -> None:
        self._following.cancel()
        await self._host.stop()


class HandleBackend:
    """A Backend whose model lives in a deployment."""

    def __init__(self, handle: DeploymentHandle, overview: Overview, *, may_sleep: bool) -> None:
        """`overview` is shared by all models; `may_sleep`: this one has min_replicas 0, so no replica is no illness."""
        self._handle = handle
        self._streaming = handle.options(stream=True)
        self._overview = overview
        self._may_sleep = may_sleep

    async def stream(self, request: TextRequest) -> AsyncGenerator[Event, None]:
        """A replica that is lost before its first event costs a second try; later, the stream ends with a Fault."""
        for attempt in (1, 2):
            started = False
            try:
                async with aclosing(self._stream_once(request)) as events:
                    async for event in events:
                        started = True
                        yield event
                return
            except Exception as error:  # whatever breaks between the processes must reach the client as a fault
                if started or attempt == 2 or not isinstance(error, RayActorError):
                    yield self._fault(error)
                    return
                logger.warning("%s lost its replica before the first token; trying another", request.id)

    async def tokenize(self, text: str | None, messages: tuple[Message, ...], adapter: str | None = None) -> tuple[int, ...]:
        found: tuple[int, ...] = await self._said(self._handle.tokenize.remote(text, messages, adapter))
        return found

    async def detokenize(self, token_ids: tuple[int, ...]) -> str:
        found: str = await self._said(self._handle.detokenize.remote(token_ids))
        return found

    async def stats(self) -> BackendStats:
        """Zeros where no replica runs: a call would wake a sleeping model, or wait for one that is being built."""
        if not (await self._seen(0.0)).num_running:
            return BackendStats(ref="", pid=0, num_running=0, num_waiting=0, num_slots=0, num_free_slots=0)
        found: BackendStats = await self._said(self._handle.stats.remote())
        return found

    async def ready(self) -> bool:
        """As Serve saw it a second ago or later; load balancers ask often."""
        seen = await self._seen(READY_FOR_S)
        return seen.num_running > 0 or (self._may_sleep and seen.is_healthy)

    async def _stream_once(self, request: TextRequest) -> AsyncGenerator[Event, None]:
        response: Any = self._streaming.stream.remote(request)
        ended = False
        try:
            async for event in response:
                yield event
            ended = True
        finally:
            if not ended:
                response.cancel()

    async def _said(self, response: Any) -> Any:
        """What a replica answers; its errors as our own, without the traceback that Ray puts around them."""
        try:
            return await response
        except Exception as error:  # between the processes anything may break
            raise Refused(self._fault(error)) from error

    def _fault(self, error: Exception) -> Fault:
        if isinstance(error, BackPressureError):
            return fault_of(QueueFull("Too many requests wait already. Retry later."))
        if isinstance(error, LOST):
            logger.warning("A stream of %s was cut: %s: %s", self._handle.deployment_name, type(error).__name__, error)
            return replica_lost()
        cause = error.cause if isinstance(error, RayTaskError) else error
        return fault_of(cause if isinstance(cause, R1RayError) else error)

    async def _seen(self, max_age_s: float) -> Seen:
        return await self._overview.of(self._handle.app_name, self._handle.deployment_name, max_age_s=max_age_s)
