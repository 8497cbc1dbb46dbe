"""A pipeline over raylets; run by test_pipeline.py in a process of its own, since the session has a cluster.

Two tiny models as 1, 2 and 3 stages, each stage on a node of its own, on both backends, once of two tensor ranks each; one stage is
killed under load. The nodes claim GPUs, so that what wants some can be placed, too.
Prints one JSON object: what each configuration generated, where its stages were, and what the streams saw when the stage died.
Usage: python pipeline.py QWEN2_DIRECTORY DEEPSEEK_DIRECTORY
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import aclosing
from pathlib import Path
from typing import Any

from r1ray.environment import prepare_environment

prepare_environment()

from ray.cluster_utils import Cluster  # noqa: E402

from r1ray.engine.config import EngineConfig  # noqa: E402
from r1ray.engine.create import create_engine  # noqa: E402
from r1ray.engine.hardware import _given_gpus  # noqa: E402
from r1ray.engine.protocol import GenerationRequest  # noqa: E402
from r1ray.errors import EngineStopped  # noqa: E402
from r1ray.model.importer import import_model  # noqa: E402
from r1ray.registry import Registry  # noqa: E402
from r1ray.settings import Settings  # noqa: E402
from r1ray.types import Sampling  # noqa: E402

GPUS = (("L40S", 4), ("H200", 8), ("H200", 8))
PROMPTS = [tuple(range(20 + i, 60 + 9 * i)) for i in range(4)]


def request(number: int, max_tokens: int = 12) -> GenerationRequest:
    sampling = Sampling(temperature=0, max_tokens=max_tokens)
    return GenerationRequest(id=str(number), prompt_ids=PROMPTS[number % 4], sampling=sampling, ignore_eos=True)


async def tokens(engine: Any, wanted: GenerationRequest) -> list[int]:
    async with aclosing(engine.generate(wanted)) as chunks:
        return [token async for chunk in chunks for token in chunk.token_ids]


async def generate(engine: Any) -> list[list[int]]:
    return await asyncio.gather(*(tokens(engine, request(number)) for number in range(4)))


async def generate_and_stop(engine: Any) -> list[list[int]]:
    await engine.start()
    try:
        return await generate(engine)
    finally:
        await engine.stop()


def spread_engine(artifact: Any, registry: Registry, stages: int, backend: str, num_tensor: int = 1) -> tuple[Any, Any]:
    """An engine whose actors lie on nodes of their own, as in a replica with STRICT_SPREAD bundles."""
    import ray
    from ray.util.placement_group import placement_group

    settings = {"dtype": "float32", "num_slots": 4, "prefill_chunk": 16, "num_threads": 1, "kv_cache_gb": 0.01}
    config = EngineConfig(backend=backend, stages=stages, tensor_parallel=num_tensor, **settings)  # type: ignore[arg-type]
    if stages == 1:
        return create_engine(artifact, config, registry), None
    group = placement_group([{"CPU": num_tensor}] * stages, strategy="STRICT_SPREAD")
    ray.get(group.ready(), timeout=60)
    real = ray.util.get_current_placement_group
    ray.util.get_current_placement_group = lambda: group  # what a replica inside the group sees
    try:
        return create_engine(artifact, config, registry), group
    finally:
        ray.util.get_current_placement_group = real


async def generate_and_die(engine: Any) -> tuple[list[list[int]], list[str]]:
    """What an engine generates, and then what every running stream and a late one see when a stage of it dies."""
    import ray

    await engine.start()
    before = await generate(engine)
    known = engine.stats().num_generated_tokens
    running = [asyncio.create_task(tokens(engine, request(number, 400))) for number in range(4)]
    while engine.stats().num_generated_tokens < known + 8:
        await asyncio.sleep(0.005)
    ray.kill(engine._backend._workers.actors[0])
    seen = await asyncio.gather(*running, return_exceptions=True)
    try:
        await tokens(engine, request(9))
    except EngineStopped as error:
        seen.append(error)
    return before, [f"{type(outcome).__name__}: {outcome}" for outcome in seen] + [engine.stats().state]


def placed() -> dict[str, int]:
    """On how many nodes Ray puts the stages of serve_config.gpu.yaml's models, given the nodes' claims."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    from r1ray.serve.preflight import read_app_args

    args, _ = read_app_args(Path(__file__).parents[2] / "serve_config.gpu.yaml")
    found = {}
    for model in args.models:
        bundles, labels = model.replica_bundles, dict(model.placement.labels)
        group = placement_group(bundles, strategy=model.placement.strategy, bundle_label_selector=[labels] * len(bundles))
        ray.get(group.ready(), timeout=60)
        table = ray.util.placement_group_table(group)
        found[model.id] = len(set(table["bundles_to_node_id"].values()))
        remove_placement_group(group)
    return found


def described(engine: Any) -> dict[str, Any]:
    """Over how many nodes its actors are spread; this process, its first host, is outside the group."""
    hosts = getattr(engine._backend, "hosts", [])[1:]
    return {"nodes": len({host.node for host in hosts}), "depth": engine._backend.depth}


def given() -> dict[str, Any]:
    """The GPUs that Ray has given to this driver, to a task that reserves none, and to one that reserves one."""
    import ray

    tasks = {str(num): ray.remote(num_cpus=1, num_gpus=num)(_given_gpus).remote() for num in (0, 1)}
    return {"driver": _given_gpus(), **{num: ray.get(task) for num, task in tasks.items()}}


def main(directories: dict[str, Path]) -> None:
    import ray
    from ray.util import remove_placement_group

    settings = Settings()
    settings.home.mkdir(parents=True, exist_ok=True)
    registry = Registry(settings)
    artifacts = {name: import_model(str(path), name=name, registry=registry) for name, path in directories.items()}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    found: dict[str, Any] = {}
    try:
        for name, num_gpus in GPUS:
            nodes.add_node(num_cpus=10, num_gpus=num_gpus, labels={"ray.io/accelerator-type": name})
        os.environ["RAY_ADDRESS"] = nodes.address
        ray.init(address=nodes.address, log_to_driver=False)
        for name, stages, backend in (
            ("qwen2", 1, "auto"),
            ("qwen2", 3, "auto"),
            ("qwen2", 2, "transformers"),
            ("deepseek", 1, "auto"),
            ("deepseek", 2, "auto"),
            ("deepseek", 3, "auto"),
        ):
            engine, group = spread_engine(artifacts[name], registry, stages, backend)
            found[f"{name}/{stages}/{backend}"] = {**described(engine), "tokens": asyncio.run(generate_and_stop(engine))}
            if group is not None:
                remove_placement_group(group)
        engine, group = spread_engine(artifacts["deepseek"], registry, 2, "auto", num_tensor=2)
        found["tensor"] = {"nodes": [host.node for host in engine._backend.hosts[1:]], "tokens": asyncio.run(generate_and_stop(engine))}
        remove_placement_group(group)
        engine, group = spread_engine(artifacts["qwen2"], registry, 2, "auto")
        run = described(engine)
        run["tokens"], found["killed"] = asyncio.run(generate_and_die(engine))
        found["qwen2/2/auto"] = run
        remove_placement_group(group)
        found["placed"] = placed()
        found["given"] = given()
        print("FOUND " + json.dumps(found), flush=True)
    finally:
        ray.shutdown()
        nodes.shutdown()


if __name__ == "__main__":
    main({"qwen2": Path(sys.argv[1]), "deepseek": Path(sys.argv[2])})
