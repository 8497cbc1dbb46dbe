"""Pairs of answers -> token ids of prompt, better and worse answer, once per job and before any worker starts; cached as Parquet.

The ids come from the model's own training template. A prompt that leaves no room for an answer is rejected; an answer that does not
fit is cut, and counted; a pair whose answers are equal after the cut is rejected. Knows no batch, no model and no loss.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from r1ray.data.config import DataConfig
from r1ray.data.preferences import LoadedPairs, hold_out_pairs
from r1ray.data.split import origins_digest, stem_hash
from r1ray.errors import NothingToTrain, TooManyBadRows
from r1ray.model import template
from r1ray.model.load import training_tokenizer
from r1ray.train.tokens import tokenizer_hash
from r1ray.types import Artifact, Preference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PairLimits", "PairRow", "PairSet", "tokenise_pairs"]

_FORMAT = 1  # of the cache; raise it when the meaning of a column changes
_SCHEMA = pa.schema([*((name, pa.list_(pa.int32())) for name in ("prompt", "chosen", "rejected")), ("held_out", pa.bool_())])
_SHOWN_REJECTS = 3
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLimits:
    """Tokens of prompt and answer together, and the share of prompts that is held out, drawn by `seed` (`hold_out_pairs`)."""

    max_length: int
    eval_share: float
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
    """A Parquet file of columns `prompt`, `chosen`, `rejected` and `held_out`, and what it holds."""

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
        return [row.length for row in self.rows()[0]]

    def rows(self) -> tuple[list[PairRow], list[PairRow]]:
        """(pairs to train on, pairs held out)."""
        table = pq.read_table(self.path)
        return _rows(table.filter(pc.invert(table["held_out"]))), _rows(table.filter(table["held_out"]))


def tokenise_pairs(loaded: LoadedPairs, artifact: Artifact, data: DataConfig, limits: PairLimits, cache: Path) -> PairSet:
    """The token set of a set of pairs under one model's template.

    Raises:
        NothingToTrain: no pair is left to train on.
        TooManyBadRows: with the pairs that do not fit, the invalid share exceeds `data.max_bad_share`.
    """
    origins = origins_digest(stem_hash(pair.id) for pair in loaded.pairs)
    parts = [_FORMAT, loaded.data_hash, origins, tokenizer_hash(artifact), artifact.manifest.template.sha256, data.system_prompt]
    key = hashlib.sha256(json.dumps([*parts, *asdict(limits).values()]).encode()).hexdigest()[:24]
    path = cache / "pairs" / f"{key}.parquet"
    if not path.exists():
        _write(_Encoding.of(loaded, artifact, data, limits), path)
    else:
        _log.info("tokens from the cache: %s", path)
    tokens = _described(path)
    _check(tokens, loaded, data, limits.max_length)
    return tokens


class _Encoding:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None, max_length: int) -> None:
        self._tokenizer, self._system_prompt, self._max_length = tokenizer, system_prompt, max_length
        self.columns: dict[str, list[Any]] = {name: [] for name in _SCHEMA.names}
        self.num_cut = self.num_rejected = 0

    @classmethod
    def of(cls, loaded: LoadedPairs, artifact: Artifact, data: DataConfig, limits: PairLimits) -> _Encoding:
        encoding = cls(training_tokenizer(artifact), data.system_prompt, limits.max_length)
        train, held = hold_out_pairs(loaded.pairs, limits.eval_share, seed=limits.seed)
        for pairs, is_held_out in ((train, False), (held, True)):
            for pair in pairs:
                encoding.add(pair, is_held_out)
        return encoding

    def add(self, pair: Preference, is_held_out: bool) -> None:
        prompt, chosen = template.answer_ids(self._tokenizer, pair.prompt, pair.chosen, system_prompt=self._system_prompt)
        other, rejected = template.answer_ids(self._tokenizer, pair.prompt, pair.rejected, system_prompt=self._system_prompt)
        room = self._max_length - len(prompt)
        reason = self._problem(prompt, other, chosen[: max(room, 0)], rejected[: max(room, 0)])
        if reason is not None:
            self.num_rejected += 1
            if self.num_rejected <= _SHOWN_REJECTS:
                _log.warning("left out %s: %s", pair.source or pair.id, reason)
            return
        self.num_cut += max(len(chosen), len(rejected)) > room
        for name, value in zip(_SCHEMA.names, (prompt, chosen[:room], rejected[:room], is_held_out), strict=True):
            self.columns[name].append(value)

    def _problem(self, prompt: Sequence[int], other: Sequence[int], chosen: Sequence[int], rejected: Sequence[int]) -> str | None:
        if len(prompt) >= self._max_length:
            return f"its prompt has {len(prompt)} tokens, which leaves no room for an answer in train.max_length={self._max_length}"
        if prompt != other:
            return "the chat template renders the prompt differently before the two answers"
        if chosen == rejected:
            return f"its answers are equal within train.max_length={self._max_length}"
        return None if chosen and rejected else "an answer has no token"


def _write(encoding: _Encoding, path: Path) -> None:
    counts = {"cut": encoding.num_cut, "rejected": encoding.num_rejected}
    table = pa.table(encoding.columns, schema=_SCHEMA).replace_schema_metadata({"r1ray": json.dumps(counts)})
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{id(encoding):x}")
    pq.write_table(table, unfinished, compression="zstd")
    unfinished.rename(path)


def _described(path: Path) -> PairSet:
    table = pq.read_table(path)
    counts = json.loads(table.schema.metadata[b"r1ray"])
    prompts, *answers = (pc.sum(pc.list_value_length(table[name])).as_py() or 0 for name in ("prompt", "chosen", "rejected"))
    num_held_out = pc.sum(table["held_out"]).as_py() or 0
    return PairSet(
        path=path,
        num_rows=table.num_rows - num_held_out,
        num_held_out=num_held_out,
        num_tokens=2 * prompts + sum(answers),
        num_answer_tokens=sum(answers),
        num_cut=counts["cut"],
        num_rejected=counts["rejected"],
    )


def _rows(table: pa.Table) -> list[PairRow]:
    columns = (table[name].to_pylist() for name in ("prompt", "chosen", "rejected"))
    return [PairRow(*map(tuple, row)) for row in zip(*columns, strict=True)]


def _check(tokens: PairSet, loaded: LoadedPairs, data: DataConfig, max_length: int) -> None:
    num_bad = len(loaded.rejects) + tokens.num_rejected
    if num_bad > data.max_bad_share * loaded.num_rows:
        raise TooManyBadRows(
            f"{tokens.num_rejected} pairs do not fit train.max_length={max_length} tokens (prompt too long, or answers equal after the "
            f"cut); with {len(loaded.rejects)} invalid rows that is {num_bad} of {loaded.num_rows}, more than "
            f"data.max_bad_share={data.max_bad_share:g} allows. Raise train.max_length or the share."
        )
    if tokens.num_rows == 0:
        raise NothingToTrain(f"None of the {loaded.num_rows} rows of {data.path} is left to train on. Add pairs, or lower eval_share.")
    if tokens.num_rejected:
        _log.warning("%d pairs were left out, since they do not fit train.max_length=%d", tokens.num_rejected, max_length)
    if tokens.num_cut:
        _log.warning("%d pairs have an answer that was cut to fit train.max_length=%d", tokens.num_cut, max_length)
