"""Conversations as a pyarrow table, and the hash that names a set of them. Knows no file.

One row is one dialogue in seed 004's annotated form, plus `reasoning` and `source`. Entities are one JSON text per turn:
a column type per entity would make the schema depend on the data, and a map would lose the values' types.

A prepared set has columns more, which readers of dialogues may ignore: what a row is for and how it came to be.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from r1ray.types import Annotations, Conversation, Message

__all__ = ["PREPARED", "SCHEMA", "canonical", "content_digest", "content_id", "data_hash", "from_canonical", "from_table", "to_table"]

_ANNOTATIONS = pa.struct([pa.field("intent", pa.string()), pa.field("entities", pa.string(), nullable=False)])
_UTTERANCE = pa.struct(
    [
        pa.field("role", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("reasoning", pa.string()),
        pa.field("annotations", _ANNOTATIONS),
    ]
)
SCHEMA = pa.schema(
    [
        pa.field("conversation_id", pa.string(), nullable=False),
        pa.field("utterances", pa.list_(_UTTERANCE), nullable=False),
        pa.field("source", pa.string(), nullable=False),
    ]
)

PREPARED = pa.schema(
    [
        *SCHEMA,
        pa.field("role", pa.string(), nullable=False),  # domain, out_of_domain or history
        pa.field("language", pa.string(), nullable=False),
        pa.field("chars", pa.int32(), nullable=False),  # of all turns
        pa.field("badness", pa.float32()),  # what the quality model said
        pa.field("origin", pa.string(), nullable=False),  # id of the row that it was made from; its own id where nothing was made
        pa.field("operations", pa.string(), nullable=False),  # JSON list, empty where nothing was made: augment.provenance undoes it
    ]
)


def to_table(conversations: Sequence[Conversation]) -> pa.Table:
    """One row per conversation, in order."""
    return pa.Table.from_pylist([_row(c) for c in conversations], schema=SCHEMA)


def from_table(table: pa.Table) -> tuple[Conversation, ...]:
    """Inverse of `to_table`: equal records, sources included."""
    return tuple(_conversation(row) for row in table.to_pylist())


def canonical(conversation: Conversation) -> str:
    """The dialogue's content as one JSON text: equal for equal turns, whatever file, format or id they came with."""
    turns = [[m.role, m.content, m.reasoning, _plain(m.annotations)] for m in conversation.messages]
    return json.dumps(turns, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def from_canonical(text: str) -> tuple[Message, ...]:
    """Inverse of `canonical`: the dialogue's turns."""
    return tuple(
        Message(role=role, content=content, reasoning=reasoning, annotations=None if marks is None else Annotations(**marks))
        for role, content, reasoning, marks in json.loads(text)
    )


def content_id(messages: tuple[Message, ...]) -> str:
    """Sixteen hex digits for a dialogue whose file gives it no id."""
    return content_digest(canonical(Conversation(id="", messages=messages))).hex()[:16]


def content_digest(text: str) -> bytes:
    """sha256 of a dialogue's canonical text: 32 bytes."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def data_hash(conversations: Iterable[Conversation]) -> str:
    """sha256 over the digests of the canonical rows in order: what a manifest stores as the training data's identity."""
    digest = hashlib.sha256()
    for conversation in conversations:
        digest.update(content_digest(canonical(conversation)))
    return digest.hexdigest()


def _row(conversation: Conversation) -> dict[str, Any]:
    utterances = [
        {"role": m.role, "text": m.content, "reasoning": m.reasoning, "annotations": _stored(m.annotations)} for m in conversation.messages
    ]
    return {"conversation_id": conversation.id, "utterances": utterances, "source": conversation.source}


def _conversation(row: Mapping[str, Any]) -> Conversation:
    messages = tuple(
        Message(role=u["role"], content=u["text"], reasoning=u["reasoning"], annotations=_restored(u["annotations"]))
        for u in row["utterances"]
    )
    return Conversation(id=row["conversation_id"], messages=messages, source=row["source"])


def _plain(annotations: Annotations | None) -> dict[str, Any] | None:
    return None if annotations is None else {"intent": annotations.intent, "entities": dict(annotations.entities)}


def _stored(annotations: Annotations | None) -> dict[str, Any] | None:
    if annotations is None:
        return None
    return {"intent": annotations.intent, "entities": json.dumps(dict(annotations.entities), ensure_ascii=False)}


def _restored(stored: Mapping[str, Any] | None) -> Annotations | None:
    return None if stored is None else Annotations(intent=stored["intent"], entities=json.loads(stored["entities"]))
