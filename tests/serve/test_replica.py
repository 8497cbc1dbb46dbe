"""The router's end of a replica: what a lost one means to the client."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from r1ray.errors import UnknownAdapter
from r1ray.serve.overview import Overview
from r1ray.serve.protocol import BackendStats, Delta, Done, Fault, Refused, TextRequest
from r1ray.serve.replica import HandleBackend

DELTA = Delta(content="x", num_tokens=1)
DONE = Done(finish_reason="stop", num_prompt_tokens=1, num_completion_tokens=1)


class Response:
    """A streaming response that plays a script; an exception in it is raised."""

    def __init__(self, script) -> None:
        self.script, self.cancelled = list(script), False

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.script:
            raise StopAsyncIteration
        item = self.script.pop(0)
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A deployment handle whose calls answer with the given scripts, one after the other."""

    app_name = "app"
    deployment_name = "ModelReplica-m"

    def __init__(self, *scripts) -> None:
        self.responses = [Response(script) for script in scripts]
        self.calls: list[Response] = []
        self.stream = self

    def options(self, *, stream: bool):
        assert stream
        return self

    def remote(self, request):
        self.calls.append(self.responses[len(self.calls)])
        return self.calls[-1]


def play(handle, num_read: int | None = None) -> list:
    async def run():
        events, stream = [], HandleBackend(handle, Overview(no_controller), may_sleep=False).stream(TextRequest(id="r", prompt="x"))
        async for event in stream:
            events.append(event)
            if len(events) == num_read:
                break
        await stream.aclose()
        return events

    return asyncio.run(run())


def test_a_replica_lost_before_the_first_token_costs_a_second_try() -> None:
    handle = Handle([ActorDiedError()], [DELTA, DONE])
    assert play(handle) == [DELTA, DONE]
    assert len(handle.calls) == 2


def test_a_replica_lost_midstream_is_a_fault_and_never_a_second_answer() -> None:
    handle = Handle([DELTA, ActorDiedError()], [DELTA, DONE])
    first, fault = play(handle)
    assert first == DELTA and isinstance(fault, Fault) and (fault.status, fault.code) == (503, "replica_lost")
    assert len(handle.calls) == 1


def test_two_lost_replicas_are_a_fault() -> None:
    (fault,) = play(Handle([ActorDiedError()], [ActorDiedError()]))
    assert fault.code == "replica_lost" and fault.retry_after_s is not None


def test_serves_own_refusal_is_a_full_queue_and_a_defect_tells_no_secrets() -> None:
    (full,) = play(Handle([BackPressureError(num_queued_requests=1, max_queued_requests=1)]))
    assert (full.status, full.code) == (429, "queue_full")
    (defect,) = play(Handle([RuntimeError("password=1234")]))
    assert (defect.status, defect.code) == (500, "internal_error") and "1234" not in defect.message


def test_a_reader_that_leaves_cancels_the_call_and_one_that_stays_does_not() -> None:
    left, stayed = Handle([DELTA, DELTA, DONE]), Handle([DELTA, DONE])
    play(left, num_read=1)
    play(stayed)
    assert left.calls[0].cancelled and not stayed.calls[0].cancelled


def no_controller() -> None:
    raise AssertionError("a stream asks nobody")


def test_load_is_zero_where_no_replica_runs_and_wakes_none() -> None:
    calls = []

    class Stats:
        async def _answer(self) -> BackendStats:
            return BackendStats(ref="m@3", pid=7, num_running=1, num_waiting=0, num_slots=4, num_free_slots=3)

        def remote(self):
            calls.append(True)
            return self._answer()

    running: dict[str, int] = {}
    deployed = SimpleNamespace(replica_states=running, status="HEALTHY")
    status = SimpleNamespace(applications={"app": SimpleNamespace(deployments={"ModelReplica-m": deployed})})
    handle = Handle()
    handle.stats = Stats()
    backend = HandleBackend(handle, Overview(lambda: status), may_sleep=True)
    asleep = asyncio.run(backend.stats())
    assert (asleep.num_slots, asleep.num_running, asleep.ref, calls) == (0, 0, "", [])
    assert asyncio.run(backend.ready())
    running["RUNNING"] = 1
    assert (asyncio.run(backend.stats()).ref, calls) == ("m@3", [True])


def test_a_replicas_own_error_reaches_the_client_without_rays_traceback() -> None:
    handle = Handle()
    backend = HandleBackend(handle, Overview(no_controller), may_sleep=False)

    def raising(error):
        async def answer(*_):
            raise error

        return SimpleNamespace(remote=answer)

    def refusal(error) -> Fault:
        handle.tokenize = raising(error)
        with pytest.raises(Refused) as caught:
            asyncio.run(backend.tokenize("x", ()))
        return caught.value.fault

    known = refusal(
        RayTaskError("tokenize", "Traceback: /secret/path", UnknownAdapter("No adapter 'x' is served here.")).as_instanceof_cause()
    )
    assert (known.status, known.message) == (404, "No adapter 'x' is served here.")
    defect = refusal(RayTaskError("tokenize", "Traceback: /secret/path", OverflowError("secret")).as_instanceof_cause())
    assert defect.status == 500 and "secret" not in defect.message
    assert refusal(ActorDiedError()).code == "replica_lost"
