"""Dialogues -> prompts to answer, once per job and before any worker starts; cached as a mapped file.

A prompt is everything before a dialogue's last assistant turn, under the template for generation; that turn is its reference. Some
prompts are held out: the run is judged on them before and after, and never trains on them. Knows no reward and no model.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from r1ray.data.config import DataConfig
from r1ray.data.read import Loaded
from r1ray.data.split import origins_digest, stem_hash
from r1ray.errors import NothingToTrain
from r1ray.model import template
from r1ray.model.load import load_tokenizer
from r1ray.train.mapped import MappedRows, mapped, write_rows
from r1ray.train.parts import draws
from r1ray.train.tokens import check_left_out
from r1ray.types import Artifact, Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Prompt", "PromptLimits", "PromptSet", "last_answer", "prepare_prompts"]

_FORMAT = 3  # of the cache; raise it when the meaning of a column changes
_SCHEMA = pa.schema([("ids", pa.list_(pa.int32())), ("messages", pa.string()), ("reference", pa.string()), ("held_out", pa.bool_())])
_MOST_HELD_OUT = 0.2  # of the prompts
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What is asked, as tokens and as turns, and the answer that the data gives."""

    ids: list[int]
    messages: tuple[Message, ...]
    reference: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLimits:
    """`max_tokens` of a prompt; `num_held_out` prompts at most are kept from training, drawn by `seed`."""

    max_tokens: int
    num_held_out: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """An Arrow file of columns `ids`, `messages`, `reference` and `held_out`, each side in the order of the data, held-out rows last."""

    path: Path
    num_rows: int
    num_held_out: int
    num_tokens: int
    num_rejected: int

    @property
    def is_mixed(self) -> bool:
        return False

    @property
    def is_complete(self) -> bool:
        return False

    @property
    def told(self) -> str:
        return f"{self.num_rows} prompts, {self.num_tokens} tokens, and {self.num_held_out} held out"

    def lengths(self) -> list[int]:
        """Tokens of each prompt to train on."""
        lengths: list[int] = pc.list_value_length(mapped(self.path)["ids"]).slice(0, self.num_rows).to_pylist()
        return lengths

    def rows(self) -> Sequence[Prompt]:
        """Mapped: each is read when it is asked for."""
        return MappedRows(mapped(self.path).slice(0, self.num_rows), _prompt)

    def held_out(self) -> Sequence[Prompt]:
        return MappedRows(mapped(self.path).slice(self.num_rows), _prompt)


def prepare_prompts(loaded: Loaded, artifact: Artifact, data: DataConfig, limits: PromptLimits, cache: Path) -> PromptSet:
    """The prompt set of a data set under one model's template.

    Raises:
        TooManyBadRows: with the dialogues that have no answer to learn from or are too long, the invalid share exceeds `max_bad_share`.
        NothingToTrain: no prompt is left.
    """
    path = cache / "prompts" / f"{_key(loaded, artifact, data, limits)}.arrow"
    if not path.exists():
        prompts, origins = _encoded(loaded.conversations, load_tokenizer(artifact), data.system_prompt, limits.max_tokens)
        write_rows(path, _SCHEMA, _rows(_Parted.of(prompts, origins, limits)))
    else:
        _log.info("prompts from the cache: %s", path)
    found = _described(path, len(loaded.conversations))
    check_left_out(
        f"dialogues ask nothing before their last answer, or ask it in more than {limits.max_tokens} tokens (train.max_length less "
        "train.grpo.max_new_tokens)",
        (found.num_rejected, len(loaded.conversations)),
        (len(loaded.rejects), loaded.num_rows),
        data.max_bad_share,
    )
    if not found.num_rows:
        raise NothingToTrain(f"None of the {loaded.num_rows} rows of {data.path} is a question with an answer. Add some.")
    return found


def last_answer(conversation: Conversation) -> int:
    """Index of the last assistant turn that answers something; 0 when there is none."""
    return max((i for i, message in enumerate(conversation.messages) if message.role == "assistant"), default=0)


@dataclass(slots=True)
class _Parted:
    """Prompts to train on and prompts to be judged on, each in the order of the data."""

    trained: list[Prompt]
    held_out: list[Prompt]

    @classmethod
    def of(cls, prompts: Sequence[Prompt], origins: Sequence[int], limits: PromptLimits) -> _Parted:
        """Held out are whole origins, an augmented row with the one that it comes from, as many as are room for."""
        num = min(limits.num_held_out, int(_MOST_HELD_OUT * len(prompts)))
        drawn = draws(np.array(origins, np.uint64), limits.seed)
        distinct, counts = np.unique(drawn, return_counts=True)
        held = np.isin(drawn, distinct[np.cumsum(counts) <= num])
        sides: tuple[list[Prompt], list[Prompt]] = ([], [])
        for prompt, is_held in zip(prompts, held.tolist(), strict=True):
            sides[is_held].append(prompt)
        return cls(*sides)


def _encoded(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase, system_prompt: str | None, most_tokens: int
) -> tuple[list[Prompt], list[int]]:
    """(prompts, the hash of what each comes from)."""
    prompts, origins = [], []
    for conversation in conversations:
        end = last_answer(conversation)
        messages = conversation.messages[:end]
        ids = template.prompt_ids(tokenizer, messages, system_prompt=system_prompt) if end else []
        if 0 < len(ids) <= most_tokens:
            prompts.append(Prompt(ids=ids, messages=messages, reference=conversation.messages[end].content))
            origins.append(stem_hash(conversation.id))
        else:
            why = f"its prompt has {len(ids)} tokens" if end else "it answers nothing"
            _log.warning("left out %s: %s", conversation.source or conversation.id, why)
    return prompts, origins


def _key(loaded: Loaded, artifact: Artifact, data: DataConfig, limits: PromptLimits) -> str:
    tokenizer = hashlib.sha256()
    for file in sorted(artifact.path.glob("tokenizer*")):
        tokenizer.update(file.read_bytes())
    shape = [limits.max_tokens, limits.num_held_out, limits.seed]
    origins = origins_digest(stem_hash(one.id) for one in loaded.conversations)
    parts = [_FORMAT, loaded.data_hash, origins, tokenizer.hexdigest(), artifact.manifest.template.sha256, data.system_prompt, *shape]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _rows(parted: _Parted) -> Iterator[dict[str, Any]]:
    for prompts, is_held_out in ((parted.trained, False), (parted.held_out, True)):
        for prompt in prompts:
            messages = json.dumps([[m.role, m.content] for m in prompt.messages], ensure_ascii=False)
            yield {"ids": prompt.ids, "messages": messages, "reference": prompt.reference, "held_out": is_held_out}


def _described(path: Path, num_read: int) -> PromptSet:
    table = mapped(path)
    num_held_out = pc.sum(table["held_out"]).as_py() or 0
    num_rows = table.num_rows - num_held_out
    return PromptSet(
        path=path,
        num_rows=num_rows,
        num_held_out=num_held_out,
        num_tokens=pc.sum(pc.list_value_length(table["ids"]).slice(0, num_rows)).as_py() or 0,
        num_rejected=num_read - table.num_rows,
    )


def _prompt(columns: dict[str, Any]) -> Prompt:
    messages = tuple(Message(role=role, content=text) for role, text in json.loads(columns["messages"]))
    return Prompt(ids=columns["ids"], messages=messages, reference=columns["reference"])
