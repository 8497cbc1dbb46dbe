from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from r1ray.config import load_config
from r1ray.errors import TrainingError
from r1ray.model.adapters import lora
from r1ray.model.family import family_of
from r1ray.model.importer import import_model
from r1ray.train.config import FinetuneConfig
from r1ray.train.export import Result, export


@pytest.fixture
def base(tiny_llama, registry):
    return import_model(str(tiny_llama), name="tiny", registry=registry)


def trained(base, out: Path, value: float) -> Result:
    """A checkpoint with an adapter whose B matrices are all `value`; as initialised they are zero."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base.path), lora(family_of({"model_type": "llama"}), rank=4))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(value)
    model.save_pretrained(out)
    config = load_config(FinetuneConfig, None, ["name=tuned", "data.path=x", "data.system_prompt=Help.", "collection=bank"])
    return Result(checkpoint=out, dtype="float32", config=config, base=base, data_hash="d", metrics={"train_loss": 1.0}, run_id="run")


def test_an_adapter_is_registered_with_all_that_serving_needs(base, registry, tmp_path) -> None:
    manifest = export(trained(base, tmp_path, 0.01), registry).manifest
    assert (manifest.kind, manifest.base, manifest.parents) == ("adapter", base.ref, (base.ref,))
    assert (manifest.system_prompt, manifest.collection, manifest.data_hash) == ("Help.", "bank", "d")
    assert manifest.template == base.manifest.template
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= manifest.files.keys()
    assert str(base.path) not in (registry.resolve("tuned").path / "adapter_config.json").read_text()


@pytest.mark.parametrize(
    ("value", "changes", "message"),
    [
        (float("nan"), {}, "lora_B.*diverged"),
        (0.0, {}, r"All \d+ lora_B matrices are zero.*no step has changed the adapter\. Every gradient was zero"),
        (0.0, {"objective": "grpo"}, "the answers of a group got equal rewards"),
        (0.0, {"dtype": "float16"}, "the scale of the loss"),
    ],
)
def test_an_adapter_that_is_broken_or_was_never_moved_is_not_registered(base, registry, tmp_path, value, changes, message) -> None:
    result = trained(base, tmp_path, value)
    objective, dtype = changes.get("objective", "sft"), changes.get("dtype", "float32")
    config = result.config.model_copy(update={"train": result.config.train.model_copy(update={"objective": objective})})
    with pytest.raises(TrainingError, match=message):
        export(replace(result, config=config, dtype=dtype), registry)
    assert [model.name for model in registry.models()] == ["tiny"]


def test_the_card_says_what_the_version_is_and_what_it_came_from(base, registry, tmp_path) -> None:
    artifact = export(trained(base, tmp_path, 0.01), registry)
    card = (artifact.path / "README.md").read_text()
    for said in (
        "base_model: tiny",
        "- lora",
        f"| base | {base.ref} |",
        "| train_loss | 1 |",
        "| lora.rank | 16 |",
        "Help.",
        artifact.manifest.weights_sha256,
    ):
        assert said in card
    assert "prompt.num_virtual_tokens" not in card, "settings of another method"
