"""Many requests at once, in the order given, with any engine."""

import asyncio

import pytest

from r1ray.engine.config import EngineConfig, FakeConfig
from r1ray.engine.fake import FakeEngine
from r1ray.engine.offline import generate_all
from r1ray.engine.protocol import GenerationRequest
from r1ray.errors import EngineStopped, PromptTooLong
from r1ray.types import Sampling


def requests(num, size=3):
    return [GenerationRequest(id=f"r{i}", prompt_ids=tuple(range(1, 1 + size + i % 4)), sampling=Sampling()) for i in range(num)]


def test_answers_come_in_the_order_given_without_overrunning_the_queue():
    engine = FakeEngine(EngineConfig(type="fake", num_slots=2, max_waiting=0))
    seen = []
    done = generate_all(engine, requests(20), on_done=seen.append)
    assert [c.request_id for c in done] == [f"r{i}" for i in range(20)]
    assert [c.token_ids for c in done] == [r.prompt_ids for r in requests(20)]
    assert len(seen) == 20
    assert all(c.finish_reason == "stop" and 0 <= c.ttft_s <= c.seconds for c in done)
    assert engine.stats().state == "running"


def test_one_engine_serves_several_rounds():
    engine = FakeEngine(EngineConfig(type="fake"))
    assert generate_all(engine, []) == []
    assert len(generate_all(engine, requests(3)) + generate_all(engine, requests(3))) == 6


def test_a_request_that_cannot_run_raises_its_error():
    engine = FakeEngine(EngineConfig(type="fake", max_context=10))
    with pytest.raises(PromptTooLong):
        generate_all(engine, [*requests(3), *requests(1, size=50)])


def test_a_dying_engine_raises():
    engine = FakeEngine(EngineConfig(type="fake", fake=FakeConfig(fail_after_tokens=5)))
    with pytest.raises(EngineStopped):
        generate_all(engine, requests(8))


def test_the_in_house_engine_serves_several_rounds(tiny_qwen2):
    from transformers import AutoModelForCausalLM

    from r1ray.engine.batching import BatchingEngine
    from r1ray.engine.paged import TransformersBackend

    backend = TransformersBackend(AutoModelForCausalLM.from_pretrained(tiny_qwen2), num_blocks=20)
    engine = BatchingEngine(backend, EngineConfig(num_slots=4, num_threads=1), context_length=64)
    try:
        wanted = [GenerationRequest(id=f"r{i}", prompt_ids=(i + 1, 5), sampling=Sampling(temperature=0, max_tokens=4)) for i in range(10)]
        first, second = generate_all(engine, wanted), generate_all(engine, wanted)
        assert [c.token_ids for c in first] == [c.token_ids for c in second]
        assert {len(c.token_ids) for c in first} == {4}
    finally:
        asyncio.run(engine.stop())
