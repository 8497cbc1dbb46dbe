"""FP8 checkpoints are read as the numbers that they stand for, and what is quantised otherwise is refused with a way out."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from r1ray.errors import UnsupportedModel
from r1ray.model.checkpoint import checkpoint_tensors
from r1ray.model.fp8 import Fp8, dequantize, dequantized, fp8_of
from tests.fp8 import save_as_fp8


def quantised(rows: int, columns: int, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(float8 weight, factors, what they stand for, number by number)."""
    torch.manual_seed(0)
    weight = torch.randn(rows, columns).to(torch.float8_e4m3fn)
    factors = torch.rand(-(-rows // block[0]), -(-columns // block[1])) + 0.5
    right = weight.float()
    for i, j in itertools.product(range(rows), range(columns)):
        right[i, j] *= factors[i // block[0], j // block[1]]
    return weight, factors, right


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (9, 7), (3, 4), (4, 17)])
def test_each_block_has_its_own_factor_and_those_at_the_edges_are_smaller(rows, columns):
    weight, factors, right = quantised(rows, columns, (4, 4))
    assert torch.equal(dequantize(weight, factors, Fp8((4, 4))), right.to(torch.bfloat16))


def test_experts_in_one_tensor_are_read_like_each_alone():
    pairs = [quantised(9, 7, (4, 4))[:2] for _ in range(3)]
    stacked = dequantize(torch.stack([weight for weight, _ in pairs]), torch.stack([factors for _, factors in pairs]), Fp8((4, 4)))
    assert torch.equal(stacked, torch.stack([dequantize(*pair, Fp8((4, 4))) for pair in pairs]))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_factor_may_serve_a_whole_tensor(shape):
    weight = torch.tensor([[1.5, -2.0]] * 300).to(torch.float8_e4m3fn)
    assert torch.equal(dequantize(weight, torch.full(shape, 0.5), Fp8()), torch.tensor([[0.75, -1.0]] * 300, dtype=torch.bfloat16))


def test_factors_that_do_not_fit_are_refused():
    weight, factors, _ = quantised(8, 8, (4, 4))
    with pytest.raises(UnsupportedModel, match=r"\[2, 2\] for a weight of \[8, 8\] in blocks of 2 x 4, which need \[4, 2\]"):
        dequantize(weight, factors, Fp8((2, 4)))
    with pytest.raises(UnsupportedModel, match=r"stored as torch\.uint8"):
        dequantize(weight, factors.to(torch.uint8), Fp8((4, 4)))


def test_a_checkpoint_is_read_as_what_it_stands_for(tiny_deepseek_v3: Path, tmp_path: Path):
    read = checkpoint_tensors(save_as_fp8(tiny_deepseek_v3, tmp_path / "fp8", block=(16, 24)))
    plain = checkpoint_tensors(tiny_deepseek_v3)
    for name in ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", "model.layers.1.mlp.experts.3.down_proj.weight"):
        found, right = read(name), plain(name)
        assert found is not None and right is not None
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), right.float(), rtol=0.08, atol=0.005)
    kept = "model.layers.1.input_layernorm.weight"
    assert torch.equal(read(kept), plain(kept))
    assert read("no.such.tensor") is None


def test_float8_without_factors_is_named(tmp_path: Path):
    save_file({"a.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"no a\.weight_scale_inv to read it with\. Give the model's weights in bfloat16"):
        checkpoint_tensors(tmp_path)("a.weight")
    with pytest.raises(UnsupportedModel, match=r"^a\.weight: factors of shape \[7\]"):
        dequantized(lambda name: torch.ones(7) if name.endswith("_inv") else torch.zeros(4, 4).to(torch.float8_e4m3fn))("a.weight")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"quant_method": "fp8", "weight_block_size": [64, 32]}, Fp8((64, 32))),
        ({"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}, Fp8((128, 128))),
        ({}, None),
        (None, None),
    ],
)
def test_the_configuration_says_how_large_a_block_is(settings, expected, tmp_path):
    assert fp8_of({"quantization_config": settings}, tmp_path) == expected
    assert fp8_of({}, tmp_path) is None


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "fp8", "expert_dtype": "fp4"}, "fp8 with fp4 experts"),
        ({"a": 1}, "None"),
    ],
)
def test_what_is_quantised_otherwise_is_refused_with_a_way_out(settings, named, tmp_path):
    with pytest.raises(UnsupportedModel, match=rf"quantised with {named};.* engine\.type=vllm"):
        fp8_of({"quantization_config": settings}, tmp_path)
