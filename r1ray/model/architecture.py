"""What config.json says of a model, without importing transformers where plain keys say it all.

Importing transformers' configuration takes longer than packing a small model's weights, and memory that an engine then holds for
good. Only the dense families in their plain form are read here; whatever else, and any file that leaves a number to a default, goes
to transformers, whose classes `PlainConfig` stands in for where numbers are read. Knows no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from r1ray.model.checkpoint import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["PlainConfig", "read_architecture"]

FAMILIES = ("llama", "qwen2", "qwen3")
NUMBERS = frozenset(
    {
        *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"),
        *("vocab_size", "rms_norm_eps", "hidden_act", "max_position_embeddings", "tie_word_embeddings", "eos_token_id"),
    }
)
"""What the file must name, since each family has another default for it."""
UNUSUAL = ("use_sliding_window", "rope_scaling", "quantization_config", "auto_map")


class PlainConfig:
    """A config.json's keys as attributes, and `rope_parameters` as transformers 5 writes them."""

    rope_parameters: Mapping[str, Any]

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.__dict__.update(content)
        self.rope_parameters = _rope(content)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def get_text_config(self) -> PlainConfig:
        return self


def read_architecture(directory: Path) -> PretrainedConfig:
    """transformers' configuration of the model in `directory`, or what reads like it."""
    content = read_json(directory / "config.json")
    if _is_plain(content):
        return cast("PretrainedConfig", PlainConfig(content))
    from transformers import AutoConfig, PretrainedConfig

    found = AutoConfig.from_pretrained(directory)
    assert isinstance(found, PretrainedConfig)
    return found


def _is_plain(content: Mapping[str, Any]) -> bool:
    if content.get("model_type") not in FAMILIES or not content.keys() >= NUMBERS or any(content.get(key) for key in UNUSUAL):
        return False
    if content["model_type"] == "qwen3" and not content.get("head_dim"):  # 128 whatever the sizes say
        return False
    rope = _rope(content)
    return rope.get("rope_type") == "default" and "rope_theta" in rope and not rope.keys() - {"rope_type", "rope_theta"}


def _rope(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Either transformers 5's `rope_parameters` or the `rope_theta` of files before it."""
    if given := content.get("rope_parameters"):
        return {"rope_type": "default", **given}
    return {"rope_type": "default", **({"rope_theta": content["rope_theta"]} if "rope_theta" in content else {})}
