"""However a model is split over workers, it learns the same: losses in float32 equal those of one worker to 1e-4."""

from __future__ import annotations

import pytest

from r1ray.train.progress import curve

MODELS = ("qwen2", "deepseek_v3")


def losses(directory) -> list[float]:
    return [step.loss for step in curve(directory)]


@pytest.fixture
def alone(train):
    """Losses of one worker at ZeRO stage 0."""
    return lambda model, *more: losses(train(model, "train.zero_stage=0", *more, world=1))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_learn_as_one_worker_does(train, alone, model, stage) -> None:
    found = losses(train(model, f"train.zero_stage={stage}"))
    assert found == pytest.approx(alone(model), rel=1e-4)
    assert found[-1] < found[0]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_tensor_parallel_learns_as_one_worker_does(train, alone, model, stage) -> None:
    found = losses(train(model, "train.parallelism.tensor=2", f"train.zero_stage={stage}"))
    assert found == pytest.approx(alone(model), rel=1e-4)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_sequence_parallel_learns_as_one_worker_does(train, alone, model, stage) -> None:
    found = losses(train(model, "train.parallelism.sequence=2", f"train.zero_stage={stage}"))
    assert found == pytest.approx(alone(model), rel=1e-4)
