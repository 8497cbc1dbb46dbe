"""GRPO by two workers and a distillation on a real Ray cluster: rewards per axis, what is held out, and a version each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r1ray.config import load_config
from r1ray.model.importer import import_model
from r1ray.model.load import load_model
from r1ray.registry import Registry
from r1ray.train.config import FinetuneConfig
from r1ray.train.launcher import finetune
from r1ray.train.progress import curve

pytestmark = pytest.mark.ray
REWARDS = "[{axis: helpful, kind: overlap}, {axis: short, kind: length, high: 20, unit: characters}]"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    turns = [[{"role": "user", "content": f"{i} plus {i % 5}?"}, {"role": "assistant", "content": f"it is {i + i % 5}"}] for i in range(30)]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return path


@pytest.fixture(scope="module")
def registry(ray_cluster, tiny_llama) -> Registry:
    registry = Registry(ray_cluster.settings)
    import_model(str(tiny_llama), name="tiny-llama", registry=registry)
    return registry


def config(name: str, data: Path, *more: str) -> FinetuneConfig:
    shape = {"batch_size": 4, "micro_batch_size": 4, "max_steps": 3, "learning_rate": 5e-3, "max_length": 96, "threads_per_worker": 1}
    settings = [f"name={name}", "base=tiny-llama", f"data.path={data}", *(f"train.{key}={value}" for key, value in shape.items())]
    return load_config(FinetuneConfig, None, [*settings, "train.dtype=bfloat16", "train.log_every_steps=1", "train.max_failures=0", *more])


def test_two_workers_learn_from_rewards_that_stay_apart(registry, data, capsys) -> None:
    grpo = ["train.objective=grpo", f"train.grpo.rewards={REWARDS}", "train.grpo.num_generations=4", "train.grpo.max_new_tokens=12"]
    more = ["train.num_workers=2", "train.grpo.beta=0.05", "train.grpo.num_held_out=4"]
    artifact = finetune(config("rewarded", data, *grpo, *more), registry.settings)
    manifest = artifact.manifest
    assert (manifest.kind, manifest.metrics["num_steps"]) == ("adapter", 3)
    assert {f"held_out_{when}/{axis}" for when in ("before", "after") for axis in ("helpful", "short")} <= manifest.metrics.keys()
    (directory,) = registry.settings.checkpoints.glob("rewarded-*")
    steps = curve(directory)
    assert all({"reward/helpful", "reward/short", "kl"} <= step.marks.keys() for step in steps)
    assert all(step.tokens > 0 for step in steps)
    said = capsys.readouterr().out
    assert "reward/helpful 0." in said and "held out: short" in said
    assert load_model(artifact, registry=registry, dtype="float32").num_parameters() > 0


def test_a_student_learns_a_teachers_probabilities(registry, data) -> None:
    taught = ["train.objective=distill", "train.distill.teacher=tiny-llama", "train.distill.alpha=0.5", "train.distill.divergence=jsd"]
    artifact = finetune(config("student", data, *taught), registry.settings)
    assert artifact.manifest.metrics["num_steps"] == 3
    assert artifact.manifest.data_hash
