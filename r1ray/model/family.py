"""Which architecture a config.json describes, and what r1ray must know about it beyond what transformers knows.

Reads the config as plain keys; loads no weights and runs no code that comes with a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from r1ray.errors import UnsupportedModel

__all__ = ["Family", "context_length", "family_of", "quantisation"]

LLAMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# PEFT's "all-linear" would adapt DeepSeek's router and leave out its shared experts: attention only, by name.
DEEPSEEK_TARGETS = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """`name` is transformers' model_type; `lora_targets` are the linear layers that LoRA adapts unless told otherwise."""

    name: str
    lora_targets: tuple[str, ...] | Literal["all-linear"]
    has_experts: bool = False

    @property
    def expert_parameters(self) -> tuple[str, ...]:
        """The routed experts' matrices, one per layer for all experts together, as transformers names them."""
        return ("mlp.experts.gate_up_proj", "mlp.experts.down_proj") if self.has_experts else ()


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json's content.

    Raises:
        UnsupportedModel: transformers has no causal LM of this model_type, or the weights belong to another head.
    """
    name = config.get("model_type")
    classes = _causal_classes(name)
    if not classes:
        raise UnsupportedModel(f"model_type {name!r} is no causal language model that transformers can load. Import a decoder model.")
    architectures = config.get("architectures") or list(classes)
    if not set(architectures) & set(classes):
        wanted = " or ".join(sorted(classes))
        raise UnsupportedModel(f"The weights are for {', '.join(architectures)}, not for generating text. Import a {wanted} checkpoint.")
    return _family(str(name), config)


def context_length(config: Mapping[str, Any]) -> int:
    """Longest sequence that the position encoding was made for, in tokens."""
    for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"):
        if isinstance(value := config.get(key), int) and value > 0:
            return value
    raise UnsupportedModel("config.json names no context length (max_position_embeddings). Add it as the model's card states.")


def quantisation(config: Mapping[str, Any]) -> str | None:
    """How a config.json says that its weights are stored: fp8, gptq, awq, ...; None for plain ones."""
    settings = config.get("quantization_config") or config.get("compression_config")
    return str(settings.get("quant_method", "an unnamed format")) if settings else None


def _family(name: str, config: Mapping[str, Any]) -> Family:
    if name in {"llama", "qwen2"}:
        return Family(name=name, lora_targets=LLAMA_TARGETS)
    if name == "deepseek_v3":
        query = ("q_a_proj", "q_b_proj") if config.get("q_lora_rank") else ("q_proj",)
        return Family(name=name, lora_targets=(*query, *DEEPSEEK_TARGETS), has_experts=True)
    experts = any(config.get(key) for key in ("n_routed_experts", "num_experts", "num_local_experts"))
    return Family(name=name, lora_targets="all-linear", has_experts=experts)


def _causal_classes(name: object) -> frozenset[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(name, ())
    return frozenset([found] if isinstance(found, str) else found)
