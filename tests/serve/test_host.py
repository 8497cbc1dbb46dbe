"""One replica's model: prompts, the version it follows, and what it says when its engine is dead."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from r1ray.engine.fake import FakeEngine
from r1ray.errors import EngineStopped, PromptTooLong
from r1ray.serve.host import warmed
from r1ray.serve.protocol import Delta, Done, Fault, TextRequest
from r1ray.types import Message, Sampling, SamplingPolicy


def ask(text: str = "hi", **fields) -> TextRequest:
    return TextRequest(id=fields.pop("id", "r"), messages=(Message(role="user", content=text),), **fields)


async def text_of(host, request: TextRequest) -> str:
    return "".join(event.content for event in [e async for e in host.stream(request)] if isinstance(event, Delta))


def test_the_system_prompt_of_the_training_is_added_only_where_none_is(fakes) -> None:
    async def run():
        host = fakes.Shelf(fakes.make_artifact(system_prompt="be kind")).host()
        await host.start()
        own = TextRequest(id="o", messages=(Message(role="system", content="mine"), Message(role="user", content="hi")))
        overridden = fakes.Shelf(fakes.make_artifact(system_prompt="be kind")).host(system_prompt="")
        await overridden.start()
        return await text_of(host, ask()), await text_of(host, own), await text_of(overridden, ask())

    assert asyncio.run(run()) == ("<system>be kind<user>hi<assistant>", "<system>mine<user>hi<assistant>", "<user>hi<assistant>")


def test_a_beam_search_draws_nothing_whatever_the_versions_policy_says(fakes) -> None:
    async def run():
        policy = SamplingPolicy(default=Sampling(temperature=0.6, repetition_penalty=1.1))
        shelf = fakes.Shelf(fakes.make_artifact(policy=policy))
        host = shelf.host()
        await host.start()
        seen = []
        generate = shelf.engines[0].generate
        shelf.engines[0].generate = lambda request: (seen.append(request), generate(replace(request, num_beams=1)))[1]
        for overrides in ({}, {"repetition_penalty": 1.3}):
            assert isinstance([event async for event in host.stream(ask(num_beams=4, overrides=overrides))][-1], Done)
        return [(each.num_beams, each.sampling.temperature, each.sampling.repetition_penalty) for each in seen]

    assert asyncio.run(run()) == [(4, 0, 1.0), (4, 0, 1.3)]


def test_a_promotion_is_followed_and_the_old_version_finishes_its_streams(fakes) -> None:
    async def run():
        shelf = fakes.Shelf(fakes.make_artifact(1), answer=fakes.says("x" * 50), token_delay_s=0.004)
        host = shelf.host()
        await host.start()
        assert await host.refresh() is False
        running = host.stream(ask(id="old"))
        await anext(running)
        shelf.artifact = fakes.make_artifact(2)
        assert await host.refresh() is True
        new = [event async for event in host.stream(ask(id="new"))]
        old = [event async for event in running]
        await asyncio.sleep(0.3)
        return old[-1], new[-1], [engine.stats().state for engine in shelf.engines]

    old, new, states = asyncio.run(run())
    assert isinstance(old, Done) and isinstance(new, Done)
    assert (old.ref, new.ref, old.num_completion_tokens) == ("fake@1", "fake@2", 50)
    assert states == ["stopped", "running"]


def test_a_version_that_cannot_be_loaded_leaves_the_old_one_and_is_not_tried_again(fakes) -> None:
    async def run():
        shelf = fakes.Shelf(fakes.make_artifact(1), broken={2})
        host = shelf.host()
        await host.start()
        shelf.artifact = fakes.make_artifact(2)
        with pytest.raises(OSError, match="cannot be read"):
            await host.refresh()
        assert await host.refresh() is False
        after_failure = (await host.stats()).ref
        shelf.artifact = fakes.make_artifact(3)
        assert await host.refresh() is True
        return after_failure, (await host.stats()).ref

    assert asyncio.run(run()) == ("fake@1", "fake@3")


def test_following_survives_a_registry_that_is_away(fakes) -> None:
    async def run():
        shelf = fakes.Shelf(fakes.make_artifact(1))
        host = shelf.host(follow_interval_s=0.01)
        await host.start()
        looks = []

        def away():
            looks.append(1)
            if len(looks) < 3:
                raise ConnectionError("no registry")
            return fakes.make_artifact(2)

        host._find = away
        following = asyncio.create_task(host.follow())
        for _ in range(200):
            await asyncio.sleep(0.01)
            if (await host.stats()).ref == "fake@2":
                break
        following.cancel()
        return (await host.stats()).ref

    assert asyncio.run(run()) == "fake@2"


def test_a_policy_attached_later_is_used_without_a_new_engine(fakes) -> None:
    async def run():
        shelf = fakes.Shelf(fakes.make_artifact(1), answer=fakes.says("abcdef"))
        host = shelf.host()
        await host.start()
        shelf.artifact = fakes.make_artifact(1, policy=SamplingPolicy(default=Sampling(max_tokens=2)))
        assert await host.refresh() is False
        return await text_of(host, ask()), len(shelf.engines)

    assert asyncio.run(run()) == ("ab", 1)


def test_a_stop_text_frees_the_slot_at_once(fakes) -> None:
    async def run():
        shelf = fakes.Shelf(fakes.make_artifact(), answer=fakes.says("one. two" + "x" * 2000), token_delay_s=0.001)
        host = shelf.host()
        await host.start()
        events = [event async for event in host.stream(ask(overrides={"stop": ["."], "max_tokens": 1500}))]
        return events[-1], shelf.engines[0].stats()

    end, stats = asyncio.run(run())
    assert (end.finish_reason, end.num_completion_tokens) == ("stop", 4)
    assert (stats.num_running, stats.num_aborted) == (0, 1)


def test_a_dead_engine_fails_the_health_check_and_ends_streams_with_a_fault(fakes) -> None:
    async def run():
        shelf = fakes.Shelf(fakes.make_artifact())
        host = shelf.host()
        await host.start()
        host.check()
        shelf.engines[0].fail("out of memory")
        with pytest.raises(EngineStopped, match="out of memory"):
            host.check()
        return [event async for event in host.stream(ask())], await host.ready()

    (event,), ready = asyncio.run(run())
    assert isinstance(event, Fault) and (event.status, event.code) == (503, "engine_stopped") and not ready


def test_prompts_of_every_kind_reach_the_engine(fakes) -> None:
    async def run():
        host = fakes.Shelf(fakes.make_artifact()).host()
        await host.start()
        return [
            await text_of(host, TextRequest(id="t", prompt="text")),
            await text_of(host, TextRequest(id="i", prompt_ids=(104, 105))),
            await host.tokenize(None, (Message(role="user", content="a"),)),
        ]

    assert asyncio.run(run()) == ["text", "hi", tuple(b"<user>a<assistant>")]


def test_what_only_the_engine_needs_reaches_it(fakes) -> None:
    async def run():
        shelf = fakes.Shelf(fakes.make_artifact())
        host = shelf.host()
        await host.start()
        seen = []
        generate = shelf.engines[0].generate
        shelf.engines[0].generate = lambda request: (seen.append(request), generate(request))[1]
        assert isinstance([event async for event in host.stream(ask(timeout_s=5.0, priority=-2, cache_salt="tenant"))][-1], Done)
        return seen[0].timeout_s, seen[0].priority, seen[0].cache_salt

    assert asyncio.run(run()) == (5.0, -2, "tenant")


def test_a_version_that_fails_while_it_warms_up_gives_its_engine_back(fakes) -> None:
    async def run():
        engine = FakeEngine(context_length=1)  # no prompt fits
        with pytest.raises(PromptTooLong):
            await warmed(fakes.make_artifact(2), fakes.ByteCodec(), engine)
        return engine.stats().state

    assert asyncio.run(run()) == "stopped"
