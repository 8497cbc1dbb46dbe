from __future__ import annotations

import pytest
import torch

from r1ray.config import load_config
from r1ray.errors import InvalidValue
from r1ray.train.config import FinetuneConfig
from r1ray.train.parallel.layout import Layout, Place, check_model
from r1ray.train.parallel.sequence import sliced

QWEN = {"model_type": "qwen2", "num_attention_heads": 12, "num_key_value_heads": 2, "intermediate_size": 8960, "num_hidden_layers": 28}


def train(*overrides: str):
    return load_config(FinetuneConfig, None, ["data.path=x.csv", *(f"train.{override}" for override in overrides)]).train


def test_neighbours_share_a_tensor_and_stages_are_far_apart() -> None:
    assert [Layout(world=4, tensor=2).place(rank) for rank in range(4)] == [
        Place(data=data, stage=0, tensor=tensor, sequence=0) for data in (0, 1) for tensor in (0, 1)
    ]
    assert [(place.stage, place.data) for place in map(Layout(world=4, pipeline=2).place, range(4))] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [Layout(world=4, sequence=2).peers(rank) for rank in (0, 3)] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("degrees", [{"tensor": 2}, {"sequence": 4}, {"pipeline": 2}, {"tensor": 2, "pipeline": 2}])
def test_every_place_is_taken_once(degrees) -> None:
    layout = Layout(world=8, **degrees)
    places = [layout.place(rank) for rank in range(8)]
    assert len(set(places)) == 8
    assert {place.data for place in places} == set(range(layout.data))


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["num_workers=3", "parallelism.tensor=2"], "multiple of 2"),
        (["num_workers=4", "parallelism.tensor=2", "parallelism.sequence=2"], "one above 1"),
        (["num_workers=2", "parallelism.pipeline=2", "zero_stage=2"], "zero_stage=1"),
        (["num_workers=2", "parallelism.tensor=2", "zero_stage=3"], "zero_stage=2"),
        (["num_workers=2", "parallelism.sequence=2", "attention=eager"], "attention=sdpa"),
        (["num_workers=2", "parallelism.sequence=2", "packing=true"], "packing=false"),
        (["num_workers=2", "parallelism.tensor=2", "method=prompt"], "set it to 1"),
        (["num_workers=2", "parallelism.tensor=2", "lora.dora=true"], "lora.dora=false"),
    ],
)
def test_what_cannot_be_combined_is_refused_with_a_remedy(overrides, remedy) -> None:
    with pytest.raises(InvalidValue, match=remedy):
        train(*overrides)


def test_a_batch_may_be_as_small_as_the_groups_that_compute_different_rows() -> None:
    assert train("num_workers=4", "parallelism.tensor=2", "batch_size=2").parallelism.split == 2


@pytest.mark.parametrize(
    ("split", "changed", "said"),
    [
        ("tensor=4", {}, "num_key_value_heads=2"),
        ("tensor=8", {"num_key_value_heads": 12}, "num_attention_heads=12"),
        ("sequence=8", {}, "num_attention_heads=12"),
        ("pipeline=30", {}, "28 layers"),
        ("tensor=2", {"model_type": "gpt2"}, "zero_stage=3"),
        ("pipeline=2", {"use_sliding_window": True}, "sliding"),
    ],
)
def test_a_model_that_cannot_be_split_so_is_refused_before_anything_starts(split, changed, said) -> None:
    num = split.partition("=")[2]
    config = train(f"num_workers={num}", f"parallelism.{split}", "zero_stage=1", "batch_size=32")
    with pytest.raises(InvalidValue, match=said):
        check_model(config, {**QWEN, **changed}, "qwen@1")


def test_fewer_key_value_heads_than_sequence_parts_are_repeated() -> None:
    check_model(train("num_workers=4", "parallelism.sequence=4"), QWEN, "qwen@1")


def test_slices_lose_no_label_at_their_borders() -> None:
    ids = torch.arange(1, 8)[None]
    batch = {"input_ids": ids, "labels": ids.clone()}
    parts = [sliced(batch, part, 2, pad_id=0) for part in (0, 1)]
    assert torch.cat([part["input_ids"] for part in parts], 1).tolist() == [[1, 2, 3, 4, 5, 6, 7, 0]]
    assert torch.cat([part["shift_labels"] for part in parts], 1).tolist() == [[2, 3, 4, 5, 6, 7, -100, -100]]
    assert parts[1]["position_ids"].tolist() == [[4, 5, 6, 7]]
