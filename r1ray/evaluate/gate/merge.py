"""Does a merged adapter answer as the adapter beside its base does? On the gold answers of real dialogues, token by token.

Serving merges adapters into their base; a merge into rounded weights can lose what was learnt (LLaMA-Factory issues 8501, 5517).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from r1ray.model.load import load_model, training_tokenizer
from r1ray.model.soft import soft_kind
from r1ray.model.template import training_ids
from r1ray.registry import Registry
from r1ray.types import Artifact, Conversation

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["can_be_merged", "merge_agreement"]

_LONGEST = 1024  # tokens of a dialogue that are compared


def can_be_merged(artifact: Artifact) -> bool:
    """An adapter that changes weights; a soft prompt is served as it is."""
    return artifact.manifest.kind == "adapter" and soft_kind(artifact.path) is None


def merge_agreement(artifact: Artifact, dialogues: Sequence[Conversation], registry: Registry, *, device: str = "cpu") -> float:
    """Share of the assistant's tokens before which the merged and the unmerged model think the same next token the likeliest."""
    tokenizer = training_tokenizer(artifact)
    texts = []
    for dialogue in dialogues:
        ids, mask = training_ids(tokenizer, dialogue.messages, system_prompt=artifact.manifest.system_prompt)
        texts.append((ids[:_LONGEST], mask[:_LONGEST]))
    apart = _predictions(load_model(artifact, registry=registry, device=device, merge=False), texts)
    merged = _predictions(load_model(artifact, registry=registry, device=device), texts)
    same = sum(int((a == b).sum()) for a, b in zip(apart, merged, strict=True))
    return same / max(1, sum(len(a) for a in apart))


def _predictions(model: Any, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Tensor]:
    """Of each text the likeliest token in place of every one that the assistant said."""
    import torch

    found = []
    with torch.inference_mode():
        for ids, mask in texts:
            likeliest = model(input_ids=torch.tensor([list(ids)], device=model.device)).logits[0].argmax(-1).cpu()
            found.append(likeliest[:-1][torch.tensor(list(mask[1:]), dtype=torch.bool)])
    return found
