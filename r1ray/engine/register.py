"""Who is served: the engine's state, its open streams, its beam searches, and the adapters that requests may name.

The one place that event loops and the engine's thread share, so every method takes the lock. Computes nothing, knows no backend.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future

from r1ray.engine.beam import BEAM
from r1ray.engine.deadlines import Deadlines
from r1ray.engine.loaded import LoadedAdapters
from r1ray.engine.protocol import EngineState, GenerationRequest
from r1ray.engine.scheduler import Stream
from r1ray.errors import EngineStopped, InvalidRequest, QueueFull

__all__ = ["Register"]


class Register:
    """`num_slots` streams run and `max_waiting` more may wait. `state` and `error` are for reading."""

    def __init__(self, *, num_slots: int, max_waiting: int) -> None:
        self.state: EngineState = "new"
        self.error: str | None = None
        self._num_slots = num_slots
        self._max_waiting = max_waiting
        self._lock = threading.Lock()
        self._open: dict[str, Stream] = {}
        self._searches: list[GenerationRequest] = []
        self._deadlines = Deadlines()
        self._adapters = LoadedAdapters()

    # --- streams

    @property
    def num_open(self) -> int:
        """Running and waiting."""
        return len(self._open)

    @property
    def num_free(self) -> int:
        """Slots that nobody runs in or waits for."""
        return self._num_slots - len(self._open)

    def enter(self, stream: Stream, *, room: int) -> None:
        """`room`: for how many streams there must be room in the queue; 0 for one that carries on what runs already.

        Raises:
            EngineStopped: not running, or draining and `room` is not 0.
            UnknownAdapter: not loaded, or unloaded.
            InvalidRequest: its id is open.
            QueueFull: no room.
        """
        request = stream.request
        with self._lock:
            if room or self.state != "draining":
                self._check_running()
            stream.adapter_number = self._adapters.number(request.adapter, carries_on=not room)
            if request.id in self._open:
                raise InvalidRequest(f"Request id {request.id} is running already. Give each request its own id.")
            if room and len(self._open) + room > self._num_slots + self._max_waiting:
                raise QueueFull(f"{self._max_waiting} requests wait already, which is the limit. Retry later.")
            self._open[request.id] = stream
            self._deadlines.watch(stream)

    def holds(self, stream: Stream) -> bool:
        """Whether it is open still."""
        return self._open.get(stream.request.id) is stream

    def leave(self, stream: Stream) -> None:
        with self._lock:
            self._open.pop(stream.request.id, None)

    def of_request(self, request_id: str) -> list[Stream]:
        """Its stream, or those of its beams."""
        with self._lock:
            return [stream for id_, stream in self._open.items() if id_ == request_id or id_.startswith(request_id + BEAM)]

    def take_late(self) -> list[Stream]:
        """Those whose deadline has come, each once."""
        with self._lock:
            return self._deadlines.pass_by(self._open.values())

    def begin_search(self, request: GenerationRequest) -> None:
        """Its adapter stays while it lasts: its streams may all have ended when it begins another."""
        self._searches.append(request)

    def end_search(self, request: GenerationRequest) -> None:
        self._searches.remove(request)

    # --- adapters

    def promise(self) -> Future[None]:
        """For who waits for a load. Kept by the engine's thread, at its end if need be, also when nobody waits any more.

        Raises:
            EngineStopped: not running.
        """
        with self._lock:
            self._check_running()
            return self._adapters.promise()

    def loaded(self, name: str, done: Future[None]) -> None:
        """Streams that use the adapter of that name go on with the new one."""
        with self._lock:
            number, waits = self._adapters.came(name)
            for stream in self._open.values():
                if stream.request.adapter == name:
                    stream.renumber(self._adapters.new_number() if stream.blocks else number)
        self._adapters.keep([done] if waits is None else [done, waits])

    def not_loaded(self, done: Future[None], error: Exception) -> None:
        self._adapters.keep([done], error)

    def unload(self, name: str) -> Future[None]:
        """No new requests for it from now on; the promise waits until it is gone.

        Raises:
            UnknownAdapter: not loaded.
            EngineStopped: not running.
        """
        with self._lock:
            self._adapters.number(name)
            self._check_running()
            self._adapters.leave(name, done := self._adapters.promise())
        return done

    def take_unused(self) -> list[str]:
        """Unloaded adapters that nobody uses any more; `unloaded` follows for each."""
        if not self._adapters.are_leaving:
            return []
        with self._lock:
            return self._adapters.unused({request.adapter for request in (*(s.request for s in self._open.values()), *self._searches)})

    def unloaded(self, name: str) -> None:
        with self._lock:
            self._adapters.keep([self._adapters.gone(name)])

    # --- from the start to the end

    def start(self) -> bool:
        """Whether it was new."""
        with self._lock:
            is_new = self.state == "new"
            if is_new:
                self.state = "running"
        return is_new

    def drain(self) -> EngineState:
        """No new requests from now on. The state before."""
        with self._lock:
            before = self.state
            if before in ("new", "running"):
                self.state = "draining"
        return before

    def fail(self, reason: str) -> list[Stream]:
        """For good; the streams that were open. None are where it was over before."""
        with self._lock:
            if self.state in ("failed", "stopped"):
                return []
            self.state, self.error = "failed", reason
            return self._take_all()

    def end(self) -> list[Stream]:
        """Stopped, unless it failed; the streams that were open."""
        with self._lock:
            self.stop()
            return self._take_all()

    def stop(self) -> None:
        if self.state != "failed":
            self.state = "stopped"

    def break_promises(self) -> None:
        """Who waits for an adapter hears that the engine is over."""
        self._adapters.keep(self._adapters.awaited, self.death())

    def death(self) -> EngineStopped:
        """What those hear who are served no more."""
        if self.error:
            return EngineStopped(f"The engine failed: {self.error} Send the request again when the replica is rebuilt.")
        return EngineStopped(f"The engine is {self.state}. Start it, or send the request to another replica.")

    def _check_running(self) -> None:
        if self.state != "running":
            raise self.death()

    def _take_all(self) -> list[Stream]:
        streams, self._open = list(self._open.values()), {}
        return streams
