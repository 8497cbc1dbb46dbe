"""LoRA's configuration for a family: PEFT's class from our few settings. Knows no job and no training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from r1ray.model.family import Family

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["lora"]


def lora(
    family: Family,
    *,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    use_dora: bool = False,
) -> LoraConfig:
    """A LoRA (or, with `use_dora`, a DoRA) configuration for causal LM training.

    Args:
        family: Gives the linear layers to adapt when `targets` is None.
        rank: Rank r of the update (seeds 001, 002, 004: 8-64).
        alpha: The update is scaled by alpha / rank.
        dropout: Share of the adapter's inputs that is dropped in training.
        targets: Names of linear layers instead of the family's; `["all-linear"]` is PEFT's own choice of all.
        use_dora: Train the weights' magnitude apart from their direction (arXiv 2402.09353).
    """
    from peft import LoraConfig, TaskType

    chosen = list(targets) if targets is not None else family.lora_targets
    names = "all-linear" if chosen in ("all-linear", ["all-linear"]) else list(chosen)
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, use_dora=use_dora, bias="none"
    )
