"""The first pass: rows in batches through every rule that needs only what came before. Knows no output file.

In order: schema, personal data, mangled text, length, language, quality, exact and near duplicates. Masking comes before anything is
kept or reported, so that no file of the job holds what it should hide.

What grows with the rows: 16 bytes for each id and vote, the index of exact (16) and near duplicates (some 400 bytes a row).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from r1ray.data.clean.contradictions import Conflict, conflicts
from r1ray.data.clean.duplicates import ExactDuplicates, NearDuplicates, keys_of
from r1ray.data.clean.minhash import normalised, signatures
from r1ray.data.clean.pii import Masker
from r1ray.data.clean.quality import QualityModel
from r1ray.data.clean.rules import Broken, check
from r1ray.data.prepare.config import CleanConfig, Role
from r1ray.data.prepare.rows import KeptRow, RejectedRow, rejected
from r1ray.data.records import ReadRow
from r1ray.types import Conversation

__all__ = ["Cleaner", "Places", "answer_key", "question_key"]

_PRIORITIES: dict[Role, int] = {"domain": 0, "out_of_domain": 1, "history": 2}
_SHINGLES = {"zh": 3, "en": 5, "other": 5}
_ROW_BITS = 40


class Cleaner:
    """What is known of the rows so far, over all sources."""

    def __init__(self, config: CleanConfig, quality: QualityModel | None) -> None:
        self._config = config
        self._quality = quality
        self.masker = Masker(config.pii) if config.pii is not None else None
        self._exact = ExactDuplicates() if config.exact_duplicates else None
        self._near = NearDuplicates(config.near_duplicates) if config.near_duplicates is not None else None
        self._exact_places, self._near_places = Places(), Places()
        self._votes = array("Q"), array("Q"), array("B")

    @property
    def index_bytes(self) -> int:
        """Of everything that grows with the rows, ids apart."""
        indexes = sum(index.num_bytes for index in (self._exact, self._near) if index is not None)
        votes = sum(len(column) * column.itemsize for column in self._votes)
        return indexes + votes + self._exact_places.num_bytes + self._near_places.num_bytes

    def clean(self, rows: Sequence[ReadRow], role: Role) -> tuple[list[KeptRow], list[RejectedRow]]:
        """The batch's kept and dropped rows; together as many as `rows`."""
        dropped: list[RejectedRow] = []
        kept: list[KeptRow] = []
        for row in rows:
            result = self._alone(row, role)
            (kept if isinstance(result, KeptRow) else dropped).append(result)  # type: ignore[arg-type]
        kept = self._sound(kept, dropped)
        self._vote(kept)
        kept = self._unlike_exactly(kept, dropped)
        return self._unlike_nearly(kept, dropped), dropped

    def seen(self, conversations: Sequence[Conversation]) -> npt.NDArray[np.bool_]:
        """Whether each is an exact duplicate of a row of the set."""
        if self._exact is None or not conversations:
            return np.zeros(len(conversations), bool)
        return self._exact.known(keys_of([_whole(c) for c in conversations])) >= 0

    def conflicts(self) -> dict[int, Conflict]:
        """Contradicted questions over all rows so far, duplicates included: each of them is a vote."""
        if self._config.contradictions == "keep":
            return {}
        questions, answers, priorities = self._votes
        columns = np.array(questions, np.uint64), np.array(answers, np.uint64), np.array(priorities, np.uint8)
        return conflicts(*columns, self._config.contradictions)

    def _alone(self, row: ReadRow, role: Role) -> KeptRow | RejectedRow:
        file, number = row.raw.file, row.raw.row
        if row.conversation is None:
            return RejectedRow(file=file, row=number, step="schema", reason=row.reason)
        conversation = self.masker.mask(row.conversation) if self.masker else row.conversation
        kept = KeptRow(conversation=conversation, role=role, language="en", badness=None, file=file, row=number)
        try:
            return replace(kept, language=check(conversation, self._config))
        except Broken as broken:
            return rejected(kept, broken.step, str(broken))

    def _sound(self, rows: list[KeptRow], dropped: list[RejectedRow]) -> list[KeptRow]:
        if self._quality is None or self._config.quality is None:
            return rows
        limit = self._config.quality.threshold
        kept = []
        for row, badness in zip(rows, self._quality.badness([row.conversation for row in rows]), strict=True):
            if badness >= limit:
                dropped.append(rejected(row, "quality", f"bad with confidence {badness:.3f}, from {limit:g} on it is dropped"))
            else:
                kept.append(replace(row, badness=float(badness)))
        return kept

    def _vote(self, rows: Sequence[KeptRow]) -> None:
        questions, answers, priorities = self._votes
        for row in rows:
            questions.append(question_key(row.conversation))
            answers.append(answer_key(row.conversation))
            priorities.append(_PRIORITIES[row.role])

    def _unlike_exactly(self, rows: list[KeptRow], dropped: list[RejectedRow]) -> list[KeptRow]:
        if self._exact is None or not rows:
            return rows
        earlier = self._exact.add(keys_of([_whole(row.conversation) for row in rows]))
        self._exact_places.extend(row for row, other in zip(rows, earlier, strict=True) if other < 0)
        kept = []
        for row, other in zip(rows, earlier, strict=True):
            if other < 0:
                kept.append(row)
            else:
                dropped.append(rejected(row, "exact_duplicate", f"exact duplicate of {self._exact_places[other]}"))
        return kept

    def _unlike_nearly(self, rows: list[KeptRow], dropped: list[RejectedRow]) -> list[KeptRow]:
        if self._near is None or not rows:
            return rows
        groups = np.fromiter((_group(row.conversation) for row in rows), np.uint64, len(rows))
        earlier, alike = self._near.add(self._signatures(rows), groups)
        self._near_places.extend(row for row, other in zip(rows, earlier, strict=True) if other < 0)
        kept = []
        for row, other, score in zip(rows, earlier, alike, strict=True):
            if other < 0:
                kept.append(row)
            else:
                dropped.append(rejected(row, "near_duplicate", f"near duplicate ({score:.2f}) of {self._near_places[other]}"))
        return kept

    def _signatures(self, rows: Sequence[KeptRow]) -> npt.NDArray[np.uint32]:
        config = self._config.near_duplicates
        assert config is not None
        sizes = np.array([config.shingle or _SHINGLES[row.language] for row in rows])
        result = np.empty((len(rows), config.num_hashes), np.uint32)
        for size in np.unique(sizes):
            chosen = np.flatnonzero(sizes == size)
            texts = [_compared(rows[int(place)].conversation, config.compare) for place in chosen]
            result[chosen] = signatures(texts, num_hashes=config.num_hashes, shingle=int(size))
        return result


class Places:
    """`file:row` of numbered rows, eight bytes each."""

    def __init__(self) -> None:
        self._files: list[str] = []
        self._rows = array("Q")

    @property
    def num_bytes(self) -> int:
        return len(self._rows) * self._rows.itemsize

    def extend(self, rows: Iterable[KeptRow]) -> None:
        for row in rows:
            if not self._files or self._files[-1] != row.file:
                self._files.append(row.file)
            self._rows.append((len(self._files) - 1) << _ROW_BITS | row.row)

    def __getitem__(self, number: int) -> str:
        file, row = self.at(number)
        return f"{file}:{row}"

    def at(self, number: int) -> tuple[str, int]:
        place = self._rows[number]
        return self._files[place >> _ROW_BITS], place & (1 << _ROW_BITS) - 1


def question_key(conversation: Conversation) -> int:
    """Equal for dialogues with the same turns before the last answer, but for case, blanks and width."""
    return _key("\x1e".join(f"{m.role}\x1f{normalised(m.content)}" for m in conversation.messages[:-1]))


def answer_key(conversation: Conversation) -> int:
    """Equal for the same label: intent and entities where they are annotated, else the words of the last answer."""
    last = conversation.messages[-1]
    if last.annotations is not None and last.annotations.intent is not None:
        return _key(f"{last.annotations.intent}\x1f{sorted((k, str(v)) for k, v in last.annotations.entities.items())}")
    return _key(normalised(last.content))


def _group(conversation: Conversation) -> int:
    """Rows with different labels never repeat each other: one wrong label of two is a contradiction, not a duplicate."""
    annotations = conversation.messages[-1].annotations
    return 0 if annotations is None else answer_key(conversation)


def _whole(conversation: Conversation) -> str:
    """The dialogue with its last label: the same text with another one is no duplicate."""
    turns = [f"{m.role}\x1f{normalised(m.content)}\x1f{normalised(m.reasoning or '')}" for m in conversation.messages]
    return "\x1e".join([*turns, str(_group(conversation))])


def _compared(conversation: Conversation, compare: str) -> str:
    """auto compares the questions where labels already tell answers apart, else everything."""
    labelled = conversation.messages[-1].annotations is not None
    wanted = ("user",) if compare == "questions" or (compare == "auto" and labelled) else ("user", "assistant", "tool")
    return normalised("\n".join(m.content for m in conversation.messages if m.role in wanted))


def _key(text: str) -> int:
    return hash(text) & 0xFFFFFFFFFFFFFFFF
