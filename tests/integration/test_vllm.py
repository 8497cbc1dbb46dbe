"""vLLM behind the engine's protocol, for real: the CPU build, in its own environment, in Ray actors (`scripts/test -m vllm`).

One engine for all tests of the protocol, since vLLM takes half a minute to start; then one with two tensor parallel workers that is
killed, and one behind Serve. Skipped, with the command that prepares it, where `scripts/setup-vllm cpu` has not run.
"""

from __future__ import annotations

import asyncio
import math
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from r1ray.engine.config import EngineConfig, VllmConfig
from r1ray.engine.protocol import Engine, GenerationRequest, TokenChunk
from r1ray.errors import (
    AdapterMismatch,
    DeadlineExceeded,
    EngineStopped,
    InvalidRequest,
    InvalidValue,
    PromptTooLong,
    QueueFull,
    R1RayError,
    UnknownAdapter,
)
from r1ray.types import Artifact, Sampling

pytestmark = [pytest.mark.ray, pytest.mark.vllm]

PROMPT = tuple(range(30, 60))


@pytest.fixture(scope="module", autouse=True)
def prepared() -> None:
    from r1ray.engine.vllm.environment import find_environment

    try:
        find_environment(VllmConfig(), wants_gpus=False)
    except R1RayError as error:
        pytest.skip(str(error))


def lively(source: Path, out: Path, **changes: int) -> Path:
    """The tiny model, perhaps of other sizes, with larger weights: random ones as initialised repeat one token for ever."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(source, out)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, **changes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(6)
    for file in out.glob("model*"):
        file.unlink()
    model.save_pretrained(out)
    return out


def adapter(base: Path, out: Path, seed: int, rank: int = 4) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", base_model_name_or_path=str(base)
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).save_pretrained(out)
    return out


def greedy(base: Path, prompt: tuple[int, ...], num: int, lora: Path | None = None) -> list[int]:
    """transformers' own tokens."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = model if lora is None else PeftModel.from_pretrained(model, lora)
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=num, min_new_tokens=num, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


@dataclass(frozen=True)
class Running:
    """An engine with the directory of its model. Each test has an event loop of its own, as several replicas' threads would."""

    engine: Engine
    model: Path

    def run(self, scenario: Callable[[], Any]) -> Any:
        return asyncio.run(scenario())


@pytest.fixture(scope="module")
def vllm(ray_cluster, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    model = lively(tiny_llama, tmp_path_factory.mktemp("lively") / "llama")
    engine = start(ray_cluster, model, "lively-llama", max_adapters=2, max_adapter_rank=8)
    yield Running(engine, model)
    asyncio.run(engine.stop())


def start(ray_cluster, model: Path, name: str, *, settings: dict[str, Any] | None = None, **vllm: Any) -> Engine:
    from r1ray.engine.create import create_engine
    from r1ray.model.importer import import_model
    from r1ray.registry import Registry

    registry = Registry(ray_cluster.settings)
    artifact: Artifact = import_model(str(model), name=name, registry=registry)
    settings = {"num_slots": 4, "max_waiting": 4, "prefill_chunk": 64, "dtype": "float32", "stage_cpus": 0.1, **(settings or {})}
    engine = create_engine(artifact, EngineConfig.model_validate({"type": "vllm", "vllm": {"eager": True, **vllm}, **settings}), registry)
    asyncio.run(engine.start())
    return engine


def request(id: str, prompt: tuple[int, ...] = PROMPT, *, num: int = 12, temperature: float = 0, **rest: Any) -> GenerationRequest:
    rest.setdefault("ignore_eos", True)
    sampling = Sampling(temperature=temperature, max_tokens=num, top_p=1, seed=rest.pop("seed", None))
    return GenerationRequest(id=id, prompt_ids=prompt, sampling=sampling, **rest)


async def collect(engine: Engine, wanted: GenerationRequest) -> list[TokenChunk]:
    async with aclosing(engine.generate(wanted)) as chunks:
        return [chunk async for chunk in chunks]


async def tokens(engine: Engine, wanted: GenerationRequest) -> list[int]:
    return [token for chunk in await collect(engine, wanted) for token in chunk.token_ids]


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def test_greedy_tokens_of_streams_in_one_batch_are_transformers_own(vllm: Running) -> None:
    prompts = [PROMPT, tuple(range(100, 300)), (21,), tuple(range(400, 410)), PROMPT[:7], tuple(range(60, 200, 3))]

    async def scenario() -> list[list[int]]:
        return await asyncio.gather(*(tokens(vllm.engine, request(str(n), prompt, num=16)) for n, prompt in enumerate(prompts)))

    assert vllm.run(scenario) == [greedy(vllm.model, prompt, 16) for prompt in prompts]


def test_a_stream_comes_in_chunks_and_counts_what_the_cache_had(vllm: Running) -> None:
    prompt = tuple(range(20, 320))

    async def scenario() -> tuple[list[TokenChunk], list[TokenChunk], list[TokenChunk]]:
        first = await collect(vllm.engine, request("first", prompt))
        other = await collect(vllm.engine, request("other", prompt, cache_salt="a tenant's own"))
        return first, await collect(vllm.engine, request("again", prompt)), other

    first, again, other = vllm.run(scenario)
    assert len(first) > 1
    assert [chunk.finish_reason for chunk in first] == [None] * (len(first) - 1) + ["length"]
    assert {chunk.num_prompt_tokens for chunk in first} == {300}
    assert (first[-1].num_cached_tokens, other[-1].num_cached_tokens) == (0, 0)
    assert again[-1].num_cached_tokens >= 128
    assert [chunk.token_ids for chunk in first] == [chunk.token_ids for chunk in again]


def test_a_seed_gives_the_same_tokens_in_any_company(vllm: Running) -> None:
    async def scenario() -> tuple[list[int], list[list[int]]]:
        alone = await tokens(vllm.engine, request("alone", temperature=1, seed=3))
        seeds = enumerate((3, 4, 3, 5))
        return alone, await asyncio.gather(*(tokens(vllm.engine, request(str(n), temperature=1, seed=seed)) for n, seed in seeds))

    alone, together = vllm.run(scenario)
    assert alone == together[0] == together[2]
    assert together[1] != alone != together[3]


def test_stop_ids_end_an_answer_and_min_tokens_put_that_off(vllm: Running) -> None:
    expected = greedy(vllm.model, PROMPT, 12)
    stop = next(token for token in expected[2:] if token not in expected[:2])
    at = expected.index(stop)

    async def scenario() -> tuple[list[TokenChunk], list[TokenChunk], list[TokenChunk], list[int]]:
        stopping = {"stop_token_ids": (stop,), "ignore_eos": False}
        return (
            await collect(vllm.engine, request("stops", **stopping)),
            await collect(vllm.engine, request("later", min_tokens=at + 2, **stopping)),
            await collect(vllm.engine, request("biased", logit_bias=((77, 100.0),))),
            await tokens(vllm.engine, request("kept", keep_stop=True, **stopping)),
        )

    stops, later, biased, kept = vllm.run(scenario)
    assert kept == expected[: at + 1]
    assert [token for chunk in stops for token in chunk.token_ids] == expected[:at]
    assert stops[-1].finish_reason == "stop"
    assert sum(len(chunk.token_ids) for chunk in later) >= at + 2
    assert {token for chunk in biased for token in chunk.token_ids} == {77}


def test_logprobs_of_answer_and_prompt_are_the_models(vllm: Running) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    chunks = vllm.run(lambda: collect(vllm.engine, request("scored", num=5, num_logprobs=3, prompt_logprobs=True, num_prompt_logprobs=2)))
    answer = [token for chunk in chunks for token in chunk.token_ids]
    model: Any = AutoModelForCausalLM.from_pretrained(vllm.model, dtype=torch.float32)
    ids = (*PROMPT, *answer)
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    of_prompt = [float(logprobs[place, ids[place + 1]]) for place in range(len(PROMPT) - 1)]
    assert chunks[0].prompt_logprobs == pytest.approx(of_prompt, abs=1e-3)
    likeliest = [logprobs[place].topk(2) for place in range(len(PROMPT) - 1)]
    assert [[token for token, _ in top] for top in chunks[0].prompt_top] == [best.tolist() for _, best in likeliest]
    found = [entry for chunk in chunks for entry in chunk.logprobs]
    assert [entry.token for entry in found] == answer
    for place, entry in enumerate(found, start=len(PROMPT) - 1):
        values, best = logprobs[place].topk(3)
        assert [token for token, _ in entry.top] == best.tolist()
        assert [entry.logprob, *(value for _, value in entry.top)] == pytest.approx([float(values[0]), *values.tolist()], abs=1e-3)
    assert all(math.isfinite(value) for value in of_prompt)


def test_an_aborted_and_a_closed_stream_free_their_slots(vllm: Running) -> None:
    engine = vllm.engine

    async def scenario() -> list[TokenChunk]:
        aborted = asyncio.create_task(collect(engine, request("aborted", num=400)))
        async with aclosing(engine.generate(request("closed", num=400))) as chunks:
            await anext(chunks)
            await until(lambda: engine.stats().num_free_slots == 2)
        await engine.abort("aborted")
        await engine.abort("unknown")
        last = await aborted
        await until(lambda: engine.stats().num_free_slots == 4)
        assert await tokens(engine, request("after")) == greedy(vllm.model, PROMPT, 12)
        return last

    before = engine.stats().num_aborted
    last = vllm.run(scenario)
    assert last[-1].finish_reason == "abort"
    assert engine.stats().num_aborted == before + 2
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_a_bad_request_is_an_error_for_itself_alone(vllm: Running) -> None:
    engine = vllm.engine
    bad: list[tuple[GenerationRequest, type[Exception], str]] = [
        (request("empty", ()), InvalidRequest, "empty prompt"),
        (request("long", (5,) * engine.context_length), PromptTooLong, f"{engine.context_length} tokens"),
        (request("outside", (5, 99999)), InvalidRequest, "99999"),
        (request("stops", stop_token_ids=(99999,)), InvalidRequest, "stops at token id 99999"),
        (request("running"), InvalidRequest, "running already"),
        (request("masked", mask=lambda _drawn: None), InvalidRequest, "mask"),
        (request("adapted", adapter="x"), UnknownAdapter, "'x'"),
    ]

    async def scenario() -> list[int]:
        good = asyncio.create_task(tokens(engine, request("running", num=100)))
        await until(lambda: engine.stats().num_running == 1)
        for wanted, kind, text in bad:
            with pytest.raises(kind, match=text):
                await tokens(engine, wanted)
        return await good

    assert len(vllm.run(scenario)) == 100


def test_a_request_over_its_time_ends_with_an_error_and_frees_its_slot(vllm: Running) -> None:
    engine = vllm.engine

    async def scenario() -> list[int]:
        with pytest.raises(DeadlineExceeded, match=r"late was not done within its 0\.2 s"):
            await tokens(engine, request("late", num=400, timeout_s=0.2))
        assert engine.stats().num_free_slots == 4
        return await tokens(engine, request("after", timeout_s=60))

    failed = engine.stats().num_failed
    assert vllm.run(scenario) == greedy(vllm.model, PROMPT, 12)
    assert engine.stats().num_failed == failed + 1


def test_one_request_too_many_is_refused(vllm: Running) -> None:
    engine = vllm.engine

    async def scenario() -> list[list[int]]:
        many = [asyncio.create_task(tokens(engine, request(str(number), num=40))) for number in range(8)]
        await until(lambda: engine.stats().num_free_slots == 0 and engine.stats().num_running == 4)
        assert engine.stats().num_waiting == 4
        with pytest.raises(QueueFull, match="4 requests wait"):
            await tokens(engine, request("one more"))
        return await asyncio.gather(*many)

    assert {len(found) for found in vllm.run(scenario)} == {40}


def test_requests_of_different_adapters_run_together(vllm: Running, tmp_path: Path) -> None:
    engine = vllm.engine
    paths = {name: adapter(vllm.model, tmp_path / name, seed) for seed, name in enumerate(("one", "two"), start=1)}
    large = adapter(vllm.model, tmp_path / "large", 3, rank=16)
    names = [None, "one", None, "two"]
    expected = {name: greedy(vllm.model, PROMPT, 12, paths.get(name or "")) for name in names}
    assert len({tuple(found) for found in expected.values()}) == 3

    async def scenario() -> tuple[list[list[int]], list[int]]:
        for name, path in paths.items():
            await engine.load_adapter(name, path)
        got = await asyncio.gather(*(tokens(engine, request(str(n), adapter=name)) for n, name in enumerate(names)))
        long = asyncio.create_task(tokens(engine, request("long", num=60, adapter="one")))
        await until(lambda: engine.stats().num_running == 1)
        await engine.load_adapter("one", paths["two"])
        replaced = await tokens(engine, request("replaced", adapter="one"))
        with pytest.raises(AdapterMismatch, match=r"rank 16, the limit is 8.*max_adapter_rank"):
            await engine.load_adapter("large", large)
        with pytest.raises(AdapterMismatch, match="nowhere"):
            await engine.load_adapter("broken", tmp_path / "nowhere")
        assert (await long)[:12] == expected["one"]
        leaving = asyncio.create_task(tokens(engine, request("leaving", num=60, adapter="two")))
        await until(lambda: engine.stats().num_running == 1)
        unloading = asyncio.create_task(engine.unload_adapter("two"))
        await asyncio.sleep(0)
        for refused in (tokens(engine, request("late", adapter="two")), engine.unload_adapter("two")):
            with pytest.raises(UnknownAdapter, match=r"loaded: \['one'\]"):
                await refused
        assert not unloading.done()
        assert (await leaving)[:12] == expected["two"]
        await unloading
        await engine.load_adapter("three", paths["one"])  # in the place that is free again
        assert await tokens(engine, request("another", adapter="three")) == expected["one"]
        return got, replaced

    got, replaced = vllm.run(scenario)
    assert got == [expected[name] for name in names]
    assert replaced == expected["two"]


def test_an_adapter_of_another_base_is_refused_and_the_streams_run_on(vllm: Running, tiny_deepseek_v3: Path, tmp_path: Path) -> None:
    foreign = adapter(tiny_deepseek_v3, tmp_path / "foreign", 1)

    async def scenario() -> list[int]:
        with pytest.raises(AdapterMismatch, match="trained on this base"):
            await vllm.engine.load_adapter("foreign", foreign)
        return await tokens(vllm.engine, request("after"))

    assert vllm.run(scenario) == greedy(vllm.model, PROMPT, 12)


def test_stopping_lets_running_streams_end_and_refuses_new_ones(vllm: Running) -> None:
    """The last test of this engine."""
    engine = vllm.engine

    async def scenario() -> list[int]:
        running = asyncio.create_task(tokens(engine, request("running", num=60)))
        await until(lambda: engine.stats().num_running == 1)
        stopping = asyncio.create_task(engine.stop(drain_s=30))
        await until(lambda: engine.stats().state == "draining")
        with pytest.raises(EngineStopped, match="draining"):
            await tokens(engine, request("late"))
        await stopping
        return await running

    assert len(vllm.run(scenario)) == 60
    assert engine.stats().state == "stopped"


def test_tensor_parallel_workers_answer_alike_and_their_death_is_an_error_for_every_stream_at_once(
    ray_cluster, tiny_qwen2: Path, tmp_path: Path
) -> None:
    import psutil

    model = lively(tiny_qwen2, tmp_path / "qwen2", hidden_size=128)  # vLLM's Qwen2 takes no head size apart from this
    engine = start(ray_cluster, model, "lively-qwen2", settings={"tensor_parallel": 2})

    async def scenario() -> tuple[list[int], list[Any], float]:
        answer = await tokens(engine, request("answer"))
        running = [asyncio.create_task(tokens(engine, request(str(number), num=400))) for number in range(4)]
        await until(lambda: engine.stats().num_running == 4)
        below = psutil.Process(engine.pid).children(recursive=True)
        assert len(below) >= 3, "the engine process and a worker per rank"
        begin = time.monotonic()
        below[-1].kill()
        seen = await asyncio.gather(*running, return_exceptions=True)
        took = time.monotonic() - begin
        with pytest.raises(EngineStopped, match="failed"):
            await tokens(engine, request("late"))
        return answer, seen, took

    try:
        answer, seen, took = asyncio.run(scenario())
        assert answer == greedy(model, PROMPT, 12)
        assert all(isinstance(outcome, EngineStopped) and "vLLM is gone" in str(outcome) for outcome in seen), seen
        assert engine.stats().state == "failed"
        assert took < 10
    finally:
        asyncio.run(engine.stop())


def test_pipeline_stages_answer_alike(ray_cluster, tiny_llama: Path, tmp_path: Path) -> None:
    model = lively(tiny_llama, tmp_path / "llama")
    with pytest.raises(InvalidValue, match=r"eager=false"):
        start(ray_cluster, model, "staged-llama", settings={"stages": 2})
    engine = start(ray_cluster, model, "staged-llama", settings={"stages": 2}, eager=False)
    try:
        assert asyncio.run(tokens(engine, request("answer"))) == greedy(model, PROMPT, 12)
    finally:
        asyncio.run(engine.stop())


def vllm_pids() -> set[int]:
    from ray.util.state import list_actors

    return {actor.pid for actor in list_actors(filters=[("state", "=", "ALIVE"), ("class_name", "=", "VllmWorker")])}


def test_one_line_of_yaml_serves_a_model_on_vllm(ray_cluster, tiny_llama: Path, tmp_path: Path) -> None:
    """Behind real Serve, in a replica's placement group, an adapter's version on its base; killed while idle, the replica is rebuilt."""
    import psutil
    import ray
    from ray import serve
    from transformers import AutoTokenizer

    from r1ray.model.importer import import_model
    from r1ray.registry import Registry
    from r1ray.serve.app import build
    from r1ray.serve.config import AppArgs

    registry = Registry(ray_cluster.settings)
    base = import_model(str(tiny_llama), name="vllm-base", registry=registry)
    own = adapter(base.path, tmp_path / "own", 5)
    import_model(str(own), name="vllm-own", registry=registry, base=base.ref)
    engine = {"type": "vllm", "num_slots": 4, "dtype": "float32", "stage_cpus": 0.5, "vllm": {"eager": True}}
    model = {"id": "tiny", "ref": "vllm-own@1", "engine": engine, "placement": {"num_cpus": 0.2}}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    others = vllm_pids()
    try:
        serve.run(build(AppArgs.model_validate({"models": [model]})), name="vllm", route_prefix="/")
        body = {"model": "tiny", "prompt": list(PROMPT), "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        url = f"http://127.0.0.1:{port}/v1/completions"
        answer = httpx.post(url, json=body, timeout=120).json()
        assert answer["usage"] == answer["usage"] | {"prompt_tokens": len(PROMPT), "completion_tokens": 8}
        expected = AutoTokenizer.from_pretrained(tiny_llama).decode(greedy(base.path, PROMPT, 8, own), skip_special_tokens=True)
        assert greedy(base.path, PROMPT, 8) != greedy(base.path, PROMPT, 8, own)
        assert answer["choices"][0]["text"] == expected
        groups = [group for group in ray.util.placement_group_table().values() if group["state"] == "CREATED"]
        assert [list(group["bundles"].values()) for group in groups] == [[{"CPU": 0.2}, {"CPU": 0.5}]]
        (pid,) = vllm_pids() - others
        below = psutil.Process(pid).children(recursive=True)
        psutil.Process(pid).kill()
        deadline = time.monotonic() + 150
        while not vllm_pids() - others - {pid} or httpx.post(url, json=body, timeout=120).status_code != 200:
            assert time.monotonic() < deadline, "the replica was not rebuilt"
            time.sleep(0.5)
        assert httpx.post(url, json=body, timeout=120).json()["choices"][0]["text"] == expected
        assert psutil.wait_procs(below, timeout=20)[1] == [], "vLLM's processes outlived their actor"
    finally:
        serve.shutdown()


def test_a_sampling_sweep_measures_on_vllm(ray_cluster, tiny_llama: Path, tmp_path: Path) -> None:
    """vLLM's actor finds its bundle in the trial's placement group."""
    from r1ray.config import load_config
    from r1ray.data.demo import write_demo
    from r1ray.model.importer import import_model
    from r1ray.registry import Registry
    from r1ray.tune.config import SamplingSweepConfig
    from r1ray.tune.sampling import sweep_sampling

    model = import_model(str(tiny_llama), name="swept-on-vllm", registry=Registry(ray_cluster.settings)).ref
    fixed = [f"model={model}", f"data.path={write_demo(tmp_path).test}", "limit=2", "base.max_tokens=8", "quality=[rouge_l]"]
    engine = ["engine.type=vllm", "engine.vllm.eager=true", "engine.dtype=float32", "engine.stage_cpus=0.5", "cpus_per_actor=0.5"]
    overrides = [*fixed, *engine, "engine.num_slots=2", "num_samples=1", "candidates=[greedy]", "attach=false"]
    found = sweep_sampling(load_config(SamplingSweepConfig, None, overrides), ray_cluster.settings)
    assert [(setting.name, setting.is_chosen) for setting in found] == [("greedy", True)]
