"""Passes survive the way over the link, and stages of the general backend hand on what one model computes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from r1ray.engine.backend import Piece
from r1ray.engine.paged import TransformersBackend
from r1ray.engine.partial import load_layers
from r1ray.engine.stage import decode_pass, encode_pass
from r1ray.errors import UnsupportedModel

numbers = st.lists(st.integers(0, 2**31 - 1), max_size=5)
pieces = st.lists(st.builds(Piece, ids=numbers, start=st.integers(0, 9999), table=numbers, num_logits=st.integers(0, 3)), max_size=5)


@given(pieces)
def test_a_pass_is_the_same_after_its_journey(sent):
    assert decode_pass(encode_pass(sent)) == sent


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen2", "tiny_deepseek_v3"])
def test_stages_of_transformers_modules_equal_the_whole(family, request):
    directory = request.getfixturevalue(family)
    config = AutoConfig.from_pretrained(directory)
    whole = TransformersBackend(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), num_blocks=4)
    parts = [TransformersBackend(load_layers(directory, config, torch.float32, layers), num_blocks=4) for layers in ((0, 1), (1, 2))]
    sent = [
        Piece(ids=[5], start=0, table=[3], num_logits=1),
        Piece(ids=list(range(40)), start=0, table=[2, 0], num_logits=2),
    ]
    with torch.inference_mode():
        right = whole.forward(sent)
        got = parts[1].stage(sent, parts[0].stage(sent, None))
    torch.testing.assert_close(got, right, rtol=1e-5, atol=1e-5)


def test_a_missing_tensor_is_named(tiny_llama, tmp_path):
    from safetensors.torch import save_file

    save_file({"model.norm.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.\S+"):
        load_layers(tmp_path, AutoConfig.from_pretrained(tiny_llama), torch.float32, (1, 2))
