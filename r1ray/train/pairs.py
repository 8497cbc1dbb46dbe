"""Pairs of answers -> token ids of prompt, better and worse answer, once per job and before any worker starts; cached as a mapped file.

The ids come from the model's own training template. A prompt that leaves no room for an answer is rejected; an answer that does not
fit is cut, and counted; a pair whose answers are equal after the cut is rejected. Knows no batch, no model and no loss.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from r1ray.data.config import DataConfig
from r1ray.data.preferences import LoadedPairs, hold_out_pairs
from r1ray.data.split import origins_digest, stem_hash
from r1ray.errors import NothingToTrain
from r1ray.model import template
from r1ray.model.load import training_tokenizer
from r1ray.train.mapped import MappedRows, mapped, write_rows
from r1ray.train.tokens import check_left_out, tokenizer_hash
from r1ray.types import Artifact, Preference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PairLimits", "PairRow", "PairSet", "tokenise_pairs"]

_FORMAT = 2  # of the cache; raise it when the meaning of a column changes
_TOKENS = ("prompt", "chosen", "rejected")
_SCHEMA = pa.schema([*((name, pa.list_(pa.int32())) for name in _TOKENS), ("held_out", pa.bool_()), ("cut", pa.bool_())])
_SHOWN_REJECTS = 3
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLimits:
    """Tokens of prompt and answer together; the share of prompts, and the most pairs, held out by `seed` (`hold_out_pairs`)."""

    max_length: int
    eval_share: float
    eval_limit: int
    seed: int


@dataclass(frozen=True, slots=True)
class PairRow:
    """Token ids of one pair."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]

    @property
    def length(self) -> int:
        """Of the longer of its two sequences: what a forward pass is padded to."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))

    @property
    def num_tokens(self) -> int:
        """Of both sequences; the prompt counts twice, since it is computed twice."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSet:
    """An Arrow file of columns `prompt`, `chosen`, `rejected`, `held_out` and `cut`, held-out rows last, and what it holds."""

    path: Path
    num_rows: int
    num_held_out: int
    num_tokens: int
    num_answer_tokens: int
    num_cut: int
    num_rejected: int

    @property
    def is_mixed(self) -> bool:
        return False

    @property
    def is_complete(self) -> bool:
        return True

    @property
    def told(self) -> str:
        held = f"{self.num_held_out} pairs held out, {self.num_cut} with an answer cut"
        return f"{self.num_rows} pairs, {self.num_tokens} tokens, {self.num_answer_tokens} in answers ({held})"

    def lengths(self) -> list[int]:
        """Tokens of the longer sequence of each pair to train on."""
        table = mapped(self.path).slice(0, self.num_rows)
        prompts, *answers = (pc.list_value_length(table[name]) for name in _TOKENS)
        lengths: list[int] = pc.add(prompts, pc.max_element_wise(*answers)).to_pylist()
        return lengths

    def rows(self) -> tuple[Sequence[PairRow], Sequence[PairRow]]:
        """(pairs to train on, pairs held out); mapped, each read when it is asked for."""
        table = mapped(self.path)
        return MappedRows(table.slice(0, self.num_rows), _row), MappedRows(table.slice(self.num_rows), _row)


def tokenise_pairs(loaded: LoadedPairs, artifact: Artifact, data: DataConfig, limits: PairLimits, cache: Path) -> PairSet:
    """The token set of a set of pairs under one model's template.

    Raises:
        NothingToTrain: no pair is left to train on.
        TooManyBadRows: with the pairs that do not fit, the invalid share exceeds `data.max_bad_share`.
    """
    origins = origins_digest(stem_hash(pair.id) for pair in loaded.pairs)
    parts = [_FORMAT, loaded.data_hash, origins, tokenizer_hash(artifact), artifact.manifest.template.sha256, data.system_prompt]
    key = hashlib.sha256(json.dumps([*parts, *asdict(limits).values()]).encode()).hexdigest()[:24]
    path = cache / "pairs" / f"{key}.arrow"
    if not path.exists():
        write_rows(path, _SCHEMA, _Encoding(training_tokenizer(artifact), data.system_prompt, limits).rows(loaded))
    else:
        _log.info("tokens from the cache: %s", path)
    tokens = _described(path, len(loaded.pairs))
    _check(tokens, loaded, data, limits.max_length)
    return tokens


class _Encoding:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None, limits: PairLimits) -> None:
        self._tokenizer, self._system_prompt, self._limits = tokenizer, system_prompt, limits
        self._max_length = limits.max_length

    def rows(self, loaded: LoadedPairs) -> Iterator[dict[str, Any]]:
        """Of the pairs that fit: those to train on, then those held out."""
        num_shown = 0
        train, held = hold_out_pairs(loaded.pairs, self._limits.eval_share, most=self._limits.eval_limit, seed=self._limits.seed)
        for pairs, is_held_out in ((train, False), (held, True)):
            for pair in pairs:
                row = self._row(pair, is_held_out)
                if isinstance(row, dict):
                    yield row
                elif (num_shown := num_shown + 1) <= _SHOWN_REJECTS:
                    _log.warning("left out %s: %s", pair.source or pair.id, row)

    def _row(self, pair: Preference, is_held_out: bool) -> dict[str, Any] | str:
        """The pair's row, or why it has none."""
        prompt, chosen = template.answer_ids(self._tokenizer, pair.prompt, pair.chosen, system_prompt=self._system_prompt)
        other, rejected = template.answer_ids(self._tokenizer, pair.prompt, pair.rejected, system_prompt=self._system_prompt)
        room = self._max_length - len(prompt)
        reason = self._problem(prompt, other, chosen[: max(room, 0)], rejected[: max(room, 0)])
        if reason is not None:
            return reason
        is_cut = max(len(chosen), len(rejected)) > room
        return dict(zip(_SCHEMA.names, (prompt, chosen[:room], rejected[:room], is_held_out, is_cut), strict=True))

    def _problem(self, prompt: Sequence[int], other: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> str | None:
        if len(prompt) >= self._max_length:
            return f"its prompt has {len(prompt)} tokens, which leaves no room for an answer in train.max_length={self._max_length}"
        if prompt != other:
            return "the chat template renders the prompt differently before the two answers"
        if chosen == rejected:
            return f"its answers are equal within train.max_length={self._max_length}"
        return None if chosen and rejected else "an answer has no token"


def _described(path: Path, num_read: int) -> PairSet:
    table = mapped(path)
    prompts, *answers = (pc.sum(pc.list_value_length(table[name])).as_py() or 0 for name in _TOKENS)
    num_held_out = pc.sum(table["held_out"]).as_py() or 0
    return PairSet(
        path=path,
        num_rows=table.num_rows - num_held_out,
        num_held_out=num_held_out,
        num_tokens=2 * prompts + sum(answers),
        num_answer_tokens=sum(answers),
        num_cut=pc.sum(table["cut"]).as_py() or 0,
        num_rejected=num_read - table.num_rows,
    )


def _row(columns: dict[str, Any]) -> PairRow:
    return PairRow(*(tuple(columns[name]) for name in _TOKENS))


def _check(tokens: PairSet, loaded: LoadedPairs, data: DataConfig, max_length: int) -> None:
    check_left_out(
        f"pairs do not fit train.max_length={max_length} tokens (prompt too long, or answers equal after the cut)",
        (tokens.num_rejected, len(loaded.pairs)),
        (len(loaded.rejects), loaded.num_rows),
        data.max_bad_share,
    )
    if tokens.num_rows == 0:
        raise NothingToTrain(f"None of the {loaded.num_rows} rows of {data.path} is left to train on. Add pairs, or lower eval_share.")
    if tokens.num_rejected:
        _log.warning("%d pairs were left out, since they do not fit train.max_length=%d", tokens.num_rejected, max_length)
    if tokens.num_cut:
        _log.warning("%d pairs have an answer that was cut to fit train.max_length=%d", tokens.num_cut, max_length)
