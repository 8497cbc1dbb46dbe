"""PEFT's configuration of what is trained on a frozen base, from our few settings: LoRA and its kin, prompt tuning, prefix tuning.

Knows no job and no training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from r1ray.model.family import Family

if TYPE_CHECKING:
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig

__all__ = ["MOST_POSITIONS", "POSITIONS_BLOCK", "lora", "prefix_tuning", "prompt_tuning"]

POSITIONS_BLOCK = 32
"""A soft prompt has whole blocks of the engine's KV cache, which all streams share."""
MOST_POSITIONS = 1024


def lora(  # noqa: PLR0913 - one parameter per setting of LoRA
    family: Family,
    *,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    experts: bool = False,
    use_dora: bool = False,
    use_rslora: bool = False,
) -> LoraConfig:
    """A LoRA (or, with `use_dora`, a DoRA) configuration for causal LM training.

    Args:
        family: Gives the linear layers to adapt when `targets` is None.
        rank: Rank r of the update (seeds 001, 002, 004: 8-64).
        alpha: The update is scaled by alpha / rank; with `use_rslora` by alpha / sqrt(rank).
        dropout: Share of the adapter's inputs that is dropped in training.
        targets: Names of linear layers instead of the family's; `["all-linear"]` is PEFT's own choice of all.
        experts: Adapt the routed experts' fused matrices too, where the family has them (`family.expert_parameters`).
        use_dora: Train the weights' magnitude apart from their direction (arXiv 2402.09353).
        use_rslora: Keep the update's size stable at high ranks (arXiv 2312.03732).
    """
    from peft import LoraConfig, TaskType

    chosen = list(targets) if targets is not None else family.lora_targets
    names = "all-linear" if chosen in ("all-linear", ["all-linear"]) else list(chosen)
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=names,
        target_parameters=list(family.expert_parameters) if experts else None,
        use_dora=use_dora,
        use_rslora=use_rslora,
        bias="none",
    )


def prompt_tuning(num_virtual_tokens: int, init_text: str | None, tokenizer: Path) -> PromptTuningConfig:
    """Trained embeddings before every prompt (arXiv 2104.08691), begun as those of `init_text` or of random words."""
    from peft import PromptTuningConfig, PromptTuningInit, TaskType

    if init_text is None:
        return PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM, num_virtual_tokens=num_virtual_tokens, prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB
        )
    return PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=num_virtual_tokens,
        prompt_tuning_init=PromptTuningInit.TEXT,
        prompt_tuning_init_text=init_text,
        tokenizer_name_or_path=str(tokenizer),
    )


def prefix_tuning(num_virtual_tokens: int) -> PrefixTuningConfig:
    """Trained keys and values before every prompt, in each layer (arXiv 2101.00190)."""
    from peft import PrefixTuningConfig, TaskType

    return PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=num_virtual_tokens)
