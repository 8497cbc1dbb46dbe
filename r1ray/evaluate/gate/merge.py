"""Does a merged adapter answer as the adapter beside its base does? On the gold answers of real dialogues, token by token.

Serving merges adapters into their base; a merge into rounded weights can lose what was learnt (LLaMA-Factory issues 8501, 5517). Rounding
alone decides between tokens that are nearly as likely: of 1,655 Chinese tokens, bfloat16 chooses another one than float32 for 2.1 %, merged
or not. So two tokens whose logits are at most `_ROUNDINGS` steps of the number type apart are the same choice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from r1ray.model.load import load_model, training_tokenizer
from r1ray.model.soft import soft_kind
from r1ray.model.template import training_ids
from r1ray.registry import Registry
from r1ray.types import Artifact, Conversation

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["agree", "can_be_merged", "merge_agreement"]

_LONGEST = 1024  # tokens of a dialogue that are compared
_ROUNDINGS = 2  # 0.25 for bfloat16 logits between 16 and 32


def can_be_merged(artifact: Artifact) -> bool:
    """An adapter that changes weights; a soft prompt is served as it is."""
    return artifact.manifest.kind == "adapter" and soft_kind(artifact.path) is None


def merge_agreement(artifact: Artifact, dialogues: Sequence[Conversation], registry: Registry, *, device: str = "cpu") -> float:
    """Share of the assistant's tokens where the merged model chooses what the unmerged one does, or thinks as likely up to rounding."""
    tokenizer = training_tokenizer(artifact)
    texts = []
    for dialogue in dialogues:
        ids, mask = training_ids(tokenizer, dialogue.messages, system_prompt=artifact.manifest.system_prompt)
        texts.append((ids[:_LONGEST], mask[:_LONGEST]))
    merged = load_model(artifact, registry=registry, device=device)
    chosen = [logits.argmax(-1) for logits in _answers(merged, texts)]
    del merged
    apart = load_model(artifact, registry=registry, device=device, merge=False)
    same = [agree(logits, choice) for logits, choice in zip(_answers(apart, texts), chosen, strict=True)]
    return sum(int(each.sum()) for each in same) / max(1, sum(len(each) for each in same))


def agree(logits: Tensor, chosen: Tensor) -> Tensor:
    """[n, vocabulary], [n] -> [n]: is the chosen token the likeliest, or as likely up to rounding of the logits' own number type?"""
    import torch

    best = logits.max(-1).values.float()
    step = torch.finfo(logits.dtype).eps * torch.exp2(torch.floor(torch.log2(best.abs().clamp(min=1e-6))))
    return best - logits.gather(-1, chosen[:, None])[:, 0].float() <= _ROUNDINGS * step


def _answers(model: Any, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Iterator[Tensor]:
    """Of each text the logits in place of every token that the assistant said, in the model's number type."""
    import torch

    with torch.inference_mode():
        for ids, mask in texts:
            logits = model(input_ids=torch.tensor([list(ids)], device=model.device)).logits[0, :-1]
            yield logits[torch.tensor(list(mask[1:]), dtype=torch.bool, device=logits.device)].to(model.dtype)
