"""Learning from pairs on a real Ray cluster: two workers, DeepSpeed, tiny models."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

from r1ray.config import load_config
from r1ray.model.importer import import_model
from r1ray.model.reward import load_reward_model
from r1ray.registry import Registry
from r1ray.train import checkpoint, runs
from r1ray.train.config import FinetuneConfig
from r1ray.train.launcher import finetune
from r1ray.train.progress import FILE
from r1ray.types import Message

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Thirty pairs: the polite answer is the better one."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": f"what is {i} plus {i % 5}?", "chosen": f"the answer is {i + i % 5}", "rejected": f"go away {i}"} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def registry(ray_cluster, tiny_llama) -> Registry:
    registry = Registry(ray_cluster.settings)
    import_model(str(tiny_llama), name="tiny-pairs", registry=registry)
    return registry


def config(name: str, data: Path, *more: str) -> FinetuneConfig:
    train = {"num_workers": 2, "batch_size": 4, "micro_batch_size": 1, "max_steps": 6, "learning_rate": 5e-3, "dtype": "bfloat16"}
    saving = {"checkpoint_every_steps": 2, "log_every_steps": 2, "threads_per_worker": 1, "max_failures": 0}
    fixed = [
        f"name={name}",
        "base=tiny-pairs",
        f"data.path={data}",
        *(f"train.{key}={value}" for key, value in {**train, **saving}.items()),
    ]
    return load_config(FinetuneConfig, None, [*fixed, *more])


def test_answers_that_were_preferred_are_preferred_after_training_and_a_resumed_run_repeats_its_losses(registry, data, capsys) -> None:
    job = config("polite", data, "train.objective=dpo", "train.method=full", "train.dpo.eval_share=0.2")
    version = finetune(job, registry.settings)
    metrics = version.manifest.metrics
    assert (metrics["held_out_before/accuracy"], metrics["held_out_before/margin"]) == (0.5, 0.0)
    assert metrics["held_out_after/accuracy"] == 1.0 and metrics["held_out_after/margin"] > 0
    assert "held out: accuracy 0.500 -> 1.000" in capsys.readouterr().out
    directory = next(registry.settings.checkpoints.glob("polite-*"))

    (checkpoint.found(directory)[0] / "meta-rank1.json").unlink()  # as if the power had gone in the last save
    state = runs.load(directory)
    assert state is not None
    (directory / "run.json").unlink()
    runs.store(directory, runs.RunState(mlflow_run_id=state.mlflow_run_id, dtype=state.dtype))
    assert finetune(job, registry.settings).version == version.version + 1
    seen = defaultdict(set)
    for line in (directory / FILE).read_text().splitlines():
        step = json.loads(line)
        seen[step["step"]].add((step["loss"], step["marks"]["margin"], step["marks"]["accuracy"]))
    assert sorted(seen) == [1, 2, 3, 4, 5, 6]
    assert all(len(values) == 1 for values in seen.values())
    assert sum(1 for _ in (directory / FILE).open()) == 8


def test_two_workers_ask_the_base_as_the_steps_of_a_timed_run_come(registry, data) -> None:
    timed = ["train.max_steps=null", "train.max_seconds=3", "train.num_epochs=500", "train.dpo.eval_share=0.2"]
    other = "train.seed=3"  # other pairs are held out: no other test has kept what the base says of these
    metrics = finetune(config("timed", data, "train.objective=dpo", other, *timed), registry.settings).manifest.metrics
    assert (metrics["held_out_before/accuracy"], metrics["held_out_before/margin"]) == (0.5, 0.0)
    assert metrics["held_out_after/margin"] > 0
    kept = max((registry.settings.cache / "reference").iterdir(), key=lambda path: path.stat().st_mtime)
    assert len(list(kept.glob("*.parquet"))) > 1, "the held-out pairs, then those of the first steps, ..."


def test_a_reward_model_scores_the_better_answer_higher(registry, data) -> None:
    version = finetune(config("scorer", data, "train.objective=reward", "train.method=full", "train.zero_stage=3"), registry.settings)
    assert version.manifest.kind == "reward"
    assert version.manifest.metrics["held_out_after/accuracy"] == 1.0
    judge = load_reward_model(version, registry=registry)
    asked = (Message(role="user", content="what is 3 plus 3?"),)
    good, bad = judge.score([asked, asked], ["the answer is 6", "go away 3"])
    assert good > bad
