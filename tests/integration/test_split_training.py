"""A model split over two workers of a real Ray cluster, from dialogues to a version that loads in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from r1ray.config import load_config
from r1ray.model.importer import import_model
from r1ray.model.load import load_model
from r1ray.registry import Registry
from r1ray.train.config import FinetuneConfig
from r1ray.train.launcher import finetune
from r1ray.train.progress import curve

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    turns = [
        [{"role": "user", "content": f"what is {i} plus {i % 5}?"}, {"role": "assistant", "content": f"the answer is {i + i % 5}"}]
        for i in range(24)
    ]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return path


@pytest.fixture(scope="module")
def registry(ray_cluster, tiny_qwen2, tiny_deepseek_v3) -> Registry:
    registry = Registry(ray_cluster.settings)
    import_model(str(tiny_qwen2), name="split-qwen2", registry=registry)
    import_model(str(tiny_deepseek_v3), name="split-r1", registry=registry)
    return registry


@pytest.mark.parametrize(("base", "split"), [("split-qwen2", "tensor"), ("split-r1", "pipeline")])
def test_a_version_trained_in_parts_is_whole(registry, data, base, split) -> None:
    name = f"whole-after-{split}"
    train = {"num_workers": 2, "batch_size": 4, "micro_batch_size": 1, "max_steps": 4, "learning_rate": 5e-3, "dtype": "bfloat16"}
    more = {"method": "full", "zero_stage": 1, "threads_per_worker": 1, "max_failures": 0, f"parallelism.{split}": 2}
    overrides = [f"train.{key}={value}" for key, value in {**train, **more}.items()]
    config = load_config(FinetuneConfig, None, [f"name={name}", f"base={base}", f"data.path={data}", *overrides])
    artifact = finetune(config, registry.settings)
    losses = [step.loss for step in curve(next(registry.settings.checkpoints.glob(f"{name}-*")))]
    assert losses[-1] < losses[0]
    before = load_model(registry.resolve(base), registry=registry, dtype="float32").state_dict()
    after = load_model(artifact, registry=registry, dtype="float32").state_dict()
    assert {key: tensor.shape for key, tensor in after.items()} == {key: tensor.shape for key, tensor in before.items()}
    assert all(not torch.equal(after[key], before[key]) for key in before if key.endswith(("o_proj.weight", "embed_tokens.weight")))
