"""Paraphrase by a masked language model: a share of a question's tokens is masked at once and drawn from what the model puts there.

Seed 000 masks 30 % with bert-base-chinese. Any local directory with a masked LM and a fast tokenizer will do. Values, numbers, masks
and passages stay; a token is replaced only by one of its kind (Chinese by Chinese, the inside of a word by the inside of a word).
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from r1ray.data.augment.config import MaskedConfig
from r1ray.data.augment.provenance import Made, recorded
from r1ray.data.augment.rules import rng_of
from r1ray.data.augment.spans import entities_of, is_free, protected, question_start
from r1ray.errors import InvalidValue
from r1ray.settings import Settings
from r1ray.types import Conversation

__all__ = ["MaskedParaphrase"]

_HAN = re.compile(r"[\u3400-\u9fff]")
_LATIN = re.compile(r"[A-Za-z]")
_WORD_MARKS = "Ġ▁"


@dataclass(frozen=True, slots=True)
class _Task:
    """One question: where its own text begins, its ids, and the tokens to replace as (position, start, end) in that text."""

    row: Conversation
    turn: int
    start: int
    ids: list[int]
    holes: list[tuple[int, int, int]]


class MaskedParaphrase:
    """Loads the model when it is first used."""

    name = "masked"

    def __init__(self, config: MaskedConfig, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._loaded: tuple[Any, Any] | None = None

    def apply(self, rows: Sequence[Conversation]) -> list[Made | None]:
        made: list[Made | None] = [None] * len(rows)
        tasks = [(place, task) for place, row in enumerate(rows) if (task := self._task(row)) is not None]
        for start in range(0, len(tasks), self._config.batch_size):
            batch = tasks[start : start + self._config.batch_size]
            for (place, task), text in zip(batch, self._filled([task for _, task in batch]), strict=True):
                messages = list(task.row.messages)
                messages[task.turn] = replace(messages[task.turn], content=text)
                made[place] = recorded(task.row, messages, name=self.name, seed=self._seed)
        return made

    def _task(self, row: Conversation) -> _Task | None:
        """The last question with its holes; None when nothing in it may change."""
        tokenizer, _ = self._model()
        turn = max((place for place, m in enumerate(row.messages) if m.role == "user"), default=None)
        if turn is None:
            return None
        text = row.messages[turn].content
        start = question_start(text)
        spans = protected(text, entities_of(row))
        encoded = tokenizer(text[start:], truncation=True, max_length=_longest(tokenizer), return_offsets_mapping=True)
        rng = rng_of(self._seed, self.name, row)
        able = [
            (position, left, right)
            for position, (left, right) in enumerate(encoded["offset_mapping"])
            if _kind(text[start + left : start + right]) and is_free(start + left, start + right, spans)
        ]
        holes = [hole for hole in able if rng.random() < self._config.probability] or able[:1]
        return _Task(row, turn, start, list(encoded["input_ids"]), holes) if holes else None

    def _filled(self, tasks: Sequence[_Task]) -> list[str]:
        import torch

        tokenizer, model = self._model()
        longest = max(len(task.ids) for task in tasks)
        ids_BT = torch.full((len(tasks), longest), int(tokenizer.pad_token_id))
        seen_BT = torch.zeros((len(tasks), longest), dtype=torch.long)
        for place, task in enumerate(tasks):
            ids_BT[place, : len(task.ids)] = torch.tensor(task.ids)
            seen_BT[place, : len(task.ids)] = 1
            ids_BT[place, [position for position, _, _ in task.holes]] = int(tokenizer.mask_token_id)
        with torch.inference_mode():
            logits_BTV = model(input_ids=ids_BT, attention_mask=seen_BT).logits
        return [self._text(task, logits_BTV[place], tokenizer) for place, task in enumerate(tasks)]

    def _text(self, task: _Task, logits_TV: Any, tokenizer: Any) -> str:
        """The turn with every hole filled, from the last to the first so that positions hold."""
        rng = rng_of(self._seed, "masked fill", task.row)
        text = task.row.messages[task.turn].content
        for position, left, right in reversed(task.holes):
            word = self._word(task.ids[position], logits_TV[position], tokenizer, rng)
            if word is not None:
                text = text[: task.start + left] + word + text[task.start + right :]
        return text

    def _word(self, original: int, logits_V: Any, tokenizer: Any, rng: random.Random) -> str | None:
        """One of the `top_k` likeliest tokens of the original's kind; None when the model offers none."""
        wanted = tokenizer.convert_ids_to_tokens(original)
        choices: list[str] = []
        for candidate in logits_V.topk(min(len(logits_V), 20 * self._config.top_k)).indices.tolist():
            token = tokenizer.convert_ids_to_tokens(candidate)
            if candidate == original or candidate in tokenizer.all_special_ids or _shape(token) != _shape(wanted):
                continue
            choices.append(token.removeprefix("##").lstrip(_WORD_MARKS))
            if len(choices) == self._config.top_k:
                break
        return rng.choice(choices) if choices else None

    def _model(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import AutoModelForMaskedLM, AutoTokenizer

            path = Settings().locate(self._config.model)
            try:
                tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
                model = AutoModelForMaskedLM.from_pretrained(path, local_files_only=True).eval()
            except (OSError, ValueError) as error:
                reason = str(error).strip().partition("\n")[0]
                raise InvalidValue(f"No masked language model in {path}: {reason} Set its model to a local directory of one.") from error
            if tokenizer.mask_token_id is None or not tokenizer.is_fast:
                raise InvalidValue(f"{path} has no fast tokenizer with a mask token. Take an encoder such as bert-base-chinese.")
            self._loaded = tokenizer, model
        return self._loaded


def _longest(tokenizer: Any) -> int:
    """Tokenizers without a limit say so by a huge number."""
    limit = int(tokenizer.model_max_length)
    return limit if limit < 100_000 else 512


def _kind(text: str) -> str:
    text = text.strip()
    return "han" if _HAN.search(text) else "latin" if _LATIN.fullmatch(text[:1] or " ") else ""


def _shape(token: str) -> tuple[bool, bool, str]:
    """(inside a word, begins a word by its mark, script)."""
    bare = token.removeprefix("##").lstrip(_WORD_MARKS)
    return token.startswith("##"), token[:1] in _WORD_MARKS, _kind(bare)
