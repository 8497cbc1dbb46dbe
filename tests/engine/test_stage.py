"""Passes survive the way as a row of integers, and stages of the general backend hand on what one model computes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from r1ray.engine.actors import _placement
from r1ray.engine.backend import Piece
from r1ray.engine.link import Place
from r1ray.engine.memory import CacheWish
from r1ray.engine.paged import TransformersBackend
from r1ray.engine.partial import load_layers
from r1ray.engine.pipeline import Host, passes_at_once
from r1ray.engine.stage import StageOrder, decode_pass, encode_pass, orders_by_rank
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


@pytest.mark.parametrize(
    ("num_threads", "machines", "device", "expected"),
    [
        (4, "ab", "cpu", 2),  # a machine for each stage
        (2, "aa", "cpu", 2),  # half the cores for each
        (4, "aa", "cpu", 1),  # the same cores
        (4, "aabb", "cpu", 2),  # two machines of two stages
        (4, "aa", "cuda", 2),
    ],
)
def test_stages_that_share_cores_take_turns(num_threads, machines, device, expected, tmp_path):
    order = StageOrder(
        directory=tmp_path,
        adapter=None,
        layers=(0, 1),
        precision="float32",
        native=False,
        wish=CacheWish(num_slots=1, context=8),
        num_threads=num_threads,
        device=device,
        place=Place(num_stages=len(machines)),
    )
    assert passes_at_once(order, [Host(node=str(i), address=name, num_cores=4) for i, name in enumerate(machines)]) == expected


def test_a_missing_tensor_is_named(tiny_llama, tmp_path):
    from safetensors.torch import save_file

    save_file({"model.norm.weight": torch.ones(64)}, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1\.\S+"):
        load_layers(tmp_path, AutoConfig.from_pretrained(tiny_llama), torch.float32, (1, 2))


@pytest.mark.parametrize(
    ("num_stages", "num_tensor", "num_bundles", "bundles"),
    [
        (3, 1, 3, [1, 2]),
        (2, 2, 2, [0, 1, 1]),  # a Serve replica: the other ranks of its stage lie in its own bundle
        (2, 2, 3, [1, 2, 2]),  # a trial of a sweep holds all of bundle 0
        (1, 3, 2, [1, 1]),
        (3, 1, 1, []),  # a bundle that says nothing of stages
    ],
)
def test_each_rank_has_its_bundle(num_stages, num_tensor, num_bundles, bundles):
    order = StageOrder(
        directory=Path(),
        adapter=None,
        layers=(0, 1),
        precision="float32",
        native=False,
        wish=CacheWish(num_slots=1, context=64),
        num_threads=1,
    )
    orders = orders_by_rank(order, [(0, 1)] * num_stages, num_tensor)
    found = [_placement(SimpleNamespace(bundle_count=num_bundles), order.place) for order in orders[1:]]
    assert [options["scheduling_strategy"].placement_group_bundle_index for options in found if options] == bundles
