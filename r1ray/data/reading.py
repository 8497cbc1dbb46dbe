"""What every reader of a set does around its rows: open the files, name the format, number the ids, collect the rejects, sample.

What a row becomes (a dialogue, a pair of answers) is its opener's business: `opening(columns, config, file)` gives the format and
a function from a raw row to an item, which raises BadRow with the reason where the row holds none.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from r1ray.data.config import DataConfig, Format
from r1ray.data.files import data_files, rows_of
from r1ray.data.records import BadRow, RawRow, Reject
from r1ray.data.split import stem
from r1ray.data.write import write_rejects
from r1ray.errors import InvalidValue, NothingToTrain, TooManyBadRows, UnknownFormat
from r1ray.settings import Settings

__all__ = [
    "NUM_SHOWN",
    "Gathered",
    "Identified",
    "Ids",
    "Opening",
    "SourceIds",
    "Unjudged",
    "built",
    "check_share",
    "each_row",
    "files_of",
    "gather",
    "opened",
    "tell_format",
]

_PEEKED_ROWS = 20
_ROW_BITS = 40
NUM_SHOWN = 3
"""Bad rows that an error and the job log tell."""
_log = logging.getLogger(__name__)


class Identified(Protocol):
    """What a row becomes has an id, by which samples are drawn."""

    @property
    def id(self) -> str: ...


T = TypeVar("T", bound=Identified)
Opening = Callable[[Sequence[str], DataConfig, str], tuple[Format, Callable[[RawRow, "Ids"], T]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered(Generic[T]):
    """A set in memory: without `limit`, `len(items) + len(rejects) == num_rows`."""

    items: tuple[T, ...]
    rejects: tuple[Reject, ...]
    formats: tuple[Format, ...]
    num_rows: int


class Ids:
    """Ids are unique over all files of a set. Only their hashes are kept: two words a row."""

    def __init__(self) -> None:
        self._files: list[str] = []
        self._places: dict[int, int] = {}
        self._num_equal: Counter[str] = Counter()

    def unique(self, given: str | None, derive: Callable[[], str], raw: RawRow) -> str:
        """A given id must be new; equal rows without one are numbered `id#2`, so that they share a `split.stem`."""
        if given is not None and self._is_known(given):
            raise self._used(given, given)
        name = self._numbered(given or derive())
        if not self._files or self._files[-1] != raw.file:
            self._files.append(raw.file)
        self._places[hash(name)] = (len(self._files) - 1) << _ROW_BITS | raw.row
        return name

    def made(self, name: str) -> str:
        """`name`, or its first free number `name#2`, for a row that no file holds."""
        name = self._numbered(name)
        self._places[hash(name)] = 0
        return name

    def _used(self, given: str, name: str) -> BadRow:
        return BadRow(f"conversation_id {given!r} was already used at {self._place(name)}")

    def _is_known(self, name: str) -> bool:
        return hash(name) in self._places

    def _numbered(self, wanted: str) -> str:
        name = wanted
        while self._is_known(name):
            self._num_equal[wanted] += 1
            name = f"{wanted}#{self._num_equal[wanted] + 1}"
        return name

    def _place(self, name: str) -> str:
        place = self._places[hash(name)]
        return f"{self._files[place >> _ROW_BITS]}:{place & (1 << _ROW_BITS) - 1}"


class SourceIds(Ids):
    """Ids over several sources, each of which may count from 1: what an earlier source has used becomes `file/id`."""

    def __init__(self) -> None:
        super().__init__()
        self._first = -1

    def begin(self) -> None:
        """The rows that follow are of another source."""
        self._first = len(self._files)
        self._files.append("")

    def unique(self, given: str | None, derive: Callable[[], str], raw: RawRow) -> str:
        return super().unique(None if given is None else self._prefixed(given, Path(raw.file).stem), derive, raw)

    def _prefixed(self, given: str, file: str) -> str:
        """With the file's name where it, or the row that it was made from, would seem to be an earlier source's."""
        name = given
        for number in itertools.count(1):
            if self._is_known(name) and not self._is_earlier(name):
                raise self._used(given, name)
            if not self._is_earlier(name) and not self._is_earlier(stem(name)):
                break
            name = f"{file}/{given}" if number == 1 else f"{file}.{number}/{given}"
        return name

    def _is_earlier(self, name: str) -> bool:
        return self._is_known(name) and self._places[hash(name)] >> _ROW_BITS <= self._first


class Unjudged(Ids):
    """Names as they come, for rows that are read apart: whoever sees all of them, in order, judges them."""

    was_given = False

    def unique(self, given: str | None, derive: Callable[[], str], raw: RawRow) -> str:  # noqa: ARG002 - nothing is remembered
        self.was_given = given is not None
        return given or derive()


def each_row(config: DataConfig, opening: Opening[T], ids: Ids | None = None) -> Iterator[tuple[Format, RawRow, T | BadRow]]:
    """Every row of `config.path` in order, with its file's format and its item or the reason why it holds none.

    `ids` are those of the rows before, where others belong to the set.

    Raises:
        InvalidValue, NothingToTrain, UnknownFormat, WrongEncoding, MissingColumn: a file as a whole cannot be read.
    """
    ids = ids or Ids()
    for path in files_of(config):
        columns, rows = opened(path)
        name, build = opening(columns, config, str(path))
        tell_format(path, name, columns, config)
        for raw in rows:
            yield name, raw, built(raw, build, ids)


def files_of(config: DataConfig) -> list[Path]:
    """The data files of `config.path` in name order: itself, those below it, or those that its pattern matches.

    Raises:
        InvalidValue: nothing is there.
        NothingToTrain: a directory without any data file.
    """
    settings, pattern = Settings(), config.path.expanduser()
    if pattern.exists() or not any(mark in str(pattern) for mark in "*?["):
        place = settings.locate(config.path)
        if not place.exists():
            below = "" if pattern.is_absolute() else f", nor below R1RAY_HOME={settings.home}"
            raise InvalidValue(f"No data at {config.path}{below}. Set data.path to an existing file or directory.")
        return data_files(place)
    roots = [Path(pattern.anchor)] if pattern.is_absolute() else [Path(), settings.home]
    for root in roots:
        matches = root.glob(str(pattern.relative_to(pattern.anchor)))
        if found := sorted(path for path in matches if path.is_file() and not path.name.startswith(".")):
            return found
    raise InvalidValue(f"No file matches {config.path}. Set data.path to an existing file, a directory, or a pattern that matches files.")


def opened(path: Path) -> tuple[list[str], Iterator[RawRow]]:
    """(the columns of a file's first rows, all of its rows).

    Raises:
        NothingToTrain, UnknownFormat, WrongEncoding: the file as a whole cannot be read.
    """
    rows = rows_of(path)
    peeked = list(itertools.islice(rows, _PEEKED_ROWS))
    return _columns(peeked, path), itertools.chain(peeked, rows)


def tell_format(path: Path, name: Format, columns: Sequence[str], config: DataConfig) -> None:
    """Log what was chosen, and why."""
    if config.format == "auto":
        _log.info("%s: format %s, because of its columns %s", path, name, ", ".join(columns[:8]))


def gather(config: DataConfig, opening: Opening[T]) -> Gathered[T]:
    """Every valid item of `config.path`, in order, and a Reject for every other row.

    Raises:
        InvalidValue, NothingToTrain, UnknownFormat, WrongEncoding, MissingColumn: a file as a whole cannot be read.
        TooManyBadRows: more than `max_bad_share` of the rows are invalid; `config.rejects` is written before.
    """
    if config.backend == "ray":
        _log.warning("data.backend=ray has no effect here: this reads all rows into its memory")
    items: list[T] = []
    rejects: list[Reject] = []
    formats: set[Format] = set()
    for name, raw, found in each_row(config, opening):
        formats.add(name)
        if isinstance(found, BadRow):
            rejects.append(Reject(file=raw.file, row=raw.row, reason=str(found)))
        else:
            items.append(found)
    if config.rejects is not None:
        write_rejects(rejects, Settings().place(config.rejects))
    num_rows = len(items) + len(rejects)
    check_share(num_rows, len(rejects), rejects, config)
    return Gathered(items=_sample(items, config), rejects=tuple(rejects), formats=tuple(sorted(formats)), num_rows=num_rows)


def built(raw: RawRow, build: Callable[[RawRow, Ids], T], ids: Ids) -> T | BadRow:
    """What a raw row becomes, or why it becomes nothing."""
    try:
        if raw.problem is not None:
            raise BadRow(raw.problem)
        return build(raw, ids)
    except BadRow as bad:
        return bad


def _columns(rows: list[RawRow], path: Path) -> list[str]:
    """Every column of the first rows, in order of appearance."""
    columns = list(dict.fromkeys(str(name) for row in rows for name in row.values))
    if not rows:
        raise NothingToTrain(f"{path} holds no row. Set data.path to a file with at least one dialogue.")
    if not columns:
        raise UnknownFormat(f"{path}: its first {len(rows)} rows cannot be read ({rows[0].problem}). Mend the file or data.path.")
    return columns


def check_share(num_rows: int, num_bad: int, rejects: Sequence[Reject], config: DataConfig) -> None:
    """Refuse a set with too many bad rows; `rejects` are the first of them, at least.

    Raises:
        TooManyBadRows: more than `max_bad_share` are invalid.
        NothingToTrain: all are.
    """
    shown = "; ".join(f"{r.file}:{r.row}: {r.reason}" for r in rejects[:NUM_SHOWN])
    report = f"All are in {Settings().place(config.rejects)}." if config.rejects else "Set data.rejects=FILE to have all of them listed."
    if num_bad > config.max_bad_share * num_rows:
        raise TooManyBadRows(
            f"{num_bad} of {num_rows} rows are invalid, more than data.max_bad_share={config.max_bad_share:g} allows. "
            f"The first: {shown}. {report} Mend them or raise the share."
        )
    if num_bad == num_rows:
        raise NothingToTrain(f"{config.path} holds no valid row ({num_bad} invalid). {report}")
    if num_bad:
        _log.warning("%d of %d rows left out as invalid, the first: %s. %s", num_bad, num_rows, shown, report)


def _sample(items: list[T], config: DataConfig) -> tuple[T, ...]:
    """`limit` items drawn by hash, so that a file sorted by label still gives all labels; file order is kept."""
    if config.limit is None or config.limit >= len(items):
        return tuple(items)
    drawn = sorted(range(len(items)), key=lambda i: _draw(config.seed, items[i].id))[: config.limit]
    return tuple(items[i] for i in sorted(drawn))


def _draw(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()
