"""Which architecture a config describes, and LoRA's targets for it."""

from __future__ import annotations

import pytest

from r1ray.errors import UnsupportedModel
from r1ray.model.adapters import lora
from r1ray.model.family import context_length, family_of


def test_known_families_have_explicit_targets():
    assert family_of({"model_type": "qwen2"}).lora_targets == family_of({"model_type": "llama"}).lora_targets
    assert "gate_proj" in family_of({"model_type": "llama"}).lora_targets


def test_deepseek_adapts_its_compressed_queries_only_where_it_has_them():
    with_rank = family_of({"model_type": "deepseek_v3", "q_lora_rank": 1536}).lora_targets
    without = family_of({"model_type": "deepseek_v3", "q_lora_rank": None}).lora_targets
    assert with_rank == ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    assert without == ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


def test_another_decoder_adapts_all_linear_layers():
    assert family_of({"model_type": "mistral"}).lora_targets == "all-linear"


@pytest.mark.parametrize(
    "config", [{}, {"model_type": "clip"}, {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}]
)
def test_what_generates_no_text_is_refused(config):
    with pytest.raises(UnsupportedModel):
        family_of(config)


def test_context_length_needs_a_key():
    assert context_length({"max_position_embeddings": 77}) == 77
    with pytest.raises(UnsupportedModel, match="context length"):
        context_length({})


def test_lora_takes_the_familys_targets_unless_told_otherwise():
    family = family_of({"model_type": "deepseek_v3"})
    assert lora(family).target_modules == {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    assert lora(family, targets=["o_proj"], use_dora=True).target_modules == {"o_proj"}
    assert lora(family, targets=["all-linear"]).target_modules == "all-linear"
    assert lora(family_of({"model_type": "mistral"}), rank=4, alpha=8).r == 4
