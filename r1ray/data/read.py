"""Files in, conversations out: one call for every format, with each row that was left out and why. Knows no tokenizer.

loaded = read_conversations(DataConfig(path="dialogues.jsonl"))
loaded.conversations, loaded.rejects, loaded.data_hash

`stream` gives the same rows one by one, for sets that are larger than the memory.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from r1ray.data.config import DataConfig, Format
from r1ray.data.files import data_files, rows_of
from r1ray.data.formats import Parser, detect, parser
from r1ray.data.records import BadRow, Loaded, RawRow, ReadRow, Reject
from r1ray.data.schema import content_id, data_hash
from r1ray.data.turns import check_order, repair
from r1ray.data.write import write_rejects
from r1ray.errors import NothingToTrain, TooManyBadRows, UnknownFormat
from r1ray.settings import Settings
from r1ray.types import Conversation, Message

__all__ = ["Loaded", "Reject", "read_conversations", "stream"]

_PEEKED_ROWS = 20
_ROW_BITS = 40
_log = logging.getLogger(__name__)


def read_conversations(config: DataConfig) -> Loaded:
    """Every valid dialogue of `config.path`, in order, and a Reject for every other row.

    Raises:
        InvalidValue, NothingToTrain, UnknownFormat, WrongEncoding, MissingColumn: a file as a whole cannot be read.
        TooManyBadRows: more than `max_bad_share` of the rows are invalid; `config.rejects` is written before.
    """
    reading = _Reading(config)
    for path in data_files(Settings().locate(config.path)):
        reading.read(path)
    if config.rejects is not None:
        write_rejects(reading.rejects, config.rejects)
    reading.check()
    kept = _sample(reading.conversations, config)
    return Loaded(
        conversations=kept,
        rejects=tuple(reading.rejects),
        data_hash=data_hash(kept),
        formats=tuple(sorted(reading.formats)),
        num_rows=reading.num_rows,
    )


def stream(config: DataConfig) -> Iterator[ReadRow]:
    """Every row of `config.path` in order, each with its dialogue or the reason why it holds none; no share of bad rows is too much.

    Raises:
        InvalidValue, NothingToTrain, UnknownFormat, WrongEncoding, MissingColumn: a file as a whole cannot be read.
    """
    ids = _Ids()
    for path in data_files(Settings().locate(config.path)):
        _, rows, parse = _opened(path, config)
        for raw in rows:
            yield _read(raw, parse, config, ids)


class _Reading:
    """What has been read so far."""

    def __init__(self, config: DataConfig) -> None:
        self._config = config
        self._ids = _Ids()
        self.conversations: list[Conversation] = []
        self.rejects: list[Reject] = []
        self.formats: set[Format] = set()
        self.num_rows = 0

    def read(self, path: Path) -> None:
        name, rows, parse = _opened(path, self._config)
        self.formats.add(name)
        for raw in rows:
            self.num_rows += 1
            row = _read(raw, parse, self._config, self._ids)
            if row.conversation is not None:
                self.conversations.append(row.conversation)
            else:
                self.rejects.append(Reject(file=raw.file, row=raw.row, reason=row.reason))

    def check(self) -> None:
        num_bad = len(self.rejects)
        shown = "; ".join(f"{r.file}:{r.row}: {r.reason}" for r in self.rejects[:3])
        report = f"All are in {self._config.rejects}." if self._config.rejects else "Set data.rejects=FILE to have all of them listed."
        if num_bad > self._config.max_bad_share * self.num_rows:
            raise TooManyBadRows(
                f"{num_bad} of {self.num_rows} rows are invalid, more than data.max_bad_share={self._config.max_bad_share:g} allows. "
                f"The first: {shown}. {report} Mend them or raise the share."
            )
        if not self.conversations:
            raise NothingToTrain(f"{self._config.path} holds no valid row ({num_bad} invalid). {report}")
        if num_bad:
            _log.warning("%d of %d rows left out as invalid, the first: %s. %s", num_bad, self.num_rows, shown, report)


class _Ids:
    """Ids are unique over all files of a set. Only their hashes are kept: two words a row."""

    def __init__(self) -> None:
        self._files: list[str] = []
        self._places: dict[int, int] = {}
        self._num_equal: Counter[str] = Counter()

    def unique(self, given: str | None, messages: tuple[Message, ...], raw: RawRow) -> str:
        """A given id must be new; equal rows without one are numbered `id#2`, so that `hold_out` keeps them together."""
        if given is not None and hash(given) in self._places:
            raise BadRow(f"conversation_id {given!r} was already used at {self._place(given)}")
        derived = name = given or content_id(messages)
        while hash(name) in self._places:
            self._num_equal[derived] += 1
            name = f"{derived}#{self._num_equal[derived] + 1}"
        if not self._files or self._files[-1] != raw.file:
            self._files.append(raw.file)
        self._places[hash(name)] = (len(self._files) - 1) << _ROW_BITS | raw.row
        return name

    def _place(self, name: str) -> str:
        place = self._places[hash(name)]
        return f"{self._files[place >> _ROW_BITS]}:{place & (1 << _ROW_BITS) - 1}"


def _opened(path: Path, config: DataConfig) -> tuple[Format, Iterator[RawRow], Parser]:
    rows = rows_of(path)
    peeked = list(itertools.islice(rows, _PEEKED_ROWS))
    columns = _columns(peeked, path)
    name = detect(columns, config, str(path))
    if config.format == "auto":
        _log.info("%s: format %s, because of its columns %s", path, name, ", ".join(columns[:8]))
    return name, itertools.chain(peeked, rows), parser(name, columns, config)


def _read(raw: RawRow, parse: Parser, config: DataConfig, ids: _Ids) -> ReadRow:
    try:
        return ReadRow(raw=raw, conversation=_conversation(raw, parse, config, ids))
    except BadRow as bad:
        return ReadRow(raw=raw, reason=str(bad))


def _conversation(raw: RawRow, parse: Parser, config: DataConfig, ids: _Ids) -> Conversation:
    if raw.problem is not None:
        raise BadRow(raw.problem)
    given, turns = parse(raw.values)
    messages = tuple(repair(turns) if config.role_order == "repair" else turns)
    if turns and not messages:
        raise BadRow("no answer to any question; without the unanswered end nothing is left")
    check_order(messages)
    stored = raw.values.get("source") if "utterances" in raw.values else None  # our own schema keeps the first place
    name = ids.unique(given, messages, raw)
    return Conversation(id=name, messages=messages, source=stored if isinstance(stored, str) and stored else f"{raw.file}:{raw.row}")


def _columns(rows: list[RawRow], path: Path) -> list[str]:
    """Every column of the first rows, in order of appearance."""
    columns = list(dict.fromkeys(str(name) for row in rows for name in row.values))
    if not rows:
        raise NothingToTrain(f"{path} holds no row. Set data.path to a file with at least one dialogue.")
    if not columns:
        raise UnknownFormat(f"{path}: its first {len(rows)} rows cannot be read ({rows[0].problem}). Mend the file or data.path.")
    return columns


def _sample(conversations: list[Conversation], config: DataConfig) -> tuple[Conversation, ...]:
    """`limit` dialogues drawn by hash, so that a file sorted by label still gives all labels; file order is kept."""
    if config.limit is None or config.limit >= len(conversations):
        return tuple(conversations)
    drawn = sorted(range(len(conversations)), key=lambda i: _draw(config.seed, conversations[i].id))[: config.limit]
    return tuple(conversations[i] for i in sorted(drawn))


def _draw(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()
