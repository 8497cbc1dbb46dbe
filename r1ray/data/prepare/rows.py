"""The rows that travel through the job: kept ones with what was found out about them, rejected ones with the reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa

from r1ray.data.augment.provenance import Made, dump
from r1ray.data.prepare.config import Role
from r1ray.data.schema import PREPARED, SCHEMA, to_table
from r1ray.types import Conversation

__all__ = ["KeptRow", "Ledger", "RejectedRow", "kept_table", "made_table", "num_chars", "rejected"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptRow:
    """A dialogue that every rule for single rows lets through."""

    conversation: Conversation
    role: Role
    language: str
    badness: float | None
    file: str
    row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectedRow:
    """`step` is the rule that dropped it; `utterances` are absent where the row could not be read."""

    file: str
    row: int
    step: str
    reason: str
    id: str = ""
    utterances: Sequence[Mapping[str, Any]] = ()


def rejected(row: KeptRow, step: str, reason: str) -> RejectedRow:
    """A dialogue that was dropped, with its turns, so that it can be mended and put back."""
    turns = [{"role": m.role, "text": m.content} for m in row.conversation.messages]
    return RejectedRow(file=row.file, row=row.row, step=step, reason=reason, id=row.conversation.id, utterances=turns)


class Ledger:
    """What came in from each source and why some of it went: every dropped row is a line of JSON in `file`."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self.num_in: Counter[str] = Counter()
        self.dropped: dict[str, Counter[str]] = {}

    @property
    def num_dropped(self) -> int:
        return sum(counts.total() for counts in self.dropped.values())

    def read(self, source: str, num_rows: int) -> None:
        self.num_in[source] += num_rows

    def drop(self, source: str, row: RejectedRow) -> None:
        self.dropped.setdefault(source, Counter())[row.step] += 1
        self.report(row)

    def report(self, row: RejectedRow) -> None:
        """Write a line that counts as no row: a document that could not be parsed."""
        tree = {"file": row.file, "row": row.row, "step": row.step, "reason": row.reason}
        if row.utterances:
            tree |= {"id": row.id, "utterances": list(row.utterances)}
        self._file.write(json.dumps(tree, ensure_ascii=False) + "\n")

    def summary(self) -> dict[str, dict[str, Any]]:
        """source -> rows read and rows dropped by step."""
        return {name: {"in": number, "dropped": dict(self.dropped.get(name, {}))} for name, number in self.num_in.items()}


def num_chars(conversation: Conversation) -> int:
    return sum(len(m.content) + len(m.reasoning or "") for m in conversation.messages)


def kept_table(rows: Sequence[KeptRow]) -> pa.Table:
    """Rows of `PREPARED`, nothing made."""
    conversations = [row.conversation for row in rows]
    columns: dict[str, Sequence[Any]] = {
        "role": [row.role for row in rows],
        "language": [row.language for row in rows],
        "chars": [num_chars(c) for c in conversations],
        "badness": [row.badness for row in rows],
        "origin": [c.id for c in conversations],
        "operations": ["[]"] * len(rows),
    }
    return _prepared(conversations, columns)


def made_table(rows: Sequence[Made], languages: Sequence[str]) -> pa.Table:
    """Rows of `PREPARED` that operations made; they are of the domain, since only its rows are operated on."""
    conversations = [row.conversation for row in rows]
    columns: dict[str, Sequence[Any]] = {
        "role": ["domain"] * len(rows),
        "language": list(languages),
        "chars": [num_chars(c) for c in conversations],
        "badness": [None] * len(rows),
        "origin": [row.origin for row in rows],
        "operations": [dump(row.operations) for row in rows],
    }
    return _prepared(conversations, columns)


def _prepared(conversations: Sequence[Conversation], columns: Mapping[str, Sequence[Any]]) -> pa.Table:
    table = to_table(conversations)
    arrays = [*table.columns, *(pa.array(columns[field.name], field.type) for field in list(PREPARED)[len(SCHEMA) :])]
    return pa.Table.from_arrays(arrays, schema=PREPARED)
