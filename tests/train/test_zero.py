from __future__ import annotations

import pytest

from r1ray.config import load_config
from r1ray.errors import InvalidValue
from r1ray.model.plan.training import ADAPTER_BUCKET, BUCKET
from r1ray.train.config import FinetuneConfig, TrainConfig
from r1ray.train.zero import deepspeed_config


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_stage_reaches_deepspeed_without_anything_to_compile(stage) -> None:
    built = deepspeed_config(TrainConfig(zero_stage=stage, dtype="float32"), accumulation=3, bf16=False)
    assert built["zero_optimization"]["stage"] == stage
    assert built["gradient_accumulation_steps"] == 3
    assert built["gradient_clipping"] == 1.0
    assert "optimizer" not in built
    assert built["zero_optimization"]["reduce_scatter"] is False


def test_stage_0_with_bfloat16_is_refused() -> None:
    with pytest.raises(InvalidValue, match="zero_stage=1"):
        load_config(FinetuneConfig, None, ["data.path=x.csv", "train.zero_stage=0", "train.dtype=bfloat16"])


def test_more_workers_than_dialogues_in_a_batch_are_refused() -> None:
    with pytest.raises(InvalidValue, match="batch_size 2"):
        load_config(FinetuneConfig, None, ["data.path=x.csv", "train.num_workers=4", "train.batch_size=2"])


def test_an_adapters_gradients_get_a_bucket_of_the_size_that_is_planned() -> None:
    methods = ("full", "lora", "prompt", "prefix")
    built = {method: deepspeed_config(TrainConfig(method=method), accumulation=1, bf16=True)["zero_optimization"] for method in methods}
    assert "reduce_bucket_size" not in built.pop("full"), "DeepSpeed's own"
    assert {zero["reduce_bucket_size"] for zero in built.values()} == {ADAPTER_BUCKET} < {ADAPTER_BUCKET, BUCKET}
