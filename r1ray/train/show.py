"""What will be trained, to look at before paying for it: dialogues as the model sees them, the part that carries loss marked.

    jobs/finetune.py --show 3   ->   <|im_start|>user
                                     Block my card.<|im_end|>
                                     <|im_start|>assistant
                                     ⟦Of course.<|im_end|>⟧

A terminal shows the marked part in green. Knows no training.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["shown"]

OPEN, CLOSE = "⟦", "⟧"


def shown(rows: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]], tokenizer: PreTrainedTokenizerBase, num: int) -> str:
    """The first `num` dialogues of (input ids, masks): special tokens written out, trained stretches between ⟦ and ⟧."""
    texts = []
    for number, (ids, mask) in enumerate(itertools.islice(zip(*rows, strict=True), num), start=1):
        trained = [0, *mask[1:]]  # nothing predicts the very first token
        head = f"--- dialogue {number}: {len(ids)} tokens, {sum(trained)} carry loss"
        texts.append(f"{head}\n{''.join(_stretches(ids, trained, tokenizer))}")
    return "\n".join(texts)


def _stretches(ids: Sequence[int], trained: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    found = []
    for is_trained, group in itertools.groupby(range(len(ids)), key=lambda place: bool(trained[place])):
        text = str(tokenizer.decode([ids[place] for place in group], skip_special_tokens=False))
        found.append(f"{OPEN}{text}{CLOSE}" if is_trained else text)
    return found
