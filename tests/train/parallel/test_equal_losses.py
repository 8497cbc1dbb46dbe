"""However a model is split over workers, it learns the same: losses in float32 equal those of one worker to 1e-4."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from r1ray.train import checkpoint
from r1ray.train.consolidate import with_weights
from r1ray.train.progress import FILE, curve
from r1ray.train.standing import MARK

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


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stage", [0, 1])
def test_pipeline_parallel_learns_as_one_worker_does(train, alone, model, stage) -> None:
    found = losses(train(model, "train.parallelism.pipeline=2", f"train.zero_stage={stage}"))
    assert found == pytest.approx(alone(model), rel=1e-4)


@pytest.mark.parametrize("split", ["tensor", "pipeline", "sequence"])
def test_llama_learns_in_parts_too(train, alone, split) -> None:
    found = losses(train("llama", f"train.parallelism.{split}=2", "train.zero_stage=1"))
    assert found == pytest.approx(alone("llama"), rel=1e-4)


MEASURED = ("train.eval_share=0.3", "train.eval_every_steps=1")


@pytest.mark.parametrize(
    ("split", "model"), [("tensor", "qwen2"), ("pipeline", "qwen2"), ("pipeline", "deepseek_v3"), ("sequence", "qwen2")]
)
def test_held_out_losses_are_those_of_one_worker_and_training_goes_on_unchanged(train, split, model) -> None:
    runs = [
        curve(train(model, f"train.zero_stage={stage}", *more, *MEASURED, world=world, num_steps=3))
        for world, stage, more in ((1, 0, ()), (2, 1, (f"train.parallelism.{split}=2",)))
    ]
    alone, parts = ([step.marks[MARK] for step in steps] for steps in runs)
    assert parts == pytest.approx(alone, rel=1e-4)
    assert alone[-1] < alone[0]
    assert [step.loss for step in runs[1]] == pytest.approx([step.loss for step in runs[0]], rel=1e-4)


LORA = ("train.method=lora", "train.lora.targets=null", "train.learning_rate=2e-2")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("split", ["tensor", "pipeline", "sequence"])
def test_an_adapter_learns_as_on_one_worker(train, alone, model, split) -> None:
    found = losses(train(model, f"train.parallelism.{split}=2", "train.zero_stage=1", *LORA))
    expected = alone(model, *LORA)
    assert found == pytest.approx(expected, rel=1e-4)
    assert max(expected) > min(expected) + 1e-3, "it learned something"


METHODS = {
    "dora": (*LORA, "train.lora.dora=true"),
    "prompt": ("train.method=prompt", "train.learning_rate=2e-2"),
    "prefix": ("train.method=prefix", "train.learning_rate=2e-2"),
}
AGAIN = ("train.gradient_checkpointing=true",)


@pytest.mark.parametrize(
    ("method", "parts"),
    [("dora", ("train.zero_stage=3", *AGAIN)), ("prompt", ("train.zero_stage=2", *AGAIN)), ("prefix", ("train.zero_stage=2",))],
)
def test_every_method_learns_as_on_one_worker(train, alone, method, parts) -> None:
    found = losses(train("qwen2", *parts, "train.micro_batch_size=2", *METHODS[method]))
    assert found == pytest.approx(alone("qwen2", *METHODS[method]), rel=1e-4)
    assert max(found) > min(found) + 1e-3, "it learned something"


@pytest.mark.parametrize("parts", [("train.zero_stage=2",), ("train.zero_stage=3",), ("train.zero_stage=1", "train.parallelism.tensor=2")])
def test_an_adapter_is_saved_alone_whatever_of_it_the_writing_rank_holds(train, parts) -> None:
    """At ZeRO-3, or of a split layer, it holds a half, which the file must have at least."""
    runs = (train("qwen2", "train.zero_stage=0", *LORA, world=1), train("qwen2", *parts, *LORA))
    saved = [checkpoint.last_good(run) for run in runs]
    (expected, _), (found, _) = (good for good in saved if good is not None)
    right, here = (load_file(place / "adapter_model.safetensors") for place in (expected, found))
    assert right.keys() == here.keys()
    assert all((here[name] - tensor).abs().mean() < 1e-3 for name, tensor in right.items()), "AdamW steps are of 2e-2"
    assert not list(found.glob("model*.safetensors"))


WIDE = {
    "lora": (*LORA, "train.lora.rank=512", "train.lora.alpha=64"),
    "prompt": ("train.method=prompt", "train.prompt.num_virtual_tokens=512", "train.learning_rate=2e-2"),
}


@pytest.mark.parametrize("method", WIDE)
def test_an_adapter_that_zero_3_splits_is_saved_whole(train, method) -> None:
    runs = (train("wide", "train.zero_stage=0", *WIDE[method], world=1), train("wide", "train.zero_stage=3", *WIDE[method]))
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-4)
    saved = [checkpoint.last_good(run) for run in runs]
    right, here = (load_file(good[0] / "adapter_model.safetensors") for good in saved if good is not None)
    assert {name: tensor.shape for name, tensor in here.items()} == {name: tensor.shape for name, tensor in right.items()}
    assert max(tensor.numel() for tensor in right.values()) > 100_000
    assert all((here[name] - tensor).abs().mean() < 1e-3 for name, tensor in right.items()), "AdamW steps are of 2e-2"


def weights(directory) -> dict[str, torch.Tensor]:
    """Of the run's last checkpoint, as export takes them; a matrix that is tied to the embedding may be there once or twice."""
    good = checkpoint.last_good(directory)
    assert good is not None
    found = {name: tensor for file in with_weights(good[0], "float32") for name, tensor in load_file(file).items()}
    if "lm_head.weight" in found and torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"]):
        del found["lm_head.weight"]
    return found


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("split", [("tensor", 2), ("pipeline", 1), ("sequence", 2), ("sequence", 3)])
def test_a_split_model_is_saved_whole(train, model, split) -> None:
    degree, stage = split
    expected = weights(train(model, "train.zero_stage=0", world=1))
    found = weights(train(model, f"train.parallelism.{degree}=2", f"train.zero_stage={stage}"))
    assert {name: tensor.shape for name, tensor in found.items()} == {name: tensor.shape for name, tensor in expected.items()}
    assert all((found[name] - expected[name]).abs().mean() < 1e-4 for name in expected), "AdamW's first steps are of 5e-3"


@pytest.mark.parametrize(("split", "model"), [("tensor", "deepseek_v3"), ("pipeline", "qwen2"), ("sequence", "qwen2")])
def test_a_split_training_resumes_with_the_same_losses(train, alone, split, model, tmp_path) -> None:
    settings = (f"train.parallelism.{split}=2", "train.zero_stage=1", "train.checkpoint_every_steps=2")
    calm = losses(train(model, *settings))
    assert calm == pytest.approx(alone(model), rel=1e-4), "saving gathers weights and changes none"
    place = tmp_path / "run"
    place.mkdir()
    train(model, *settings, directory=place)
    newest, before = checkpoint.found(place)
    shutil.rmtree(newest)
    assert checkpoint.read(before).step == 2
    train(model, *settings, directory=place)
    lines = (place / FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 3, 4]
    assert losses(place) == calm
