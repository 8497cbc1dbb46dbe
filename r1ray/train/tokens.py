"""Conversations -> token ids with a loss mask, once per job and before any worker starts; cached as Arrow shards.

The mask comes from the model's own training template (`template.training_ids`), so the loss is on what the assistant says and
nothing else. A dialogue longer than the limit ends after its last assistant turn that fits; one without such a turn is rejected.
Here the conversations are in memory; `corpus` does the same over a cluster for those that do not fit. Knows no batch and no model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from r1ray.data.config import DataConfig
from r1ray.data.prepare.plan import Mix
from r1ray.data.read import Loaded
from r1ray.data.split import origins_digest, stem_hash
from r1ray.errors import NothingToTrain, TooManyBadRows
from r1ray.model import template
from r1ray.model.load import training_tokenizer
from r1ray.train import shards
from r1ray.types import Artifact, Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoder", "TokenSet", "check_left_out", "check_tokens", "described", "fit", "remove_damaged", "tokenise", "tokenizer_hash"]

FORMAT = 3
"""Of the cache; raise it when the meaning of a column changes."""
_ROWS_AT_ONCE = 1024
_SHOWN_REJECTS = 3
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSet:
    """What lies on disk: `path` is the table of rows, beside which their shards are (`shards`)."""

    path: Path
    num_rows: int
    num_tokens: int
    num_trained_tokens: int
    num_shortened: int
    num_rejected: int
    is_mixed: bool = False

    @property
    def is_complete(self) -> bool:
        return True

    @property
    def told(self) -> str:
        drawn = ", drawn by the file's mix plan" if self.is_mixed else ""
        return f"{self.num_rows} dialogues, {self.num_tokens} tokens, {self.num_trained_tokens} carry loss{drawn}"

    def lengths(self) -> array[int]:
        """Tokens of each dialogue."""
        return shards.weights(self.path.parent, "length")

    def origins(self) -> npt.NDArray[np.uint64]:
        """What each dialogue was made from, as a hash: equal ones are held out together."""
        return shards.origins(self.path.parent)

    def rows(self) -> tuple[Sequence[list[int]], Sequence[list[int]]]:
        """(input ids, masks), one list per dialogue, read from the disk when it is asked for."""
        return shards.columns(self.path.parent)


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """One way of making tokens of turns."""

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str | None
    max_length: int

    def encode(self, messages: Sequence[Message]) -> tuple[list[int], list[int], int]:
        """(ids, mask, number of ids before the cut); no ids where no assistant turn ends within the limit."""
        ids, mask = template.training_ids(self.tokenizer, messages, system_prompt=self.system_prompt)
        end = fit(ids, mask, self.max_length)
        if not any(mask[1:end]):
            end = 0
        return list(ids[:end]), list(mask[:end]), len(ids)

    def refusal(self, source: str, num_tokens: int) -> str:
        return f"left out {source}: {num_tokens} tokens, no assistant turn ends within {self.max_length}"


def tokenise(loaded: Loaded, artifact: Artifact, data: DataConfig, *, max_length: int, cache: Path, mix: Mix | None = None) -> TokenSet:
    """The token set of a data set under one model's template; with `mix`, one that training walks through as its plan says.

    Raises:
        NothingToTrain: no token carries loss.
        TooManyBadRows: with the dialogues that do not fit, the invalid share exceeds `data.max_bad_share`.
        DiskFull: the cache has no room for the tokens.
    """
    place = cache / "tokens" / _key(loaded, artifact, data, max_length, mix)
    if shards.counts(place) is not None:
        _log.info("tokens from the cache: %s", place)
    else:
        remove_damaged(place)
        encoder = Encoder(tokenizer=training_tokenizer(artifact), system_prompt=data.system_prompt, max_length=max_length)
        _write(loaded.conversations, encoder, place, mix)
    tokens = described(place)
    check_tokens(tokens, num_rows=loaded.num_rows, num_invalid=len(loaded.rejects), data=data, max_length=max_length)
    return tokens


def fit(ids: Sequence[int], mask: Sequence[int], max_length: int) -> int:
    """Length of the longest beginning that ends with an assistant turn and has at most `max_length` tokens; 0 when there is none."""
    if len(ids) <= max_length:
        return len(ids)
    ends = (end for end in range(max_length, 0, -1) if mask[end - 1] and not mask[end])
    return next(ends, 0)


def tokenizer_hash(artifact: Artifact) -> str:
    """Over the tokenizer's files."""
    digest = hashlib.sha256()
    for file in sorted(artifact.path.glob("tokenizer*")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def described(place: Path) -> TokenSet:
    """The finished set in `place`."""
    found = shards.counts(place)
    assert found is not None, "written or found whole"
    return TokenSet(
        path=place / shards.ROWS,
        num_rows=found["rows"],
        num_tokens=found["tokens"],
        num_trained_tokens=found["trained"],
        num_shortened=found["shortened"],
        num_rejected=found["rejected"],
        is_mixed="role" in pq.read_schema(place / shards.ROWS).names,
    )


def remove_damaged(place: Path) -> None:
    """Make room for a set whose files are not what they were."""
    if place.exists():
        _log.warning("%s is damaged and is made anew", place)
        shutil.rmtree(place)


def check_tokens(tokens: TokenSet, *, num_rows: int, num_invalid: int, data: DataConfig, max_length: int) -> None:
    """Refuse a set that lost too much, of `num_rows` that were read and `num_invalid` that hold no dialogue.

    Raises:
        NothingToTrain, TooManyBadRows: see `tokenise`.
    """
    num_used = tokens.num_rows + tokens.num_rejected
    check_left_out(
        f"dialogues have no assistant turn that ends within train.max_length={max_length} tokens",
        (tokens.num_rejected, num_used),
        (num_invalid, num_rows),
        data.max_bad_share,
    )
    if tokens.num_trained_tokens == 0:
        short, empty = f"ends within train.max_length={max_length} tokens. Raise it", "has text. Add answers"
        why = f"no assistant turn {short if tokens.num_rejected else empty}"
        raise NothingToTrain(f"None of the {num_used} dialogues of {data.path} has a token that carries loss: {why}.")
    if tokens.num_shortened:
        _log.warning("%d dialogues were cut after an assistant turn to fit train.max_length=%d", tokens.num_shortened, max_length)


def check_left_out(what: str, rejected: tuple[int, int], invalid: tuple[int, int], share: float) -> None:
    """Refuse a set that lost more than `share`. `rejected`: how many do not fit, of those used; `invalid`: rows, of those read.

    Raises:
        TooManyBadRows: `what` says why the rejected ones do not fit.
    """
    (num_rejected, num_used), (num_invalid, num_rows) = rejected, invalid
    if num_rejected > share * num_used or num_rejected + num_invalid > share * num_rows:  # data.limit uses fewer than were read
        raise TooManyBadRows(
            f"{num_rejected} of {num_used} {what}; with {num_invalid} of {num_rows} rows that are invalid this is more than "
            f"data.max_bad_share={share:g} allows. Raise train.max_length or the share."
        )


class _Encoding:
    """Rows until there are enough of them to be written."""

    def __init__(self, encoder: Encoder, mix: Mix | None) -> None:
        self._encoder, self._mix = encoder, mix
        self._ids: list[list[int]] = []
        self._masks: list[list[int]] = []
        self._names: list[str] = []
        self.num_shortened = self.num_rejected = 0

    @property
    def is_full(self) -> bool:
        return len(self._ids) >= _ROWS_AT_ONCE

    def add(self, conversation: Conversation) -> None:
        ids, mask, num_tokens = self._encoder.encode(conversation.messages)
        if not ids:
            self.num_rejected += 1
            if self.num_rejected <= _SHOWN_REJECTS:
                _log.warning("%s", self._encoder.refusal(conversation.source or conversation.id, num_tokens))
            return
        self.num_shortened += len(ids) < num_tokens
        self._ids.append(ids)
        self._masks.append(mask)
        self._names.append(conversation.id)

    def take(self) -> pa.Table:
        table = pa.table({"input_ids": self._ids, "mask": self._masks}, schema=shards.TOKENS)
        table = table.append_column(shards.ORIGIN, pa.array([stem_hash(name) for name in self._names], shards.ORIGIN.type))
        for name, column in (self._mix.columns(self._names) if self._mix else {}).items():
            table = table.append_column(name, pa.array(column))
        self._ids, self._masks, self._names = [], [], []
        return table


def _key(loaded: Loaded, artifact: Artifact, data: DataConfig, max_length: int, mix: Mix | None) -> str:
    origins = origins_digest(stem_hash(c.id) for c in loaded.conversations)
    parts: list[Any] = [FORMAT, loaded.data_hash, origins, tokenizer_hash(artifact), artifact.manifest.template.sha256]
    parts += [data.system_prompt, max_length, *([mix.stored] if mix else [])]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _write(conversations: Iterable[Conversation], encoder: Encoder, place: Path, mix: Mix | None) -> None:
    encoding = _Encoding(encoder, mix)
    with shards.replacing(place) as unfinished, shards.ShardWriter(unfinished, is_mixed=mix is not None) as writer:
        for conversation in conversations:
            encoding.add(conversation)
            if encoding.is_full:
                writer.append(encoding.take())
        writer.append(encoding.take())
        counted = {"shortened": encoding.num_shortened, "rejected": encoding.num_rejected}
        writer.close(counted, mix.metadata() if mix else {})
