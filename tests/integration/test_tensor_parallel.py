"""A stage's layers over two Ray actors' worth of processes: the same tokens as one process, and a killed rank is an error at once."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from r1ray.engine.config import EngineConfig
from r1ray.engine.protocol import GenerationRequest
from r1ray.errors import EngineStopped, InvalidValue
from r1ray.types import Sampling

pytestmark = pytest.mark.ray

AT_ONCE_S = 5.0  # generous, since the machine may be busy; the engine's own time limit for a silent rank is 300 s
COMMON: dict[str, Any] = {"dtype": "float32", "backend": "transformers", "num_slots": 4, "num_threads": 1, "kv_cache_gb": 0.01}


@pytest.fixture(scope="module")
def artifact(ray_cluster, tiny_llama: Path) -> Any:
    from r1ray.model.importer import import_model
    from r1ray.registry import Registry

    return import_model(str(tiny_llama), name="tensor-tiny", registry=Registry(ray_cluster.settings))


def engine_of(ray_cluster, artifact: Any, num_tensor: int) -> Any:
    from r1ray.engine.create import create_engine
    from r1ray.registry import Registry

    config = EngineConfig(tensor_parallel=num_tensor, stage_cpus=0.5, **COMMON)
    return create_engine(artifact, config, Registry(ray_cluster.settings))


async def answer(engine: Any, number: int, max_tokens: int) -> list[int]:
    request = GenerationRequest(
        id=f"{number}-{max_tokens}",
        prompt_ids=tuple(range(20 + number, 60 + 9 * number)),
        sampling=Sampling(temperature=0, max_tokens=max_tokens),
        ignore_eos=True,
    )
    async with aclosing(engine.generate(request)) as chunks:
        return [token async for chunk in chunks for token in chunk.token_ids]


async def four(engine: Any) -> list[list[int]]:
    return await asyncio.gather(*(answer(engine, number, 12) for number in range(4)))


async def alone(engine: Any) -> list[list[int]]:
    await engine.start()
    try:
        return await four(engine)
    finally:
        await engine.stop()


async def killed(engine: Any) -> tuple[list[list[int]], list[Any], float]:
    """What four requests answered; then how four long ones ended when a rank was killed, and how long that took."""
    from ray.util.state import list_actors

    await engine.start()
    answered = await four(engine)
    running = [asyncio.create_task(answer(engine, number, 400)) for number in range(4)]
    while engine.stats().num_generated_tokens < 4 * 12 + 8:
        await asyncio.sleep(0.005)
    (rank,) = list_actors(filters=[("class_name", "=", "StageActor"), ("state", "=", "ALIVE")], detail=True)
    killed_at = time.monotonic()
    os.kill(rank.pid, signal.SIGKILL)
    ended = await asyncio.gather(*running, return_exceptions=True)
    took = time.monotonic() - killed_at
    try:
        await answer(engine, 0, 9)
    except EngineStopped as error:
        ended.append(error)
    await engine.stop()
    return answered, ended, took


def test_two_ranks_answer_as_one_process_does_and_a_killed_one_ends_what_runs(ray_cluster, artifact: Any) -> None:
    engine = engine_of(ray_cluster, artifact, 2)
    answered, ended, took = asyncio.run(killed(engine))
    assert answered == asyncio.run(alone(engine_of(ray_cluster, artifact, 1)))
    assert len(ended) == 5
    assert all(isinstance(error, EngineStopped) and "A tensor rank of the pipeline is gone." in str(error) for error in ended), ended
    assert took < AT_ONCE_S
    assert engine.stats().state == "failed"


def test_heads_that_do_not_divide_are_refused_before_any_actor_starts(ray_cluster, artifact: Any) -> None:
    from ray.util.state import list_actors

    filters = [("class_name", "=", "StageActor")]
    before = len(list_actors(filters=filters))
    with pytest.raises(InvalidValue, match=r"tensor_parallel=3 does not divide this model's num_attention_heads=4"):
        engine_of(ray_cluster, artifact, 3)
    assert len(list_actors(filters=filters)) == before
