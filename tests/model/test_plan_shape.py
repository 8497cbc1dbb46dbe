"""Parameter counts against transformers' own models on torch's meta device, and against the published sizes."""

from __future__ import annotations

import json

import pytest

from r1ray.errors import ModelNotFound, UnsupportedModel
from r1ray.model.plan.adapter import adapter_of
from r1ray.model.plan.catalog import CONFIGS, find, names
from r1ray.model.plan.shape import shape_of

PUBLISHED = {  # billions, from the model cards
    "r1": 671.0,
    "r1-distill-qwen-1.5b": 1.78,
    "r1-distill-qwen-7b": 7.62,
    "r1-distill-llama-8b": 8.03,
    "r1-distill-qwen-14b": 14.77,
    "r1-distill-qwen-32b": 32.76,
    "r1-distill-llama-70b": 70.55,
}

SMALL = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 101}
LATENT = {"kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 10, "moe_intermediate_size": 28}
EXPERTS = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
VARIANTS = {
    "llama": {"model_type": "llama", "num_key_value_heads": 2},
    "llama tied with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama with its own head size": {"model_type": "llama", "head_dim": 32, "num_key_value_heads": 3},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 3},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 2},
    "qwen2 tied": {"model_type": "qwen2", "num_key_value_heads": 6, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16},
    "qwen3 with bias": {"model_type": "qwen3", "num_key_value_heads": 2, "attention_bias": True},
    "deepseek": {"model_type": "deepseek_v3", "q_lora_rank": 24, **LATENT, **EXPERTS},
    "deepseek without query rank": {"model_type": "deepseek_v3", "q_lora_rank": None, "attention_bias": True, **LATENT, **EXPERTS},
    "deepseek all dense": {"model_type": "deepseek_v3", "q_lora_rank": 24, **LATENT, **EXPERTS, "first_k_dense_replace": 3},
}


def on_meta(config):
    """transformers' model of the config, without memory behind it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    kept = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **kept))


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_counted_as_transformers_builds_them(variant):
    config = {"max_position_embeddings": 64, **SMALL, **VARIANTS[variant]}
    model, shape = on_meta(config), shape_of(config)
    assert shape.parameters.total == sum(p.numel() for p in model.parameters())
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    assert [shape.layer_parameters(number) for number in range(shape.num_layers)] == layers


@pytest.mark.parametrize("name", ["r1", "r1-distill-qwen-1.5b", "r1-distill-llama-8b"])
def test_a_shipped_config_builds_the_model_that_is_counted(name):
    config = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    assert shape_of(config).parameters.total == sum(p.numel() for p in on_meta(config).parameters())


def test_the_shipped_models_have_their_published_sizes():
    assert set(names()) == set(PUBLISHED)
    for name, billions in PUBLISHED.items():
        assert round(find(name).shape.parameters.total / 1e9, 1 if billions > 100 else 2) == billions


def test_r1_has_its_published_prediction_head_and_active_parameters():
    shape = find("deepseek-ai/DeepSeek-R1").shape
    with_head = shape.parameters.total + shape.parameters.prediction_head
    assert 684e9 < with_head < 685e9
    unique = shape.parameters.prediction_head - 2 * shape.vocab * shape.hidden
    assert unique == pytest.approx(11.5e9, rel=0.02)
    assert shape.active_parameters == pytest.approx(37e9, rel=0.02)


def test_the_latent_cache_of_r1_is_smaller_than_the_cache_of_its_70b_distill():
    assert find("r1").shape.kv_bytes_per_token() == 61 * (512 + 64) * 2
    assert find("r1-distill-llama-70b").shape.kv_bytes_per_token() == 80 * 2 * 8 * 128 * 2


def test_operations_per_token_are_two_per_multiplied_weight_and_grow_with_the_context():
    shape = find("r1-distill-qwen-7b").shape
    weights = 2 * (shape.parameters.total - shape.parameters.embedding)
    assert shape.forward_operations(0) == weights
    assert shape.forward_operations(1000) - weights == 4 * 28 * 28 * 128 * 1000


@pytest.mark.parametrize("variant", ["llama", "qwen3", "deepseek", "deepseek without query rank"])
def test_lora_trains_as_many_weights_as_peft_makes(variant):
    from peft import get_peft_model

    from r1ray.model.adapters import lora
    from r1ray.model.family import Family
    from r1ray.model.plan.adapter import projections

    config = {"max_position_embeddings": 64, **SMALL, **VARIANTS[variant], "attention_bias": False}
    shape = shape_of(config)
    targets = [name for name in projections(shape) if name in adapter_targets(shape)]
    family = Family(name=shape.family, lora_targets=tuple(targets))
    model = get_peft_model(on_meta(config), lora(family, rank=4), autocast_adapter_dtype=False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter_of(shape, rank=4).parameters == trained


def adapter_targets(shape):
    from r1ray.model.family import DEEPSEEK_TARGETS, LLAMA_TARGETS

    return ("q_proj", "q_a_proj", "q_b_proj", *DEEPSEEK_TARGETS) if shape.latent else LLAMA_TARGETS


def test_an_unknown_model_is_refused_with_the_nearest_name():
    with pytest.raises(ModelNotFound, match=r"Did you mean r1-distill-qwen-32b\?"):
        find("r1-distil-qwen-32b")


def test_a_directory_is_read_by_its_config_and_an_unknown_family_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 64, **SMALL, **VARIANTS["llama"]}), encoding="utf-8")
    assert find(str(tmp_path)).shape.family == "llama"
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}', encoding="utf-8")
    with pytest.raises(UnsupportedModel, match="mamba"):
        find(str(tmp_path))
