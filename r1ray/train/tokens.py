"""Conversations -> token ids with a loss mask, once per job and before any worker starts; cached as Parquet.

The mask comes from the model's own training template (`template.training_ids`), so the loss is on what the assistant says and
nothing else. A dialogue longer than the limit ends after its last assistant turn that fits; one without such a turn is rejected.
Knows no batch and no model.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from r1ray.data.config import DataConfig
from r1ray.data.prepare.plan import Mix
from r1ray.data.read import Loaded
from r1ray.errors import NothingToTrain, TooManyBadRows
from r1ray.model import template
from r1ray.model.load import training_tokenizer
from r1ray.types import Artifact, Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenSet", "fit", "tokenise", "tokenizer_hash"]

_FORMAT = 1  # of the cache; raise it when the meaning of a column changes
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSet:
    """A Parquet file of columns `input_ids` and `mask` (1 = carries loss), and what it holds."""

    path: Path
    num_rows: int
    num_tokens: int
    num_trained_tokens: int
    num_shortened: int
    num_rejected: int
    is_mixed: bool = False

    @property
    def told(self) -> str:
        drawn = ", drawn by the file's mix plan" if self.is_mixed else ""
        return f"{self.num_rows} dialogues, {self.num_tokens} tokens, {self.num_trained_tokens} carry loss{drawn}"

    def lengths(self) -> list[int]:
        """Tokens of each dialogue."""
        lengths: list[int] = pc.list_value_length(pq.read_table(self.path, columns=["input_ids"])["input_ids"]).to_pylist()
        return lengths

    def rows(self) -> tuple[list[list[int]], list[list[int]]]:
        """(input ids, masks), one list per dialogue."""
        table = pq.read_table(self.path, columns=["input_ids", "mask"])
        return table["input_ids"].to_pylist(), table["mask"].to_pylist()


def tokenise(loaded: Loaded, artifact: Artifact, data: DataConfig, *, max_length: int, cache: Path, mix: Mix | None = None) -> TokenSet:
    """The token set of a data set under one model's template; with `mix`, one that training walks through as its plan says.

    Raises:
        NothingToTrain: no token carries loss.
        TooManyBadRows: with the dialogues that do not fit, the invalid share exceeds `data.max_bad_share`.
    """
    path = cache / "tokens" / f"{_key(loaded, artifact, data, max_length, mix)}.parquet"
    if not path.exists():
        _write(_Encoding.of(loaded.conversations, artifact, data, max_length), path, mix)
    else:
        _log.info("tokens from the cache: %s", path)
    tokens = _described(path)
    _check(tokens, loaded, data, max_length)
    return tokens


def fit(ids: Sequence[int], mask: Sequence[int], max_length: int) -> int:
    """Length of the longest beginning that ends with an assistant turn and has at most `max_length` tokens; 0 when there is none."""
    if len(ids) <= max_length:
        return len(ids)
    ends = (end for end in range(max_length, 0, -1) if mask[end - 1] and not mask[end])
    return next(ends, 0)


@dataclass(slots=True)
class _Encoding:
    ids: list[list[int]]
    masks: list[list[int]]
    names: list[str]
    num_shortened: int = 0
    num_rejected: int = 0

    @classmethod
    def of(cls, conversations: Sequence[Conversation], artifact: Artifact, data: DataConfig, max_length: int) -> _Encoding:
        tokenizer = training_tokenizer(artifact)
        encoding = cls([], [], [])
        for conversation in conversations:
            encoding.add(conversation, tokenizer, data.system_prompt, max_length)
        return encoding

    def add(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None, max_length: int) -> None:
        ids, mask = template.training_ids(tokenizer, conversation.messages, system_prompt=system_prompt)
        end = fit(ids, mask, max_length)
        if not any(mask[1:end]):
            self.num_rejected += 1
            _log.warning(
                "left out %s: %d tokens, no assistant turn ends within %d", conversation.source or conversation.id, len(ids), max_length
            )
            return
        self.num_shortened += end < len(ids)
        self.ids.append(list(ids[:end]))
        self.masks.append(list(mask[:end]))
        self.names.append(conversation.id)


def tokenizer_hash(artifact: Artifact) -> str:
    """Over the tokenizer's files."""
    digest = hashlib.sha256()
    for file in sorted(artifact.path.glob("tokenizer*")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _key(loaded: Loaded, artifact: Artifact, data: DataConfig, max_length: int, mix: Mix | None) -> str:
    parts = [_FORMAT, loaded.data_hash, tokenizer_hash(artifact), artifact.manifest.template.sha256, data.system_prompt, max_length]
    parts += [mix.stored] if mix else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _write(encoding: _Encoding, path: Path, mix: Mix | None) -> None:
    schema = pa.schema([("input_ids", pa.list_(pa.int32())), ("mask", pa.list_(pa.int8()))])
    columns: dict[str, list[Any]] = {"input_ids": encoding.ids, "mask": encoding.masks}
    if mix is not None:
        columns |= mix.columns(encoding.names)
        schema = schema.append(pa.field("role", pa.string())).append(pa.field("chars", pa.int64()))
    counts = {"shortened": encoding.num_shortened, "rejected": encoding.num_rejected, "trained": sum(map(sum, encoding.masks))}
    table = pa.table(columns, schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{hashlib.sha256(repr(id(encoding)).encode()).hexdigest()[:8]}")
    pq.write_table(
        table.replace_schema_metadata({"r1ray": json.dumps(counts), **(mix.metadata() if mix else {})}), unfinished, compression="zstd"
    )
    unfinished.rename(path)


def _described(path: Path) -> TokenSet:
    table = pq.read_table(path, columns=["input_ids"])
    counts = json.loads(pq.read_schema(path).metadata[b"r1ray"])
    num_tokens = sum(len(chunk.flatten()) for chunk in table["input_ids"].chunks)
    return TokenSet(
        path=path,
        num_rows=table.num_rows,
        num_tokens=num_tokens,
        num_trained_tokens=counts["trained"],
        num_shortened=counts["shortened"],
        num_rejected=counts["rejected"],
        is_mixed="role" in pq.read_schema(path).names,
    )


def _check(tokens: TokenSet, loaded: Loaded, data: DataConfig, max_length: int) -> None:
    num_bad = len(loaded.rejects) + tokens.num_rejected
    if num_bad > data.max_bad_share * loaded.num_rows:
        raise TooManyBadRows(
            f"{tokens.num_rejected} dialogues have no assistant turn that ends within train.max_length={max_length} tokens; with "
            f"{len(loaded.rejects)} invalid rows that is {num_bad} of {loaded.num_rows}, more than "
            f"data.max_bad_share={data.max_bad_share:g} allows. Raise train.max_length or the share."
        )
    if tokens.num_trained_tokens == 0:
        raise NothingToTrain(
            f"None of the {loaded.num_rows} rows of {data.path} has a token that carries loss: no assistant turn has text. Add answers."
        )
    if tokens.num_shortened:
        _log.warning("%d dialogues were cut after an assistant turn to fit train.max_length=%d", tokens.num_shortened, max_length)
