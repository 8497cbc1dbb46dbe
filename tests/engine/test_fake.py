"""The fake engine keeps the protocol, since everything above is tested against it."""

import asyncio
from contextlib import aclosing

import pytest

from r1ray.engine.config import EngineConfig, FakeConfig
from r1ray.engine.fake import FakeEngine
from r1ray.engine.protocol import Engine, GenerationRequest
from r1ray.errors import DeadlineExceeded, EngineStopped, InvalidRequest, PromptTooLong, QueueFull, UnknownAdapter
from r1ray.types import Sampling


def fake(delay_s=0.0, fail_after=None, **settings):
    return FakeEngine(EngineConfig(type="fake", fake=FakeConfig(token_delay_s=delay_s, fail_after_tokens=fail_after), **settings))


def request(id="a", prompt=(5, 6, 7), max_tokens=16, **rest):
    return GenerationRequest(id=id, prompt_ids=prompt, sampling=Sampling(max_tokens=max_tokens), **rest)


async def collect(engine, wanted):
    await engine.start()
    async with aclosing(engine.generate(wanted)) as chunks:
        return [chunk async for chunk in chunks]


def ids(chunks):
    return tuple(t for chunk in chunks for t in chunk.token_ids)


def test_it_is_an_engine():
    assert isinstance(fake(), Engine)


def test_it_echoes_the_prompt_and_stops():
    chunks = asyncio.run(collect(fake(), request()))
    assert ids(chunks) == (5, 6, 7)
    assert [c.finish_reason for c in chunks] == [None, None, None, "stop"]


def test_it_ends_with_length_at_max_tokens():
    chunks = asyncio.run(collect(fake(), request(max_tokens=2)))
    assert ids(chunks) == (5, 6)
    assert chunks[-1].finish_reason == "length"


def test_max_tokens_is_clipped_to_the_context():
    engine = FakeEngine(EngineConfig(type="fake"), answer=lambda r: range(100), context_length=10)
    assert len(ids(asyncio.run(collect(engine, request(max_tokens=50))))) == 7


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        (request(prompt=()), InvalidRequest),
        (request(prompt=tuple(range(10))), PromptTooLong),
        (request(adapter="none"), UnknownAdapter),
    ],
)
def test_a_bad_request_is_refused_at_the_first_step(wanted, error):
    with pytest.raises(error):
        asyncio.run(collect(fake(max_context=10), wanted))


def test_a_full_queue_refuses():
    async def scenario():
        engine = fake(delay_s=0.01, num_slots=1, max_waiting=1)
        tasks = [asyncio.create_task(collect(engine, request(id=str(i)))) for i in range(3)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(r).__name__ for r in asyncio.run(scenario())] == ["list", "list", "QueueFull"]
    assert issubclass(QueueFull, Exception)


def test_abort_ends_a_stream_and_frees_the_slot():
    async def scenario():
        engine = fake(delay_s=0.01, num_slots=1)
        task = asyncio.create_task(collect(engine, request(prompt=tuple(range(100)), max_tokens=100)))
        await asyncio.sleep(0.03)
        await engine.abort("a")
        return (await task)[-1].finish_reason, engine.stats().num_free_slots

    assert asyncio.run(scenario()) == ("abort", 1)


def test_the_failure_switch_ends_every_stream():
    async def scenario():
        engine = fake(fail_after=3)
        results = await asyncio.gather(*(collect(engine, request(id=i)) for i in "ab"), return_exceptions=True)
        return [type(r) for r in results], engine.stats().state

    assert asyncio.run(scenario()) == ([EngineStopped, EngineStopped], "failed")


def test_a_request_is_over_time_running_or_waiting():
    async def run():
        engine = fake(delay_s=0.02, num_slots=1)
        await engine.start()
        running = asyncio.create_task(collect(engine, request("running", prompt=tuple(range(50)), max_tokens=50, timeout_s=0.2)))
        await asyncio.sleep(0.05)
        with pytest.raises(DeadlineExceeded, match="waiting"):
            await collect(engine, request("waiting", timeout_s=0.05))
        assert not running.done()
        with pytest.raises(DeadlineExceeded, match=r"running was not done within its 0\.2 s"):
            await running
        return engine.stats().num_free_slots

    assert asyncio.run(run()) == 1
