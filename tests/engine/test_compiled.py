"""Compiled decoding passes give the eager ones' tokens, write where their streams may, and are not taken where they cannot be."""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from r1ray.engine.backend import BLOCK_SIZE, Piece
from r1ray.engine.batching import BatchingEngine
from r1ray.engine.compiled import DecodeShapes, inductor, is_wanted, packed_rows
from r1ray.engine.config import EngineConfig
from r1ray.engine.memory import CacheWish
from r1ray.engine.paged import TransformersBackend
from r1ray.engine.soft import SoftPrompted
from r1ray.model.soft import SoftPrompt
from tests.engine.conftest import adapter, lively, prompts, tokens, wanted

WISH = CacheWish(num_slots=5, context=256)


def as_captured(module: torch.nn.Module, _device: torch.device) -> Any:
    """The graph of torch.export without Inductor, which takes seconds."""
    return module


def compiled(model: Any, *, num_blocks: int = 64, exact: bool = True, wish: CacheWish = WISH, compiler: Any = as_captured) -> Any:
    backend = TransformersBackend(model, num_blocks=num_blocks)
    backend.compile_decode(wish, exact=exact, compiler=compiler)
    assert backend._compiled is not None
    backend.taken = []
    usual = backend._compiled.logits

    def counted(pieces: Any) -> Any:
        found = usual(pieces)
        backend.taken.append(found is not None)
        return found

    backend._compiled.logits = counted
    return backend


@asynccontextmanager
async def running(backend: Any, *, context: int = 512, **settings: Any) -> Any:
    engine = BatchingEngine(backend, EngineConfig(num_threads=1, dtype="float32", **settings), context_length=context)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


def test_passes_are_padded_to_doubles_within_what_may_be_gathered() -> None:
    shapes = DecodeShapes(num_slots=6, context=1000, most_positions=6 * 16 * BLOCK_SIZE, exact=False)
    assert shapes.rows == (1, 2, 4, 6)
    assert shapes.blocks == (4, 8, 16, 32)
    assert shapes.fit(3, 5) == (4, 8)
    assert shapes.fit(6, 16) == (6, 16)
    assert shapes.fit(5, 17) is None, "six rows of 32 blocks are too much"
    assert shapes.fit(2, 17) == (2, 32)
    assert shapes.fit(7, 1) is None
    assert shapes.fit(1, 33) is None
    warmed = list(shapes)
    assert warmed[0] == (6, 16)
    assert len(set(warmed)) == len(warmed) == 2 * 4 + 2 * 3
    assert {shapes.fit(rows, blocks) for rows in range(1, 7) for blocks in range(1, 33)} - {None} == set(warmed)


def test_a_graph_for_any_shape_pads_nothing() -> None:
    shapes = DecodeShapes(num_slots=6, context=1000, most_positions=6 * 16 * BLOCK_SIZE, exact=True)
    assert shapes.fit(3, 5) == (3, 5)
    assert shapes.fit(3, 1) == (3, 4)
    assert shapes.fit(6, 17) is None
    assert shapes.fit(7, 1) is None
    assert list(shapes) == [(6, 16), (1, 32)], "of both graphs"


def test_padded_rows_write_into_the_block_that_nobody_owns() -> None:
    pieces = [Piece(ids=[7], start=40, table=[3, 5], num_logits=1), Piece(ids=[9], start=2, table=[4], num_logits=1)]
    assert packed_rows(pieces, (4, 3), 63).tolist() == [[7, 40, 3, 5, 3], [9, 2, 4, 4, 4], [0, 0, 63, 63, 63], [0, 0, 63, 63, 63]]


@pytest.mark.parametrize(
    ("name", "exact"),
    [("tiny_llama", True), ("tiny_llama", False), ("tiny_qwen2", True), ("tiny_qwen3", False), ("tiny_deepseek_v3", False)],
)
def test_greedy_tokens_equal_transformers_generate(name: str, exact: bool, request: pytest.FixtureRequest, reference: Any) -> None:
    """Streams that come and go, prompts in pieces beside them, a shared beginning, and a cache that some must leave for a while."""
    family = request.getfixturevalue(name)
    rng = random.Random(name)
    shared = tuple(range(20, 90))
    asked = [*prompts(5), (*shared, 5, 6), (*shared, 7), (*shared, 8), (*shared, 9)]
    lengths = [rng.randint(8, 40) for _ in asked]
    model = lively(family)
    eos = model.config.eos_token_id
    banned = () if eos is None else ((eos, -1e6),)  # as transformers does until so many tokens have come
    backend = compiled(model, num_blocks=5, exact=exact)

    async def one(engine: Any, number: int) -> list[int]:
        return await tokens(engine, wanted(str(number), asked[number], max_tokens=lengths[number], logit_bias=banned))

    async def scenario() -> tuple[list[list[int]], Any]:
        async with running(backend, num_slots=4, prefill_chunk=16) as engine:
            together = await asyncio.gather(*(one(engine, number) for number in range(len(asked) - 2)))
            return [*together, await one(engine, len(asked) - 2), await one(engine, len(asked) - 1)], engine.stats()

    found, stats = asyncio.run(scenario())
    assert found == [reference(family, prompt, 40)[:length] for prompt, length in zip(asked, lengths, strict=True)]
    assert stats.num_preempted > 0 and stats.num_cached_tokens > 0
    assert sum(backend.taken) > 30, "most passes are compiled"
    assert not all(backend.taken), "prompts are not"


def test_a_pass_changes_no_block_but_its_streams_own_ones(tiny_llama: Path) -> None:
    backend = compiled(lively(tiny_llama), num_blocks=8, exact=False)
    cache = backend._cache
    assert all(not tensor.any() for tensor in cache.tensors()), "the warm-up leaves nothing behind"
    for tensor in cache.tensors():
        tensor.fill_(0.5)
    backend.forward([Piece(ids=[5 + i], start=33 + i, table=[i, 7 - i], num_logits=1) for i in range(3)])
    assert backend.taken == [True]
    for tensor in cache.tensors():
        changed = {(int(block), int(offset)) for block, offset, *_ in (tensor != 0.5).nonzero()}
        assert changed == {(7, 1), (6, 2), (5, 3), (8, 0)}


def test_only_the_wanted_logits_come_back(tiny_llama: Path) -> None:
    backend = compiled(lively(tiny_llama))
    pieces = [Piece(ids=[5 + i], start=0, table=[i], num_logits=i % 2) for i in range(5)]
    right = TransformersBackend(lively(tiny_llama), num_blocks=8).forward(pieces)
    found = backend.forward(pieces)
    assert found.shape == right.shape == (2, 640)
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)
    assert backend.taken == [True]


def test_what_was_not_warmed_is_computed_eagerly(tiny_llama: Path, reference: Any) -> None:
    """Contexts beyond the wish, and more streams."""
    backend = compiled(lively(tiny_llama), wish=CacheWish(num_slots=2, context=128))
    asked = [(tuple(range(20, 120)), 40), *((prompt, 8) for prompt in prompts(2))]

    async def scenario() -> list[list[int]]:
        async with running(backend, num_slots=3) as engine:
            return await asyncio.gather(*(tokens(engine, wanted(str(i), prompt, max_tokens=num)) for i, (prompt, num) in enumerate(asked)))

    assert asyncio.run(scenario()) == [reference(tiny_llama, prompt, num) for prompt, num in asked]
    assert not any(backend.taken[:8]), "three streams"
    assert backend.taken[-1] is False, "more than 128 positions"
    assert sum(backend.taken) >= 15, "one stream within them"


def test_adapters_are_computed_eagerly_and_leave_the_graph_as_it_was(tiny_qwen2: Path, reference: Any, tmp_path: Path) -> None:
    path = adapter(tiny_qwen2, tmp_path / "adapter", seed=1)
    backend = compiled(lively(tiny_qwen2))
    prompt = tuple(range(20, 50))

    async def scenario() -> list[list[int]]:
        async with running(backend, num_slots=2) as engine:
            await engine.load_adapter("a", path)
            alone = await tokens(engine, wanted("plain", prompt))
            assert backend.taken[1:] == [True] * 11, "also beside a loaded adapter"
            both = await asyncio.gather(tokens(engine, wanted("again", prompt)), tokens(engine, wanted("adapted", prompt, adapter="a")))
            await engine.unload_adapter("a")
            return [alone, *both, await tokens(engine, wanted("after", prompt))]

    plain = reference(tiny_qwen2, prompt, 12)
    assert asyncio.run(scenario()) == [plain, plain, reference(tiny_qwen2, prompt, 12, path), plain]


def test_a_soft_prompt_stands_before_compiled_streams_too(tiny_llama: Path) -> None:
    torch.manual_seed(0)
    soft = SoftPrompt(kind="prompt", values=torch.randn(BLOCK_SIZE, 64))
    prompt = tuple(range(20, 50))

    async def answer(backend: Any) -> list[int]:
        async with running(SoftPrompted(backend, soft), num_slots=2, context=400) as engine:
            return await tokens(engine, wanted("a", prompt, max_tokens=30))

    backend = compiled(lively(tiny_llama))
    assert asyncio.run(answer(backend)) == asyncio.run(answer(TransformersBackend(lively(tiny_llama), num_blocks=64)))
    assert sum(backend.taken) == 29


def test_a_model_that_cannot_be_compiled_stays_eager_and_says_why(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    def no_compiler(*_: Any) -> Any:
        raise RuntimeError("No working C++ compiler found.\nand much more")

    backend = TransformersBackend(lively(tiny_llama), num_blocks=8)
    backend.compile_decode(WISH, compiler=no_compiler)
    assert "compiled decode: none, LlamaForCausalLM stays eager: RuntimeError: No working C++ compiler found." in caplog.messages
    assert backend.forward([Piece(ids=[5], start=0, table=[3], num_logits=1)]).shape == (1, 640)
    assert {tensor.shape[0] for tensor in backend._cache.tensors()} == {8}


def test_a_graph_that_computes_something_else_is_not_used(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    backend = TransformersBackend(lively(tiny_llama), num_blocks=8)
    backend.compile_decode(WISH, compiler=lambda module, _device: lambda packed: module(packed) * 1.01)
    assert "stays eager: ArithmeticError: its logits for 5 rows of 8 blocks are" in caplog.text
    assert backend._compiled is None


@pytest.mark.parametrize(("setting", "device", "expected"), [("auto", "cpu", False), ("auto", "cuda", True), (True, "cpu", True)])
def test_gpus_compile_by_themselves_and_cpus_when_told(setting: Any, device: str, expected: bool) -> None:
    assert is_wanted(setting, device) is expected
    assert is_wanted(False, device) is False


@pytest.mark.parametrize("setting", [{"type": "vllm"}, {"type": "onnx"}])
def test_engines_that_compile_nothing_refuse_the_setting(setting: Any) -> None:
    with pytest.raises(ValueError, match="compile=True"):
        EngineConfig(compile=True, **setting)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles with g++")
def test_inductor_compiles_it(tiny_llama: Path, reference: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    backend = compiled(lively(tiny_llama), compiler=inductor, wish=CacheWish(num_slots=3, context=128))
    asked = prompts(3)

    async def scenario() -> list[list[int]]:
        async with running(backend, num_slots=3) as engine:
            return await asyncio.gather(*(tokens(engine, wanted(str(i), prompt, max_tokens=12)) for i, prompt in enumerate(asked)))

    assert asyncio.run(scenario()) == [reference(tiny_llama, prompt, 12) for prompt in asked]
    assert sum(backend.taken) >= 9
    assert "shapes are warm after" in caplog.text
