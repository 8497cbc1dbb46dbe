"""What a checkpoint of the weights costs and holds; DeepSpeed's engine is only told of, since it wants a process group."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

from r1ray.model.adapters import lora
from r1ray.model.checkpoint import tensor_shapes, weight_files
from r1ray.model.family import family_of
from r1ray.train import consolidate
from r1ray.train.saved import check_saved
from r1ray.train.trainer import PacedTrainer


@pytest.fixture
def trainer(tmp_path: Path):
    """Of a model at ZeRO-2, which may not be copied as a whole."""

    def make(model: Any) -> PacedTrainer:
        made = PacedTrainer(model=model, args=TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to=[]))
        made.is_deepspeed_enabled = True
        made.accelerator.deepspeed_engine_wrapped = SimpleNamespace(engine=SimpleNamespace(config={"zero_optimization": {"stage": 2}}))
        made.accelerator.get_state_dict = refuse
        return made

    return make


def refuse(*_: Any) -> None:
    raise AssertionError("the whole model would be copied to every rank's memory")


def adapted(directory: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(directory)
    torch.manual_seed(0)
    return get_peft_model(model, lora(family_of(model.config.to_dict()), rank=4))


def flattened(model: Any) -> Any:
    """Its parameters end to end in one storage, as DeepSpeed lays them."""
    parameters = list(model.parameters())
    flat = torch.cat([parameter.data.reshape(-1) for parameter in parameters])
    for parameter, part in zip(parameters, flat.split([parameter.numel() for parameter in parameters]), strict=True):
        parameter.data = part.view(parameter.shape)
    return model


def test_an_adapter_is_saved_alone_and_as_it_is_in_memory(trainer, tiny_deepseek_v3, tmp_path) -> None:
    made = trainer(adapted(tiny_deepseek_v3))
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    made.save_model(str(tmp_path / "saved"))
    found = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    inside = {name.replace(".default.", "."): tensor for name, tensor in made.model.named_parameters() if tensor.requires_grad}
    assert found.keys() == inside.keys() == made.held_norms().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in inside.items())
    assert check_saved(tmp_path / "saved", made.num_trained_tensors, made.held_norms()) == len(inside)
    assert not list((tmp_path / "saved").glob("model*.safetensors"))


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_rank_that_does_not_write_copies_nothing(trainer, tiny_qwen2, tmp_path, monkeypatch, kind) -> None:
    made = trainer(adapted(tiny_qwen2) if kind == "lora" else AutoModelForCausalLM.from_pretrained(tiny_qwen2))
    monkeypatch.setattr(type(made.args), "should_save", False)
    made.model.state_dict = refuse
    made.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()
    assert made.held_norms() == {}


@pytest.mark.parametrize("family", ["tiny_qwen2", "tiny_deepseek_v3"])
def test_all_weights_are_written_layer_by_layer_under_the_names_of_the_base(family, trainer, request, tmp_path, monkeypatch) -> None:
    directory = request.getfixturevalue(family)
    monkeypatch.setattr(consolidate, "_SHARD_BYTES", 100_000)
    model = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25)
    made = trainer(flattened(model))
    made.save_model(str(tmp_path / "saved"))
    files = weight_files(tmp_path / "saved")
    assert len(files) > 2, "a shard is all that is copied at a time"
    assert sum(file.stat().st_size for file in files) < 1.2 * sum(file.stat().st_size for file in weight_files(directory))
    assert tensor_shapes(files) == tensor_shapes(weight_files(directory))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
