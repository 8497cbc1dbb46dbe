"""Layers read from files have the weights that transformers would have loaded, FP8 ones included."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from r1ray.engine.backend import Piece
from r1ray.engine.config import EngineConfig
from r1ray.engine.create import create_engine
from r1ray.engine.paged import TransformersBackend
from r1ray.engine.partial import load_layers
from r1ray.engine.tensor import Share
from r1ray.errors import UnsupportedModel
from r1ray.model.importer import import_model
from r1ray.model.load import load_model
from tests.engine.conftest import native, tokens, wanted
from tests.fp8 import save_as_fp8

SENT = [Piece(ids=list(range(20, 60)), start=0, table=[2, 0], num_logits=40)]


def split_logits(directory: Path, dtype: torch.dtype) -> torch.Tensor:
    config = AutoConfig.from_pretrained(directory)
    first, second = (TransformersBackend(load_layers(directory, config, dtype, layers), num_blocks=4) for layers in ((0, 1), (1, 2)))
    return second.stage(SENT, first.stage(SENT, None))


def biased(directory: Path, out: Path, bias: list[float]) -> Path:
    """Experts that are chosen by the bias alone, and matter."""
    shutil.copytree(directory, out)
    file = out / "model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if name.endswith("mlp.gate.weight"):
            tensors[name] = torch.zeros_like(tensors[name])
        elif name.endswith("e_score_correction_bias"):
            tensors[name] = torch.tensor(bias)
        elif ".experts." in name:
            tensors[name] = tensors[name] * 20
    save_file(tensors, file, {"format": "pt"})
    return out


def test_a_split_model_in_bfloat16_chooses_the_experts_that_one_process_does(tiny_deepseek_v3: Path, tmp_path: Path) -> None:
    """Biases that bfloat16 cannot tell apart."""
    found = []
    for name, bias in (("up", [1.0, 1.0001, 1.0002, 1.0003]), ("down", [1.0003, 1.0002, 1.0001, 1.0])):
        directory = biased(tiny_deepseek_v3, tmp_path / name, bias)
        one = TransformersBackend(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16), num_blocks=4)
        found.append(split_logits(directory, torch.bfloat16))
        torch.testing.assert_close(found[-1], one.forward(SENT), rtol=0, atol=0.01)
    assert (found[0] - found[1]).abs().max() > 0.1, "the choice matters"


@pytest.mark.parametrize("family", ["tiny_deepseek_v3", "tiny_qwen2"])
def test_fp8_stages_compute_what_their_weights_stand_for(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    fp8 = save_as_fp8(request.getfixturevalue(family), tmp_path / "fp8", block=(16, 24), plain=tmp_path / "plain")
    assert "quantization_config" in json.loads((fp8 / "config.json").read_text())
    one = TransformersBackend(AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32), num_blocks=4)
    torch.testing.assert_close(split_logits(fp8, torch.float32), one.forward(SENT), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [(16, 24), (16, 16), (8, 8)])
def test_a_tensor_rank_holds_its_part_of_an_fp8_tensor_alone(block: tuple[int, int], tiny_deepseek_v3: Path, tmp_path: Path) -> None:
    """Whether the parts end with blocks or inside them."""
    fp8 = save_as_fp8(tiny_deepseek_v3, tmp_path / "fp8", block=block, plain=tmp_path / "plain")
    made, right = (
        load_layers(path, AutoConfig.from_pretrained(path), torch.bfloat16, (0, 2), Share(1, 2)).state_dict()
        for path in (fp8, tmp_path / "plain")
    )
    for name, tensor in made.items():
        assert torch.equal(tensor, right[name]), name
        if "_proj" in name:
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


@pytest.mark.parametrize("backend", [native(), "transformers"])
def test_an_fp8_version_answers_as_the_one_that_it_stands_for(backend: str, tiny_llama: Path, registry: Any, tmp_path: Path) -> None:
    fp8 = save_as_fp8(tiny_llama, tmp_path / "fp8", block=(16, 24), plain=tmp_path / "plain")
    config = EngineConfig(backend=backend, dtype="float32", num_threads=1, num_slots=1, kv_cache_gb=0.01)  # type: ignore[arg-type]

    async def answer(directory: Path) -> list[int]:
        engine = create_engine(import_model(str(directory), name=directory.name, registry=registry), config, registry)
        await engine.start()
        try:
            return await tokens(engine, wanted("a", tuple(range(30, 60))))
        finally:
            await engine.stop()

    assert asyncio.run(answer(fp8)) == asyncio.run(answer(tmp_path / "plain"))
    with pytest.raises(UnsupportedModel, match=r"r1ray dequantise fp8@1"):
        load_model(registry.resolve("fp8"), registry=registry)
