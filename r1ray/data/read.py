"""Files in, conversations out: one call for every format, with each row that was left out and why. Knows no tokenizer.

loaded = read_conversations(DataConfig(path="dialogues.jsonl"))
loaded.conversations, loaded.rejects, loaded.data_hash

`stream` gives the same rows one by one, for sets that are larger than the memory; `survey_conversations` and `read_slice` give them in
slices, for several readers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from r1ray.data.config import DataConfig, Format
from r1ray.data.formats import Parser, detect, parser
from r1ray.data.reading import Ids, Unjudged, built, each_row, gather
from r1ray.data.records import BadRow, Loaded, RawRow, ReadRow, Reject, SlicedRow
from r1ray.data.schema import content_id, data_hash
from r1ray.data.slices import SLICE_BYTES, Slice, Survey, survey
from r1ray.data.turns import check_order, repair
from r1ray.types import Conversation

__all__ = ["Loaded", "Reject", "read_conversations", "read_slice", "stream", "survey_conversations"]


def read_conversations(config: DataConfig) -> Loaded:
    """Every valid dialogue of `config.path`, in order, and a Reject for every other row.

    Raises:
        InvalidValue, NothingToTrain, UnknownFormat, WrongEncoding, MissingColumn: a file as a whole cannot be read.
        TooManyBadRows: more than `max_bad_share` of the rows are invalid; `config.rejects` is written before.
    """
    found = gather(config, _opening)
    return Loaded(
        conversations=found.items,
        rejects=found.rejects,
        data_hash=data_hash(found.items),
        formats=found.formats,
        num_rows=found.num_rows,
    )


def stream(config: DataConfig, ids: Ids | None = None) -> Iterator[ReadRow]:
    """Every row of `config.path` in order, each with its dialogue or the reason why it holds none; no share of bad rows is too much.

    `ids` are those of the rows before, where other sources belong to the set.

    Raises:
        InvalidValue, NothingToTrain, UnknownFormat, WrongEncoding, MissingColumn: a file as a whole cannot be read.
    """
    for _, raw, found in each_row(config, _opening, ids):
        if isinstance(found, BadRow):
            yield ReadRow(raw=raw, reason=str(found))
        else:
            yield ReadRow(raw=raw, conversation=found)


def survey_conversations(config: DataConfig, slice_bytes: int = SLICE_BYTES) -> Survey:
    """The slices of `config.path`, in order.

    Raises:
        InvalidValue, NothingToTrain, UnknownFormat, WrongEncoding, MissingColumn: a file as a whole cannot be read.
    """
    return survey(config, _opening, slice_bytes)


def read_slice(piece: Slice, config: DataConfig) -> Iterator[SlicedRow]:
    """Every row of one slice, in order.

    Raises:
        UnknownFormat, WrongEncoding: the slice cannot be read.
    """
    ids = Unjudged()
    _, build = _opening(piece.columns, config, str(piece.path))
    for raw in piece.rows():
        yield SlicedRow(raw=raw, found=built(raw, build, ids), names_itself=ids.was_given)


def _opening(columns: Sequence[str], config: DataConfig, file: str) -> tuple[Format, Callable[[RawRow, Ids], Conversation]]:
    name = detect(columns, config, file)
    parse = parser(name, columns, config)
    return name, lambda raw, ids: _conversation(raw, parse, config, ids)


def _conversation(raw: RawRow, parse: Parser, config: DataConfig, ids: Ids) -> Conversation:
    given, turns = parse(raw.values)
    messages = tuple(repair(turns) if config.role_order == "repair" else turns)
    if turns and not messages:
        raise BadRow("no answer to any question; without the unanswered end nothing is left")
    check_order(messages)
    stored = raw.values.get("source") if "utterances" in raw.values else None  # our own schema keeps the first place
    name = ids.unique(given, lambda: content_id(messages), raw)
    return Conversation(id=name, messages=messages, source=stored if isinstance(stored, str) and stored else f"{raw.file}:{raw.row}")
