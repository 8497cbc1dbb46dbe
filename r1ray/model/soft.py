"""Soft prompts as files: what prompt tuning and prefix tuning trained, read without PEFT.

PEFT stores one matrix `prompt_embeddings`: P rows of embeddings (P, hidden), or of all layers' keys and values
(P, layers * 2 * key heads * head size).

Shapes: P virtual positions, K key heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from r1ray.errors import AdapterMismatch
from r1ray.model.checkpoint import read_json

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SoftPrompt", "read_soft_prompt", "soft_kind"]

_KINDS: dict[str, Literal["prompt", "prefix"]] = {"PROMPT_TUNING": "prompt", "PREFIX_TUNING": "prefix"}


@dataclass(frozen=True, slots=True)
class SoftPrompt:
    """`values` is PEFT's matrix; `kind` says whether its rows are embeddings or keys and values."""

    kind: Literal["prompt", "prefix"]
    values: Tensor

    @property
    def num_tokens(self) -> int:
        return int(self.values.shape[0])

    def keys_and_values(self, num_layers: int, num_heads: int) -> Tensor:
        """Of a prefix: (layers, 2, K, P, D), keys first.

        Raises:
            AdapterMismatch: it was trained for a model of another shape.
        """
        size, rest = divmod(self.values.shape[1], num_layers * 2 * num_heads)
        if rest:
            raise AdapterMismatch(
                f"The prefix has {self.values.shape[1]} numbers per position, which {num_layers} layers of {num_heads} key heads "
                "do not share evenly. It was trained for another base."
            )
        return self.values.view(self.num_tokens, num_layers, 2, num_heads, size).permute(1, 2, 3, 0, 4)


def soft_kind(path: Path) -> Literal["prompt", "prefix"] | None:
    """Whether the adapter at `path` is a soft prompt; None for one that changes weights."""
    config = path / "adapter_config.json"
    return _KINDS.get(str(read_json(config).get("peft_type"))) if config.is_file() else None


def read_soft_prompt(path: Path) -> SoftPrompt:
    """The soft prompt in the PEFT directory at `path`.

    Raises:
        AdapterMismatch: there is none.
    """
    from safetensors.torch import load_file

    kind, weights = soft_kind(path), path / "adapter_model.safetensors"
    values = load_file(weights).get("prompt_embeddings") if kind and weights.is_file() else None
    if kind is None or values is None:
        raise AdapterMismatch(
            f"{path} holds no soft prompt (prompt_embeddings of prompt or prefix tuning). Give such an adapter's directory."
        )
    return SoftPrompt(kind, values.float())
