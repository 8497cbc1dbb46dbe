"""A model split inside its layers generates what the whole one does, each rank with its own part; the ranks run in threads here."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Phi3Config

from r1ray.engine.backend import BLOCK_SIZE, Piece
from r1ray.engine.batching import BatchingEngine
from r1ray.engine.config import EngineConfig
from r1ray.engine.memory import CacheWish, Room
from r1ray.engine.paged import TransformersBackend, kv_bytes_per_token
from r1ray.engine.pipeline import Host, PipelineBackend, Worker
from r1ray.engine.stage import StageOrder, orders_by_rank
from r1ray.engine.tensor import check_split
from r1ray.errors import AdapterMismatch, EngineStopped, InvalidValue, UnsupportedModel
from tests.engine.conftest import engine_of, prompts, tokens, wanted

SHAPES: dict[str, dict[str, Any]] = {
    "tiny_llama": {"attention_bias": True, "mlp_bias": True},
    "tiny_qwen2": {},
    "tiny_deepseek_v3": {},
}


class Threads:
    """What runs the ranks but the first, in this process."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.errors: list[Exception] = []

    def start(self, orders: Sequence[StageOrder]) -> None:
        self._workers = [Worker(order) for order in orders]

    def wait(self) -> list[Host]:
        return [Host(node="here", address="127.0.0.1", num_cores=8)] * (1 + len(self._workers))

    def compute(self, address: str, port: int, hidden: int) -> None:
        self._threads = [threading.Thread(target=self._run, args=(worker, address, port, hidden), daemon=True) for worker in self._workers]
        for thread in self._threads:
            thread.start()

    def _run(self, worker: Worker, address: str, port: int, hidden: int) -> None:
        try:
            worker.compute(address, port, hidden)
        except (EngineStopped, RuntimeError) as error:
            self.errors.append(error)
        self.ended.set()

    def wait_for_end(self) -> None:
        self.ended.wait()

    def kill(self) -> None:
        for thread in self._threads:
            thread.join(10)


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`lively(directory, **changes)`: a model of that shape whose tokens vary and whose biases are not nothing."""

    def make(directory: Path, **changes: Any) -> Path:
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory, **changes), dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
                elif parameter.dim() >= 2 and ".gate." not in name:
                    parameter.mul_(6)
        model.save_pretrained(out := tmp_path_factory.mktemp("lively"))
        return out

    return make


def split_backend(directory: Path, num_stages: int, num_tensor: int, precision: str = "float32") -> PipelineBackend:
    config = AutoConfig.from_pretrained(directory)
    order = StageOrder(
        directory=directory,
        adapter=None,
        layers=(0, 2),
        precision=precision,
        native=False,
        wish=CacheWish(num_slots=4, context=512),
        num_threads=1,
    )
    ranges = [(0, 2)] if num_stages == 1 else [(0, 1), (1, 2)]
    return PipelineBackend(orders_by_rank(order, ranges, num_tensor), hidden=config.hidden_size, workers=Threads())


async def answers(engine: BatchingEngine) -> list[list[int]]:
    await engine.start()
    try:
        return await asyncio.gather(*(tokens(engine, wanted(str(i), prompt, max_tokens=10)) for i, prompt in enumerate(prompts(3, seed=3))))
    finally:
        await engine.stop()


@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("family", SHAPES)
def test_two_tensor_ranks_generate_what_one_process_does(family: str, num_stages: int, request: pytest.FixtureRequest, lively: Any) -> None:
    directory = lively(request.getfixturevalue(family), **SHAPES[family])
    settings = {"num_slots": 4, "prefill_chunk": 16}
    whole = asyncio.run(answers(engine_of(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), **settings)))
    backend = split_backend(directory, num_stages, 2)
    config = EngineConfig(dtype="float32", num_threads=1, **settings)  # type: ignore[arg-type]
    assert asyncio.run(answers(BatchingEngine(backend, config, context_length=512))) == whole
    assert len({token for answer in whole for token in answer}) > 10, "varied enough to tell models apart"


def logits_of(backend: Any) -> torch.Tensor:
    sent = [Piece(ids=[5], start=0, table=[3], num_logits=1), Piece(ids=list(range(40)), start=0, table=[2, 0], num_logits=2)]
    with torch.inference_mode():
        return backend.forward(sent)


def test_a_rank_holds_its_own_key_heads_and_its_part_of_the_weights(tiny_llama: Path) -> None:
    backend = split_backend(tiny_llama, 1, 2)
    logits_of(backend)
    layers: Any = backend._layers
    assert {cached.shape[2] for cached in (*layers._cache.keys.values(), *layers._cache.values.values())} == {1}, "of two key heads"
    config = AutoConfig.from_pretrained(tiny_llama)
    assert layers._cache.bytes_per_block * 2 == BLOCK_SIZE * kv_bytes_per_token(config, torch.float32)
    shapes = {name.removeprefix("model.layers.1."): tuple(tensor.shape) for name, tensor in layers._model.state_dict().items()}
    assert shapes["self_attn.k_proj.weight"] == (32, 64)
    assert shapes["self_attn.o_proj.weight"] == (64, 64)
    assert shapes["mlp.down_proj.weight"] == (64, 64)
    assert shapes["input_layernorm.weight"] == (64,)
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == (320, 64)
    backend.close()


def test_every_rank_of_a_latent_model_has_all_latents_and_its_part_of_each_expert(tiny_deepseek_v3: Path) -> None:
    backend = split_backend(tiny_deepseek_v3, 1, 2)
    logits_of(backend)
    layers: Any = backend._layers
    assert layers._cache.keys[0].shape[2:] == (1, 16 + 8)
    assert not layers._cache.values, "latents are keys and values at once"
    config = AutoConfig.from_pretrained(tiny_deepseek_v3)
    assert layers._cache.bytes_per_block == BLOCK_SIZE * kv_bytes_per_token(config, torch.float32)
    shapes = {name.removeprefix("model.layers.1."): tuple(tensor.shape) for name, tensor in layers._model.state_dict().items()}
    assert shapes["mlp.experts.gate_up_proj"] == (4, 2 * 16, 64)
    assert shapes["mlp.experts.down_proj"] == (4, 64, 16)
    assert shapes["mlp.shared_experts.up_proj.weight"] == (16, 64)
    assert shapes["mlp.gate.weight"] == (4, 64)
    assert shapes["self_attn.kv_a_proj_with_mqa.weight"] == (24, 64)
    backend.close()


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen2"])
def test_embedding_and_head_stay_whole_where_the_vocabulary_does_not_divide(
    family: str, request: pytest.FixtureRequest, lively: Any
) -> None:
    directory = lively(request.getfixturevalue(family), **SHAPES[family], vocab_size=641)
    backend = split_backend(directory, 1, 2)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    torch.testing.assert_close(logits_of(backend), logits_of(TransformersBackend(model, num_blocks=4)), rtol=1e-4, atol=1e-4)
    backend.close()


def test_ranks_add_up_in_bfloat16_too(tiny_qwen2: Path) -> None:
    backend = split_backend(tiny_qwen2, 1, 2, "bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32)
    found, right = logits_of(backend), logits_of(TransformersBackend(model, num_blocks=4))
    assert found.dtype == torch.bfloat16
    assert torch.cosine_similarity(found.float(), right).min() > 0.999
    backend.close()


def test_adapters_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    backend = split_backend(tiny_llama, 1, 2)
    assert "adapters" in backend.lacks
    with pytest.raises(AdapterMismatch, match="split over 2 processes is served merged"):
        backend.load_adapter("a", tmp_path)
    backend.close()


def test_a_degree_that_does_not_divide_the_model_is_refused_with_those_that_do(tiny_llama: Path, tiny_deepseek_v3: Path) -> None:
    for directory in (tiny_llama, tiny_deepseek_v3):
        check_split(AutoConfig.from_pretrained(directory), 2)
    with pytest.raises(InvalidValue, match=r"tensor_parallel=4 does not divide this model's num_key_value_heads=2\. Set one of 1, 2"):
        check_split(AutoConfig.from_pretrained(tiny_llama), 4)
    with pytest.raises(InvalidValue, match="num_attention_heads=4, intermediate_size=128, moe_intermediate_size=32"):
        check_split(AutoConfig.from_pretrained(tiny_deepseek_v3), 3)


def test_an_architecture_whose_plan_gathers_inside_a_layer_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"type phi3 cannot be split .* colwise_gather_output"):
        check_split(Phi3Config(), 2)


@pytest.mark.parametrize("setting", [{"backend": "native"}, {"dtype": "int8"}, {"dtype": "int4"}, {"type": "onnx"}, {"type": "fake"}])
def test_what_cannot_split_layers_is_an_error_of_the_settings(setting: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="tensor_parallel=2"):
        EngineConfig(tensor_parallel=2, **setting)  # type: ignore[arg-type]


@pytest.mark.parametrize(("num_stages", "num_tensor"), [(2, 1), (1, 2)])
def test_a_rank_that_fails_says_why(num_stages: int, num_tensor: int, tiny_llama: Path) -> None:
    backend = split_backend(tiny_llama, num_stages, num_tensor)
    workers: Any = backend._workers

    def full(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    workers._workers[0].layers.stage = full
    lost: list[str] = []
    backend.watch(lost.append)
    backend.submit([Piece(ids=[5], start=0, table=[3], num_logits=1)])
    assert workers.ended.wait(20)
    deadline = time.monotonic() + 5
    while not lost and time.monotonic() < deadline:
        time.sleep(0.01)
    layers = "0-0" if num_stages == 2 else "0-1"
    assert lost[0].endswith(f"of the pipeline is gone. Rank 1 (layers {layers}): OutOfMemoryError: CUDA out of memory.")


def test_ranks_that_cannot_agree_on_a_cache_fail_together(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Threads.start

    def full(_wish: CacheWish) -> Room:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    def start(threads: Threads, orders: Sequence[StageOrder]) -> None:
        whole(threads, orders)
        layers: Any = threads._workers[0].layers
        layers.room = full

    monkeypatch.setattr(Threads, "start", start)
    with pytest.raises(EngineStopped, match=r"Rank 1 \(layers 0-0\): OutOfMemoryError: CUDA out of memory"):
        split_backend(tiny_llama, 2, 1)


def test_all_ranks_have_as_many_blocks_as_the_fullest(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1ray.engine.memory.KV_SHARE", {"cpu": 0.5})
    whole = Threads.start

    def start(threads: Threads, orders: Sequence[StageOrder]) -> None:
        whole(threads, orders)
        layers: Any = threads._workers[0].layers
        found = layers.room(orders[0].wish)
        layers.room = lambda _wish: replace(found, memory="another", free_bytes=20 * found.bytes_per_block)

    monkeypatch.setattr(Threads, "start", start)
    backend = split_backend(tiny_llama, 2, 1)
    workers: Any = backend._workers
    backend.forward([Piece(ids=[5], start=0, table=[9], num_logits=1)])  # a rank that computes has its cache
    assert backend.num_blocks == workers._workers[0].num_blocks == 10
    assert {cached.shape[0] for cached in workers._workers[0].layers._cache.keys.values()} == {10}
    backend.close()
