"""A fused layer computes what PEFT's does, and leaves alone what it does not know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from r1ray.config import load_config
from r1ray.model.importer import import_model
from r1ray.train.config import FinetuneConfig
from r1ray.train.fused import fuse_adapters
from r1ray.train.objective.base import Bench
from r1ray.train.order import WorkOrder
from r1ray.train.parallel.layout import Layout

BATCH = {"input_ids": torch.arange(20, 44).view(2, 12), "labels": torch.arange(20, 44).view(2, 12)}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(directory: Any, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """Both of LoRA's matrices random, since B begins as zeros."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, **settings), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.train()


def losses_and_gradients(model: Any) -> list[torch.Tensor]:
    loss = model(**BATCH).loss
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)]


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen2"])  # Qwen2's attention has biases
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}])
def test_loss_and_gradients_are_those_of_peft(family, settings, request) -> None:
    directory = request.getfixturevalue(family)
    plain, fused = adapted(directory, **settings), adapted(directory, **settings)
    assert fuse_adapters(fused) == 2 * len(TARGETS)
    theirs, ours = losses_and_gradients(plain), losses_and_gradients(fused)
    assert any(gradient.abs().sum() > 0 for gradient in theirs[1:])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_in_bfloat16_it_is_at_least_as_near_to_float32_as_peft(tiny_llama) -> None:
    exact = losses_and_gradients(adapted(tiny_llama))
    plain, fused = adapted(tiny_llama, torch.bfloat16), adapted(tiny_llama, torch.bfloat16)
    assert fuse_adapters(fused) == 2 * len(TARGETS)

    def distance(model: Any) -> float:
        return sum(float((mine.float() - right).norm()) for mine, right in zip(losses_and_gradients(model), exact, strict=True))

    assert distance(fused) <= 1.1 * distance(plain)


def test_gradient_checkpointing_computes_the_same(tiny_llama) -> None:
    plain, fused = adapted(tiny_llama), adapted(tiny_llama)
    assert fuse_adapters(fused)
    fused.enable_input_require_grads()
    fused.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(losses_and_gradients(fused), losses_and_gradients(plain), rtol=1e-4, atol=1e-6)


def test_a_disabled_or_merged_adapter_is_left_to_peft(tiny_llama) -> None:
    plain, fused = adapted(tiny_llama).eval(), adapted(tiny_llama).eval()
    assert fuse_adapters(fused)
    ids = {"input_ids": BATCH["input_ids"]}
    with torch.no_grad():
        with plain.disable_adapter(), fused.disable_adapter():
            torch.testing.assert_close(fused(**ids).logits, plain(**ids).logits, rtol=0, atol=0)
        merged = fused(**ids).logits
        fused.merge_adapter()
        torch.testing.assert_close(fused(**ids).logits, merged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_dropout": 0.1}, {"lora_bias": True}])
def test_what_it_does_not_know_keeps_its_own_layer(settings, tiny_llama) -> None:
    assert fuse_adapters(adapted(tiny_llama, **settings)) == 0


@pytest.mark.parametrize(("stage", "is_fused"), [(0, True), (2, True), (3, False)])
def test_a_run_fuses_where_its_weights_are_whole(stage, is_fused, tiny_qwen2, registry, settings) -> None:
    base = import_model(str(tiny_qwen2), name="tiny", registry=registry)
    config = load_config(FinetuneConfig, None, ["name=t", "data.path=x", "train.method=lora", f"train.zero_stage={stage}"]).train
    order = WorkOrder(
        config=config, base=base, material=None, run="r", run_directory=settings.home, num_steps=1, dtype="float32",
        attention="eager", settings=settings,
    )  # fmt: skip
    bench = Bench(
        order=order, rank=0, num_workers=1, accumulation=1, staging=settings.home, schedule=None, callbacks=[], layout=Layout(world=1),
        global_rank=0,
    )  # type: ignore[arg-type] # fmt: skip
    layers = [module for module in bench.model().modules() if hasattr(module, "lora_A")]
    assert layers and all(("forward" in vars(layer)) == is_fused for layer in layers)
