"""What a soft prompt begins as: its text, with the labels of the data in it, and how many positions that takes.

resolve_soft_prompt(config, rows, base, say)     # driver: no {labels} and no null are left in train.prompt
num_positions(config.train.prompt, tokenizer)

Knows no model: `build` computes the embeddings, or keys and values, of the text.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from r1ray.data.records import Loaded
from r1ray.errors import InvalidValue
from r1ray.model.adapters import MOST_POSITIONS, POSITIONS_BLOCK
from r1ray.model.load import load_tokenizer
from r1ray.train.config import FinetuneConfig, PromptSettings
from r1ray.types import Artifact

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["num_positions", "resolve_soft_prompt"]

LABELS = "{labels}"


def resolve_soft_prompt(config: FinetuneConfig, rows: object, base: Artifact, say: Callable[[str], object]) -> FinetuneConfig:
    """`config` with `train.prompt` as it is trained, where the method has a soft prompt; tells `say` what it begins as.

    Raises:
        InvalidValue: the text wants labels and `rows` have none, or it is longer than a soft prompt may be.
    """
    if config.train.method not in ("prompt", "prefix"):
        return config
    prompt, tokenizer = config.train.prompt, load_tokenizer(base)
    if prompt.init_text is not None and LABELS in prompt.init_text:
        named = ", ".join(_labels(config, rows))
        prompt = prompt.model_copy(update={"init_text": prompt.init_text.replace(LABELS, named)})
    positions, num_tokens = num_positions(prompt, tokenizer), _num_tokens(prompt, tokenizer)
    if prompt.init_text is not None:
        kept = f"its first {positions} of {num_tokens}" if num_tokens > positions else f"{num_tokens}"
        say(f"{positions} positions before every prompt begin as {_short(prompt.init_text)!r}, {kept} tokens")
    prompt = prompt.model_copy(update={"num_virtual_tokens": positions})
    return config.model_copy(update={"train": config.train.model_copy(update={"prompt": prompt})})


def num_positions(prompt: PromptSettings, tokenizer: PreTrainedTokenizerBase) -> int:
    """What `num_virtual_tokens` says, or whole blocks that hold all of the text.

    Raises:
        InvalidValue: no soft prompt may be as long as the text.
    """
    if prompt.num_virtual_tokens is not None:
        return prompt.num_virtual_tokens
    num_tokens = _num_tokens(prompt, tokenizer)
    if num_tokens > MOST_POSITIONS:
        raise InvalidValue(
            f"train.prompt.init_text has {num_tokens} tokens, a soft prompt at most {MOST_POSITIONS}: {_short(prompt.init_text or '')!r}. "
            f"Shorten it, or set train.prompt.num_virtual_tokens={MOST_POSITIONS} to begin as its first {MOST_POSITIONS}."
        )
    return max(1, math.ceil(num_tokens / POSITIONS_BLOCK)) * POSITIONS_BLOCK


def _num_tokens(prompt: PromptSettings, tokenizer: PreTrainedTokenizerBase) -> int:
    return len(tokenizer(prompt.init_text)["input_ids"]) if prompt.init_text else 0


def _labels(config: FinetuneConfig, rows: object) -> list[str]:
    """The names of the intents that rows are annotated with, in words, sorted."""
    if not isinstance(rows, Loaded):
        raise InvalidValue(
            f"train.prompt.init_text has {LABELS}, which are read from dialogues in memory; train.objective={config.train.objective} with "
            f"data.backend={config.data.backend} has none there. Write the names out, or set data.backend=arrow with objective sft."
        )
    noted = (turn.annotations for row in rows.conversations for turn in row.messages if turn.annotations is not None)
    found = sorted({one.intent.replace("_", " ") for one in noted if one.intent})
    if not found:
        raise InvalidValue(
            f"train.prompt.init_text has {LABELS}, and no row of {config.data.path} has an intent. Set train.prompt.init_text to what the "
            "answers are about, or give a table with data.label_column."
        )
    return found


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]}...{text[-17:]}"
