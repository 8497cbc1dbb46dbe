"""Every method trains what it says and nothing else, and its first loss is the base's or near it."""

from __future__ import annotations

import pytest
import torch

from r1ray.config import load_config
from r1ray.errors import InvalidValue, UnsupportedModel
from r1ray.model.importer import import_model
from r1ray.train.build import trained_model
from r1ray.train.config import LEARNING_RATES, FinetuneConfig
from r1ray.train.loss import add_supervised_loss
from r1ray.train.order import WorkOrder

BATCH = {"input_ids": torch.arange(20, 44)[None], "labels": torch.arange(20, 44)[None]}


def built(base, settings, *changes, dtype="float32"):
    config = load_config(FinetuneConfig, None, ["name=t", "data.path=x", *changes]).train
    order = WorkOrder(
        config=config, base=base, material=None, run="r", run_directory=settings.home, num_steps=1, dtype=dtype,
        attention="eager", settings=settings,
    )  # fmt: skip
    return trained_model(order)


def loss_of(model):
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    add_supervised_loss(plain)
    return model(**BATCH, supervised=True)


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        (("train.method=full",), "model."),
        (("train.method=lora",), "lora_"),
        (("train.method=lora", "train.lora.dora=true"), "lora_"),
        (("train.method=lora", "train.lora.rslora=true", "train.lora.rank=64"), "lora_"),
        (("train.method=prompt",), "prompt_encoder"),
        (("train.method=prefix",), "prompt_encoder"),
    ],
)
def test_a_method_trains_its_own_parameters_only(changes, trained, tiny_qwen2, registry, settings) -> None:
    model = built(import_model(str(tiny_qwen2), name="tiny", registry=registry), settings, *changes)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names and all(trained in name for name in names)
    loss_of(model).backward()
    moved = [name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.abs().sum() > 0]
    assert moved and set(moved) <= set(names)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("objective", ["sft", "reward"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_model_is_built_in_float16_for_gpus_without_bfloat16(method, objective, tiny_qwen2, registry, settings) -> None:
    base = import_model(str(tiny_qwen2), name="tiny", registry=registry)
    model = built(base, settings, f"train.method={method}", f"train.objective={objective}", dtype="float16")
    trained = [parameter.dtype for parameter in model.parameters() if parameter.requires_grad]
    assert set(trained) == {torch.float16}


def test_a_prefix_begins_as_the_text_before_the_dialogue(tiny_qwen2, registry, settings) -> None:
    base = import_model(str(tiny_qwen2), name="tiny", registry=registry)
    model = built(base, settings, "train.method=prefix", "train.prompt.init_text=hello there")
    ids = torch.tensor([(_ids(base, "hello there") * 32)[:32]])
    before = {"input_ids": torch.cat([ids, BATCH["input_ids"]], 1), "labels": torch.cat([torch.full_like(ids, -100), BATCH["labels"]], 1)}
    before["labels"][0, 32] = -100  # a prefix predicts nothing
    plain = built(base, settings, "train.method=full")
    add_supervised_loss(plain)
    assert loss_of(model).item() == pytest.approx(plain(**before, supervised=True).item(), rel=1e-5)


def _ids(base, text):
    from r1ray.model.load import load_tokenizer

    return load_tokenizer(base)(text)["input_ids"]


def test_experts_are_adapted_by_choice_and_refused_where_there_are_none(tiny_deepseek_v3, tiny_llama, registry, settings) -> None:
    base = import_model(str(tiny_deepseek_v3), name="v3", registry=registry)
    usual = {name for name, parameter in built(base, settings).named_parameters() if parameter.requires_grad}
    assert not any("experts" in name or "mlp.gate" in name for name in usual)
    model = built(base, settings, "train.lora.experts=true")
    added = {name for name, parameter in model.named_parameters() if parameter.requires_grad} - usual
    assert added and all("experts" in name for name in added)
    loss_of(model).backward()
    dense = import_model(str(tiny_llama), name="tiny", registry=registry)
    with pytest.raises(UnsupportedModel, match="has no experts"):
        built(dense, settings, "train.lora.experts=true")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["train.lora.experts=true", "train.lora.dora=true"], "no dora and no dropout"),
        (["train.method=prefix", "train.zero_stage=3"], "set zero_stage=2"),
        (["train.method=prefix", "train.gradient_checkpointing=true"], "set gradient_checkpointing=false"),
        (["train.method=prompt", "train.packing=true"], "set packing=false"),
        (["train.method=prompt", "train.prompt.num_virtual_tokens=20"], "multiple of 32"),
    ],
)
def test_what_cannot_go_together_is_refused_in_the_config(changes, words) -> None:
    with pytest.raises(InvalidValue, match=words):
        load_config(FinetuneConfig, None, ["name=t", "data.path=x", *changes])


@pytest.mark.parametrize("method", ["lora", "full", "prompt", "prefix"])
def test_each_method_has_a_learning_rate_of_its_own_until_somebody_sets_one(method) -> None:
    def rate(*more: str) -> float:
        return load_config(FinetuneConfig, None, ["data.path=x", f"train.method={method}", *more]).train.learning_rate

    assert rate() == rate("train.learning_rate=null") == LEARNING_RATES[method]
    assert rate("train.learning_rate=3e-4") == 3e-4
