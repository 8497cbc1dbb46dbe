"""The compiled decoder against transformers' own modules, in every precision, however the tokens are cut into passes."""

from __future__ import annotations

import ctypes
import random
from typing import get_args

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config

from r1ray.engine.backend import Piece
from r1ray.engine.config import Precision
from r1ray.engine.native import build, structs, weights
from r1ray.engine.native.model import NativeModel, NativeOptions, Shape, kv_bytes_per_token, refusal
from r1ray.engine.native.weights import interleave, pack
from r1ray.errors import UnsupportedModel
from r1ray.model.checkpoint import checkpoint_tensors

needs_kernels = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


def model_of(seed=0, **changes):
    """A Llama whose sizes are no multiples of anything but what the kernels demand."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = LlamaConfig(**{**sizes, "head_dim": 64, "vocab_size": 333, "max_position_embeddings": 256, **changes})
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3)
    return model


def native_of(model, precision="float32", **settings):
    options = NativeOptions(**{"precision": precision, "num_blocks": 24, "context": 256, "num_threads": 2, **settings})
    return NativeModel(model.config, model.state_dict().get, options)


def logits_in_pieces(native, ids, cuts):
    """The logits after each piece of one sequence, whose blocks lie scattered."""
    table, rows, start = [7, 2, 11, 5, 19, 0, 3, 23], [], 0
    for end in [*cuts, len(ids)]:
        rows.append(native.forward([Piece(ids=ids[start:end], start=start, table=table, num_logits=1)])[0])
        start = end
    return torch.stack(rows)


@needs_kernels
def test_both_sides_see_the_same_structs():
    sizes = (ctypes.c_int32 * 6)()
    build.library().r1ray_struct_sizes(ctypes.byref(sizes))
    ours = [ctypes.sizeof(kind) for kind in (structs.Linear, structs.Lora, structs.Layer, structs.Model, structs.Segment, structs.Batch)]
    assert list(sizes) == ours


@needs_kernels
@pytest.mark.parametrize("cuts", [[], [1], [31, 32, 33], [64], list(range(1, 90))])
def test_logits_equal_transformers_however_a_prompt_is_cut(cuts):
    model, ids = model_of(), [random.Random(1).randrange(333) for _ in range(90)]
    with torch.no_grad():
        right = model(torch.tensor([ids])).logits[0]
    got = logits_in_pieces(native_of(model), ids, cuts)
    torch.testing.assert_close(got, right[[end - 1 for end in [*cuts, len(ids)]]], rtol=1e-4, atol=1e-4)


@needs_kernels
def test_every_token_of_a_piece_can_have_its_logits():
    model, ids = model_of(), list(range(40))
    with torch.no_grad():
        right = model(torch.tensor([ids])).logits[0]
    native = native_of(model)
    pieces = [Piece(ids=ids, start=0, table=[0, 1], num_logits=40), Piece(ids=ids[:9], start=0, table=[2], num_logits=2)]
    torch.testing.assert_close(native.forward(pieces), torch.cat([right, right[7:9]]), rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        {"attention_bias": True},
        {"num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 32},
        {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128, "tie_word_embeddings": True},
        {"intermediate_size": 100, "vocab_size": 65},
    ],
    ids=["linear positions", "llama3 positions", "biases", "one key head for 16", "tied, wide heads", "odd sizes"],
)
def test_variants_of_the_family_equal_transformers(changes):
    model = model_of(**changes)
    ids = [random.Random(2).randrange(65) for _ in range(70)]
    with torch.no_grad():
        right = model(torch.tensor([ids])).logits[0, [39, 69]]
    torch.testing.assert_close(logits_in_pieces(native_of(model), ids, [40]), right, rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize(("precision", "error"), [("bfloat16", 0.02), ("int8_weight_only", 0.03), ("int8", 0.04), ("int4", 0.4)])
def test_rounded_weights_stay_near(precision, error):
    """Relative to the spread of the logits; int8 rounds weights and activations of a model that has no redundancy at all."""
    model, ids = model_of(hidden_size=192), [random.Random(3).randrange(333) for _ in range(90)]
    with torch.no_grad():
        right = model(torch.tensor([ids])).logits[0, [59, 89]]
    got = logits_in_pieces(native_of(model, precision), ids, [60])
    assert float((got - right).norm() / right.norm()) < error


@needs_kernels
@pytest.mark.parametrize("precision", get_args(Precision))
def test_a_sequence_has_the_same_logits_in_any_company(precision):
    """To the last bit: what shares the pass decides no rounding."""
    native, rng = native_of(model_of(), precision), random.Random(4)
    sequences = [[rng.randrange(333) for _ in range(rng.choice([1, 5, 40]))] for _ in range(9)]
    alone = [native.forward([Piece(ids=ids, start=0, table=[0, 1], num_logits=1)])[0] for ids in sequences]
    pieces = [Piece(ids=ids, start=0, table=[2 * i, 2 * i + 1], num_logits=1) for i, ids in enumerate(sequences)]
    together = native.forward(pieces)
    for row, right in zip(together, alone, strict=True):
        assert torch.equal(row, right)


@needs_kernels
def test_stages_hand_on_what_one_model_computes():
    model, ids = model_of(), list(range(50))
    piece = Piece(ids=ids, start=0, table=[0, 1], num_logits=1)
    whole = native_of(model).forward([piece])
    stages = [native_of(model, layers=layers) for layers in ((0, 1), (1, 3))]
    torch.testing.assert_close(stages[1].stage([piece], stages[0].stage([piece], None)), whole)


@needs_kernels
def test_a_checkpoint_is_read_from_its_shards(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tensors = checkpoint_tensors(tiny_llama)
    assert tensors("model.layers.9.mlp.up_proj.weight") is None
    native = NativeModel(model.config, tensors, NativeOptions(precision="float32", num_blocks=2, context=64))
    with torch.no_grad():
        right = model(torch.tensor([[5, 6, 7]])).logits[0, -1:]
    torch.testing.assert_close(native.forward([Piece(ids=[5, 6, 7], start=0, table=[0], num_logits=1)]), right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("precision", "offset", "group"), [("int8", 128, 64), ("int8_weight_only", 0, 0)])
def test_packed_int8_weights_are_the_rounded_ones(precision, offset, group):
    weight = torch.randn(40, 64)
    packed = pack(weight, precision)
    rows = packed.weight.transpose(1, 2).reshape(64, 64)[:40].float() - offset
    torch.testing.assert_close(rows * packed.scale[:40, None], weight, rtol=0, atol=float(weight.abs().max()) / 254 + 1e-6)
    assert packed.group == group
    assert packed.weight.element_size() == 1


def test_packed_int4_weights_are_within_half_a_step():
    weight = torch.randn(40, 64) + 0.5
    packed = pack(weight, "int4")
    assert (packed.group, packed.weight.shape) == (32, (2, 2, 640))
    torch.testing.assert_close(unpacked(packed), weight, rtol=0, atol=float((weight.max() - weight.min()) / 30) + 1e-3)


def unpacked(packed):
    """The weights that int4 codes stand for, (n, k)."""
    panels, groups = packed.weight.shape[:2]
    ends = packed.weight[..., :128].contiguous().view(torch.float16).float().view(panels, groups, 2, 32)
    step, low = ends[:, :, 0, :, None], ends[:, :, 1, :, None]
    codes = packed.weight[..., 128:].view(panels, groups, 8, 16, 4).transpose(2, 3).reshape(panels, groups, 16, 32)
    columns = torch.cat([codes & 15, codes >> 4], dim=2).float() * step + low
    return columns.transpose(1, 2).reshape(panels * 32, packed.k)[: packed.n]


@needs_kernels
def test_int4_computes_with_the_weights_that_it_holds():
    """What is left is the rounding of activations: as near as int8 comes."""
    model, ids = model_of(hidden_size=192), [random.Random(3).randrange(333) for _ in range(90)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.weight"):
                parameter.copy_(unpacked(pack(parameter, "int4")))
        right = model(torch.tensor([ids])).logits[0, [59, 89]]
    got = logits_in_pieces(native_of(model, "int4"), ids, [60])
    assert float((got - right).norm() / right.norm()) < 0.04


def rounded_to_int8(model):
    """The matrices become those that int8 weight-only holds: whole numbers times a scale per output."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("_proj.weight", "lm_head.weight")):
                scale = parameter.abs().amax(dim=1, keepdim=True) / 127
                parameter.copy_((parameter / scale).round() * scale)
    return model


@needs_kernels
def test_int8_weight_only_rounds_nothing_but_activations_to_bfloat16():
    """Against float32 on the weights that it holds it errs as bfloat16 errs on weights that bfloat16 holds, and chooses as float32 does."""
    ids = [random.Random(3).randrange(333) for _ in range(90)]
    every = [Piece(ids=ids, start=0, table=[0, 1, 2], num_logits=90)]
    held = rounded_to_int8(model_of(hidden_size=192))
    exact = model_of(hidden_size=192).bfloat16().float()
    errors = {}
    for precision, model in (("int8_weight_only", held), ("bfloat16", exact)):
        with torch.no_grad():
            right = model(torch.tensor([ids])).logits[0]
        got = native_of(model, precision).forward(every)
        errors[precision] = float((got - right).norm() / right.norm())
        assert (got.argmax(dim=-1) == right.argmax(dim=-1)).float().mean() > 0.95
    assert errors["int8_weight_only"] < min(0.02, 1.5 * errors["bfloat16"])


def test_int8_weight_only_reads_half_of_what_bfloat16_reads():
    weight = torch.randn(100, 64)
    assert pack(weight, "int8_weight_only").num_bytes == pack(weight, "bfloat16").num_bytes // 2 + 4 * 128  # a scale per padded output


def test_a_matrix_is_packed_the_same_in_parts(monkeypatch):
    weight = torch.randn(100, 64)
    for precision in get_args(Precision):
        whole = pack(weight, precision)
        with monkeypatch.context() as patch:
            patch.setattr(weights, "ROWS_AT_ONCE", 32)
            parts = pack(weight, precision)
        assert torch.equal(whole.weight, parts.weight)
        assert (whole.scale is None) == (parts.scale is None)
        assert whole.scale is None or torch.equal(whole.scale, parts.scale)


def test_gate_and_up_share_panels():
    gate, up = torch.arange(20.0)[:, None].expand(20, 2), 100 + torch.arange(20.0)[:, None].expand(20, 2)
    joined = interleave(gate, up)[:, 0].tolist()
    assert joined[:16] == list(range(16))
    assert joined[16:32] == list(range(100, 116))
    assert joined[32:36] == [16, 17, 18, 19]
    assert joined[36:48] == [0] * 12


@pytest.mark.parametrize(
    ("config", "precision", "says"),
    [
        (LlamaConfig(head_dim=80), "bfloat16", "head size of 80"),
        (LlamaConfig(hidden_act="gelu"), "bfloat16", "activation gelu"),
        (LlamaConfig(mlp_bias=True), "bfloat16", "biases in the MLP"),
        (LlamaConfig(head_dim=64, hidden_size=1000, num_attention_heads=10, num_key_value_heads=10), "int8", "sizes 1000"),
        (LlamaConfig(head_dim=64, hidden_size=1000, num_attention_heads=10, num_key_value_heads=10), "int4", "sizes 1000"),
        (Qwen2Config(use_sliding_window=True, max_window_layers=0, sliding_window=64), "bfloat16", "sliding-window"),
        (LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), "bfloat16", "type dynamic"),
    ],
)
def test_a_model_that_the_kernels_cannot_run_is_named(config, precision, says):
    assert says in refusal(config, precision)


def test_the_cache_costs_what_the_shape_says():
    shape = Shape.of(LlamaConfig(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64))
    assert kv_bytes_per_token(shape, "int8") == 30 * 2 * 3 * 64 * 2


def test_without_a_compiler_the_reason_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_compiler", lambda: None)
    build.library.cache_clear()
    try:
        with pytest.raises(UnsupportedModel, match=r"install g\+\+"):
            build.library()
    finally:
        build.library.cache_clear()


@needs_kernels
def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "TARGETS", ("-mno-such-target",))
    build.library.cache_clear()
    try:
        with pytest.raises(UnsupportedModel, match="no-such-target"):
            build.library()
        assert list((tmp_path / "r1ray" / "native").iterdir()) == []
    finally:
        build.library.cache_clear()
