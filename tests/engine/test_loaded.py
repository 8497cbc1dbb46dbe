"""An adapter goes when nobody uses it any more, and its name never stands for what another of that name computed."""

from __future__ import annotations

import asyncio
import gc
import weakref
from contextlib import aclosing
from pathlib import Path

import pytest

from r1ray.engine.config import EngineConfig, FakeConfig
from r1ray.engine.fake import FakeEngine
from r1ray.errors import AdapterMismatch, EngineStopped, UnknownAdapter
from tests.engine import conftest as kit

BACKENDS = pytest.mark.parametrize("backend", ["transformers", kit.native()])
PROMPT = tuple(range(5, 75))  # two full blocks and a bit


@pytest.fixture(scope="module")
def paths(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: kit.adapter(tiny_qwen2, folder / name, seed) for seed, name in enumerate(("one", "two"), start=1)}


def adapter_tensors(engine) -> weakref.WeakSet:
    """What the backend holds of adapters, as long as somebody holds it."""
    backend = engine.backend
    if hasattr(backend, "_loras"):
        return weakref.WeakSet(tensor for lora in backend._loras._held.values() for pair in lora.values() for tensor in pair)
    return weakref.WeakSet(parameter for name, parameter in backend._model.named_parameters() if ".lora_" in name)


@BACKENDS
def test_an_unloaded_adapter_takes_no_requests_ends_its_streams_and_is_gone(tiny_qwen2, paths, reference, backend):
    async def scenario():
        async with kit.running(kit.lively(tiny_qwen2), num_slots=4, backend=backend) as engine:
            for name, path in paths.items():
                await engine.load_adapter(name, path)
            await engine.unload_adapter("two")
            held = adapter_tensors(engine)
            assert held
            running = asyncio.create_task(kit.tokens(engine, kit.wanted("running", PROMPT, adapter="one", max_tokens=80)))
            plain = asyncio.create_task(kit.tokens(engine, kit.wanted("plain", PROMPT, max_tokens=80)))
            await kit.until(lambda: engine.stats().num_generated_tokens > 4)
            unloading = asyncio.create_task(engine.unload_adapter("one"))
            await asyncio.sleep(0)
            for name in ("one", "two", "never"):
                with pytest.raises(UnknownAdapter, match=rf"No adapter '{name}' is loaded; loaded: \[\]"):
                    await kit.tokens(engine, kit.wanted("late", PROMPT, adapter=name))
                with pytest.raises(UnknownAdapter):
                    await engine.unload_adapter(name)
            assert not unloading.done() and not running.done()
            ended = await asyncio.gather(running, plain)
            await unloading
            gc.collect()
            assert not held, "its memory is given back"
            return ended, await kit.tokens(engine, kit.wanted("after", PROMPT)), engine.stats()

    (ended, plain), after, stats = asyncio.run(scenario())
    assert ended == reference(tiny_qwen2, PROMPT, 80, paths["one"])
    assert plain == reference(tiny_qwen2, PROMPT, 80)
    assert after == plain[: len(after)]
    assert (stats.state, stats.num_free_blocks) == ("running", stats.num_blocks)


@BACKENDS
def test_a_name_that_comes_back_finds_nothing_of_its_predecessor(tiny_qwen2, paths, reference, backend):
    expected = {name: reference(tiny_qwen2, PROMPT, 12, path) for name, path in paths.items()}

    async def scenario():
        async with kit.running(kit.lively(tiny_qwen2), num_slots=4, backend=backend) as engine:
            await engine.load_adapter("mine", paths["one"])
            await kit.tokens(engine, kit.wanted("base", PROMPT))
            first = await kit.tokens(engine, kit.wanted("first", PROMPT, adapter="mine"))
            await engine.unload_adapter("mine")
            await engine.load_adapter("mine", paths["two"])
            again = await kit.collect(engine, kit.wanted("again", PROMPT, adapter="mine"))
            base = await kit.collect(engine, kit.wanted("still there", PROMPT))
            return first, again, base

    first, again, base = asyncio.run(scenario())
    assert first == expected["one"]
    assert [token for chunk in again for token in chunk.token_ids] == expected["two"]
    assert again[-1].num_cached_tokens == 0
    assert base[-1].num_cached_tokens == 64, "what the base computed is found as before"


@BACKENDS
def test_what_a_stream_computed_across_a_replacement_is_found_by_nobody(tiny_qwen2, paths, reference, backend):
    async def scenario():
        async with kit.running(kit.lively(tiny_qwen2), num_slots=4, backend=backend) as engine:
            await engine.load_adapter("mine", paths["one"])
            mixed = asyncio.create_task(kit.tokens(engine, kit.wanted("mixed", PROMPT, adapter="mine", max_tokens=120)))
            await kit.until(lambda: engine.stats().num_generated_tokens > 4)
            await engine.load_adapter("mine", paths["two"])
            longer = (*PROMPT, *(await mixed)[:60])
            return longer, await kit.tokens(engine, kit.wanted("after", longer, adapter="mine"))

    longer, after = asyncio.run(scenario())
    assert after == reference(tiny_qwen2, longer, 12, paths["two"])


@BACKENDS
def test_a_beam_search_keeps_its_adapter_to_its_end(tiny_qwen2, paths, backend):
    async def scenario():
        async with kit.running(kit.lively(tiny_qwen2), num_slots=4, backend=backend) as engine:
            beams = {"adapter": "one", "num_beams": 3, "max_tokens": 40}
            await engine.load_adapter("one", paths["one"])
            right = await kit.tokens(engine, kit.wanted("calm", PROMPT, **beams))
            search = asyncio.create_task(kit.tokens(engine, kit.wanted("search", PROMPT, **beams)))
            await kit.until(lambda: engine.stats().num_running > 0)
            await engine.unload_adapter("one")
            assert search.done() or engine.stats().num_running == 0
            return right, await search

    right, found = asyncio.run(scenario())
    assert found == right


@BACKENDS
def test_a_load_that_fails_leaves_the_adapter_of_that_name_as_it_was(tiny_qwen2, tiny_llama, paths, reference, tmp_path, backend):
    foreign = kit.adapter(tiny_llama, tmp_path / "foreign", 3)
    for file in foreign.glob("*.safetensors"):
        file.write_bytes((paths["one"] / file.name).read_bytes()[:-4])  # cut off

    async def scenario():
        async with kit.running(kit.lively(tiny_qwen2), num_slots=4, backend=backend) as engine:
            await engine.load_adapter("one", paths["one"])
            running = asyncio.create_task(kit.tokens(engine, kit.wanted("running", PROMPT, adapter="one", max_tokens=60)))
            await kit.until(lambda: engine.stats().num_generated_tokens > 4)
            for broken in (foreign, tmp_path / "nowhere"):
                with pytest.raises(AdapterMismatch, match=str(broken)):
                    await engine.load_adapter("one", broken)
            return await running, await kit.tokens(engine, kit.wanted("after", PROMPT, adapter="one"))

    running, after = asyncio.run(scenario())
    expected = reference(tiny_qwen2, PROMPT, 60, paths["one"])
    assert (running, after) == (expected, expected[:12])


def test_an_unloading_that_nobody_awaits_goes_on_and_one_that_cannot_end_says_so(tiny_qwen2, paths):
    async def scenario():
        async with kit.running(kit.lively(tiny_qwen2), num_slots=4) as engine:
            await engine.load_adapter("one", paths["one"])
            async with aclosing(engine.generate(kit.wanted("short", PROMPT, adapter="one", max_tokens=100))) as chunks:
                await anext(chunks)
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(engine.unload_adapter("one"), 0.01)
            await kit.until(lambda: not adapter_tensors(engine))
            await engine.load_adapter("one", paths["one"])
            endless = asyncio.create_task(kit.tokens(engine, kit.wanted("endless", (5,), adapter="one", max_tokens=400)))
            await kit.until(lambda: engine.stats().num_running > 0)
            unloading = asyncio.create_task(engine.unload_adapter("one"))
            await asyncio.sleep(0.01)
            await engine.stop()
            return await asyncio.gather(unloading, endless, return_exceptions=True)

    assert [type(found) for found in asyncio.run(scenario())] == [EngineStopped, EngineStopped]


def test_the_fake_engine_unloads_as_a_real_one_does():
    async def scenario():
        engine = FakeEngine(EngineConfig(type="fake", fake=FakeConfig(token_delay_s=0.002)))
        await engine.start()
        with pytest.raises(UnknownAdapter):
            await engine.unload_adapter("one")
        await engine.load_adapter("one", Path("somewhere"))
        running = asyncio.create_task(kit.tokens(engine, kit.wanted("a", tuple(range(20)), adapter="one", max_tokens=20)))
        await kit.until(lambda: engine.stats().num_running == 1)
        unloading = asyncio.create_task(engine.unload_adapter("one"))
        await asyncio.sleep(0)
        for refused in (kit.tokens(engine, kit.wanted("b", (1,), adapter="one")), engine.unload_adapter("one")):
            with pytest.raises(UnknownAdapter):
                await refused
        assert not unloading.done()
        await unloading
        assert len(await running) == 20
        return engine.adapters

    assert asyncio.run(scenario()) == {}
