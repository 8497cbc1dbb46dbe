"""An export below the in-house engine. What every backend must do is in test_batching.py and runs over this one too."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from r1ray.engine.backend import BLOCK_SIZE, Piece
from r1ray.engine.config import EngineConfig
from r1ray.engine.onnx import OnnxBackend, OnnxOptions
from r1ray.engine.onnx_rows import Rows
from r1ray.errors import AdapterMismatch, InvalidRequest, PromptTooLong, UnknownAdapter, UnsupportedModel
from tests.engine import conftest as kit

lively, running, tokens, until, wanted = kit.lively, kit.running, kit.tokens, kit.until, kit.wanted


def test_onnx_and_its_builder_are_installed():
    import onnx
    import onnxruntime
    from onnxruntime_genai.models import builder

    assert callable(builder.create_model)
    assert "CPUExecutionProvider" in onnxruntime.get_available_providers()
    assert onnx.helper.make_node("Gather", ["a", "b"], ["c"]).op_type == "Gather"


class Mirror:
    """A graph in place of the real one: writes each token's id where its keys belong, and checks that all before it are there."""

    def __init__(self, num_blocks: int, num_rows: int) -> None:
        self.rows = Rows((2, 1, 1), num_blocks=num_blocks, num_rows=num_rows, context=1 << 20, kind=(torch.float32, "cpu"))

    def run(self, streams: list[tuple[list[int], Piece]]) -> None:
        pieces = [piece for _, piece in streams]
        places = self.rows.place(pieces)
        assert len(set(places)) == len(places)
        assert sorted(row for row, piece in zip(places, pieces, strict=True) if len(piece.ids) == 1) == list(
            range(sum(len(piece.ids) == 1 for piece in pieces))
        )
        for row, (ids, piece) in zip(places, streams, strict=True):
            for plane in range(2):
                assert self.rows.plane(plane, row)[0, : piece.start, 0].tolist() == [float(i) for i in ids[: piece.start]]
            self.rows.tensor[:, row, 0, piece.start : piece.start + len(piece.ids), 0] = torch.tensor(piece.ids, dtype=torch.float32)
        self.rows.keep(pieces, places)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1 << 30), num_rows=st.integers(1, 6))
def test_every_piece_finds_all_that_came_before_it(seed, num_rows):
    """Streams come, stall, go, share beginnings and reuse blocks in any order; rows are fewer than the streams that live."""
    rng = random.Random(seed)
    mirror, free = Mirror(200, num_rows), list(range(200))
    streams: list[dict] = []
    for _ in range(60):
        if len(streams) < 2 * num_rows and rng.random() < 0.4:
            parent = rng.choice(streams) if streams and rng.random() < 0.5 else None
            shared = parent["done"] // BLOCK_SIZE if parent else 0
            blocks = parent["blocks"][:shared] if parent else []
            ids = [*(parent["ids"][: shared * BLOCK_SIZE] if parent else []), *(rng.randrange(1, 9999) for _ in range(rng.randint(1, 300)))]
            streams.append({"ids": ids, "done": shared * BLOCK_SIZE, "blocks": list(blocks), "own": shared})
        chosen = rng.sample(streams, min(len(streams), rng.randint(1, num_rows)))
        batch = []
        for stream in chosen:
            num = min(rng.choice([1, 1, 1, 5, 40, 100]), len(stream["ids"]) - stream["done"])
            if num == 0:
                continue
            need = -(-(stream["done"] + num) // BLOCK_SIZE) - len(stream["blocks"])
            if need > len(free):
                continue
            stream["blocks"] += [free.pop(rng.randrange(len(free))) for _ in range(need)]
            start = stream["done"]
            batch.append(
                (stream["ids"], Piece(ids=stream["ids"][start : start + num], start=start, table=list(stream["blocks"]), num_logits=1))
            )
            stream["done"] += num
        if batch:
            mirror.run(batch)
        for stream in [s for s in streams if s["done"] == len(s["ids"]) or rng.random() < 0.05]:
            holders = [block for other in streams if other is not stream for block in other["blocks"]]
            free += [block for block in stream["blocks"] if block not in holders]
            streams.remove(stream)


def test_a_pass_gives_the_logits_that_are_wanted_and_no_others(tiny_qwen2):
    model = lively(tiny_qwen2)
    backend, ids = kit.onnx_backend(model, num_blocks=8, num_rows=3), list(range(30, 70))

    def piece(table: list[int], start: int, num: int, num_logits: int) -> Piece:
        return Piece(ids=ids[start : start + num], start=start, table=table, num_logits=num_logits)

    with torch.inference_mode():
        right = model(torch.tensor([ids])).logits[0]
        assert backend.forward([piece([0], 0, 1, 0)]).shape == (0, backend.vocab_size)
        assert backend.forward([piece([0], 1, 1, 0), piece([1], 0, 5, 0)]).shape == (0, backend.vocab_size)
        got = backend.forward([piece([0], 2, 1, 1), piece([1], 5, 1, 0), piece([2, 3], 0, 40, 3)])
    assert torch.allclose(got, torch.cat([right[2:3], right[37:40]]), atol=1e-3)


def test_a_client_that_leaves_frees_its_slot_and_the_next_has_right_tokens(tiny_llama, reference):
    async def scenario():
        async with running(lively(tiny_llama), backend="onnx", num_slots=1) as engine:
            async with aclosing(engine.generate(wanted("leaves", (5, 6), max_tokens=500))) as chunks:
                await anext(chunks)
            await until(lambda: engine.stats().num_free_slots == 1)
            return await tokens(engine, wanted("next", (5, 6, 7))), engine.stats()

    got, stats = asyncio.run(scenario())
    assert got == reference(tiny_llama, (5, 6, 7), 12)
    assert (stats.num_aborted, stats.num_free_blocks) == (1, stats.num_blocks)


def test_stop_ids_bias_masks_and_logprobs_act_on_an_export_too(tiny_llama, reference):
    prompt = (5, 6, 7)
    plain = reference(tiny_llama, prompt, 12)

    async def scenario():
        async with running(lively(tiny_llama), backend="onnx", num_slots=4) as engine:
            return await asyncio.gather(
                kit.collect(engine, wanted("plain", prompt, num_logprobs=2)),
                tokens(engine, wanted("stops", prompt, ignore_eos=False, stop_token_ids=(plain[2],))),
                tokens(engine, wanted("biased", prompt, logit_bias=((77, 1e4),))),
                tokens(engine, wanted("masked", prompt, mask=lambda drawn: [30 + len(drawn)])),
            )

    chunks, stopped, biased, masked = asyncio.run(scenario())
    logprobs = [chunk.logprobs[0] for chunk in chunks]
    assert [entry.token for entry in logprobs] == plain
    assert all(entry.top[0] == (entry.token, entry.logprob) for entry in logprobs)
    assert (stopped, biased, masked) == (plain[: plain.index(plain[2])], [77] * 12, list(range(30, 42)))


@pytest.mark.parametrize(
    ("request_", "error", "says"),
    [
        (wanted("a", ()), InvalidRequest, "empty prompt"),
        (wanted("a", (3, 9999)), InvalidRequest, "9999"),
        (wanted("a", tuple(range(20, 60))), PromptTooLong, "context of 40"),
        (wanted("a", (5,), adapter="x"), UnknownAdapter, "'x'"),
    ],
)
def test_a_bad_request_is_refused_and_the_others_run_on(tiny_llama, reference, request_, error, says):
    async def scenario():
        async with running(lively(tiny_llama), backend="onnx", max_context=40) as engine:
            with pytest.raises(error, match=says):
                await tokens(engine, request_)
            return await tokens(engine, wanted("good", (5, 6, 7)))

    assert asyncio.run(scenario()) == reference(tiny_llama, (5, 6, 7), 12)


def test_an_export_declares_that_it_takes_no_adapters(tiny_llama, tmp_path):
    async def scenario():
        async with running(lively(tiny_llama), backend="onnx") as engine:
            with pytest.raises(AdapterMismatch, match="takes no adapter"):
                await engine.load_adapter("mine", tmp_path)
            return engine.capabilities, await tokens(engine, wanted("a", (5,), max_tokens=3))

    capabilities, got = asyncio.run(scenario())
    assert "adapters" not in capabilities
    assert {"logprobs", "masks", "prefix_cache", "seed"} <= capabilities
    assert len(got) == 3


@pytest.mark.parametrize("setting", [{"stages": 2}, {"dtype": "int8"}, {"backend": "native"}])
def test_settings_that_an_export_has_settled_are_refused(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        EngineConfig(type="onnx", **setting)


def test_a_device_that_this_onnxruntime_lacks_is_refused(tiny_llama):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this one has CUDA")
    options = OnnxOptions(precision="float16", num_blocks=8, num_rows=1, context=64, num_threads=1, device="cuda")
    with pytest.raises(UnsupportedModel, match="CPUExecutionProvider"):
        OnnxBackend(kit.exported(lively(tiny_llama)), options)


def test_a_directory_without_a_graph_is_refused(tmp_path):
    options = OnnxOptions(precision="float32", num_blocks=8, num_rows=1, context=64, num_threads=1)
    with pytest.raises(UnsupportedModel, match="export_onnx"):
        OnnxBackend(tmp_path, options)
