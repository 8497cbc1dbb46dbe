"""Plain LoRA adapters as files: which weight gets which update, and a base with the updates in it, one tensor at a time.

Serving and evaluation need no PEFT for them, whose import alone takes seconds. What is more than plain LoRA (DoRA, trained biases or
embeddings, prompt tuning) is refused here; `load.load_model` merges what can be merged.

Shapes: r rank, N outputs, K inputs; A (r, K), B (N, r).
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1ray.errors import AdapterMismatch
from r1ray.model.checkpoint import Tensors, read_json

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LowRank", "merged", "read_lora", "why_not_plain"]

LowRank = Mapping[str, "tuple[Tensor, Tensor]"]
"""Name of a weight -> A (r, K) and B (N, r) with the adapter's scale in it, float32."""

_PREFIX = "base_model.model."  # PEFT saves the names of its own wrapper
_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_EXTRAS = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "megatron_config", "layer_replication", "use_qalora")


def why_not_plain(path: Path) -> str | None:
    """What makes the adapter at `path` more than plain LoRA; None when it is plain."""
    if not (path / _CONFIG).is_file() or not (path / _WEIGHTS).is_file():
        return f"{path} holds no {_CONFIG} with {_WEIGHTS}"
    config = read_json(path / _CONFIG)
    if config.get("peft_type") != "LORA":
        return f"it is a {config.get('peft_type')} adapter"
    if config.get("bias", "none") != "none":
        return "it trained biases"
    extra = next((key for key in _EXTRAS if config.get(key)), None)
    return f"it uses {extra}" if extra else None


def read_lora(path: Path) -> LowRank:
    """The updates of the adapter in the PEFT directory at `path`.

    Raises:
        AdapterMismatch: no adapter lies there or a damaged one, it is more than plain LoRA, or a matrix has no partner.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if why := why_not_plain(path):
        raise AdapterMismatch(f"The adapter at {path} cannot be applied as low-rank updates: {why}. Merge it into its base first.")
    config = read_json(path / _CONFIG)
    try:
        tensors = load_file(path / _WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise AdapterMismatch(f"The adapter at {path} cannot be read: {error}. Copy or train it again.") from error
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, found, half = name.removeprefix(_PREFIX).rpartition(".lora_")
        if not found or half not in ("A.weight", "B.weight"):
            raise AdapterMismatch(f"The adapter at {path} changes {name}, which is no low-rank update. Merge it into its base first.")
        halves.setdefault(f"{module}.weight", {})[half[0]] = tensor
    if odd := next((name for name, pair in halves.items() if len(pair) != 2), None):
        raise AdapterMismatch(f"The adapter at {path} has only half of the update of {odd}. Train it again.")
    return {name: (pair["A"].float(), pair["B"].float() * _scale(config, name, pair["A"].shape[0])) for name, pair in halves.items()}


def merged(tensors: Tensors, updates: LowRank) -> Tensors:
    """The base's tensors with the updates added in float32; each is computed when it is asked for."""

    def tensor(name: str) -> Tensor | None:
        weight = tensors(name)
        if weight is None or name not in updates:
            return weight
        a, b = updates[name]
        if weight.shape != (b.shape[0], a.shape[1]):
            raise AdapterMismatch(
                f"The adapter's update of {name} is {(b.shape[0], a.shape[1])}, the weight {tuple(weight.shape)}. Use its base."
            )
        return weight.float() + b @ a

    return tensor


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    module = name.removesuffix(".weight")
    patterns = config.get("alpha_pattern") or {}
    alpha = next((value for pattern, value in patterns.items() if fnmatch.fnmatch(module, f"*{pattern}")), config["lora_alpha"])
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
