"""Nothing is lost on the way: what is written is read back, and what is corrupted is reported."""

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1ray.data.config import DataConfig
from r1ray.data.read import read_conversations
from r1ray.data.records import Reject
from r1ray.data.schema import data_hash, from_table, to_table
from r1ray.data.write import write_parquet, write_rejects
from r1ray.types import Annotations, Conversation, Message

texts = st.text(min_size=1, max_size=20).filter(lambda t: t.strip() and "</think>" not in t)
values = st.one_of(texts, st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.booleans())
annotations = st.none() | st.builds(Annotations, intent=st.none() | texts, entities=st.dictionaries(texts, values, max_size=3))
users = st.builds(Message, role=st.just("user"), content=texts)
answers = st.builds(Message, role=st.just("assistant"), content=texts, reasoning=st.none() | texts, annotations=annotations)
dialogues = st.lists(st.tuples(users, answers), min_size=1, max_size=3).map(lambda pairs: tuple(m for pair in pairs for m in pair))
conversations = st.lists(
    st.builds(Conversation, id=texts, messages=dialogues, source=texts), min_size=1, max_size=5, unique_by=lambda c: c.id
).map(tuple)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "text", "utterances", "x"]), inner, max_size=3),
    max_leaves=6,
)


@given(conversations)
@settings(max_examples=60, deadline=None)
def test_a_table_gives_back_what_was_put_in(given_conversations):
    assert from_table(to_table(given_conversations)) == given_conversations


@given(conversations)
@settings(max_examples=40, deadline=None)
def test_a_written_file_is_read_back_equal(tmp_path_factory, given_conversations):
    path = write_parquet(given_conversations, tmp_path_factory.mktemp("w") / "x.parquet")
    loaded = read_conversations(DataConfig(path=path))
    assert loaded.conversations == given_conversations
    assert loaded.data_hash == data_hash(given_conversations)


def annotated(number):
    turns = [{"role": "user", "text": f"question {number}"}, {"role": "assistant", "text": "answer", "annotations": {"intent": "i"}}]
    return {"conversation_id": str(number), "utterances": turns}


@given(st.lists(st.tuples(st.integers(0, 4), junk), min_size=1, max_size=6))
@settings(max_examples=80, deadline=None)
def test_a_corrupted_row_is_reported_not_lost(tmp_path_factory, damages):
    rows = [annotated(0)]
    for number, (kind, value) in enumerate(damages, start=1):
        row = annotated(number)
        if kind == 0:
            rows.append(value)
            continue
        if kind == 1:
            row["utterances"] = value
        elif kind == 2:
            row["utterances"][number % 2] = value
        elif kind == 3:
            row["utterances"][0]["role"] = value
        else:
            row["utterances"][1]["annotations"] = value
        rows.append(row)
    path = tmp_path_factory.mktemp("d") / "x.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    loaded = read_conversations(DataConfig(path=path, max_bad_share=1.0))
    assert len(loaded.conversations) + len(loaded.rejects) == loaded.num_rows == len(rows)
    assert all(reject.reason for reject in loaded.rejects)


@given(st.lists(st.text(alphabet='ab",\n', max_size=8), max_size=8))
@settings(max_examples=80, deadline=None)
def test_no_csv_text_loses_a_row(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("c") / "x.csv"
    path.write_text("text,label\nfirst,a\n" + "\n".join(lines) + "\nlast,b\n", encoding="utf-8")
    loaded = read_conversations(DataConfig(path=path, max_bad_share=1.0))
    assert len(loaded.conversations) + len(loaded.rejects) == loaded.num_rows
    seen = [c.messages[0].content for c in loaded.conversations]
    assert seen[0] == "first"
    assert "last" in seen[-1] or any("quote" in reject.reason or "no CSV" in reject.reason for reject in loaded.rejects)


def test_equal_conversations_give_equal_bytes(tmp_path):
    one = Conversation(id="1", messages=(Message(role="user", content="a"), Message(role="assistant", content="b")))
    first, second = write_parquet([one], tmp_path / "a.parquet"), write_parquet([replace(one)], tmp_path / "b.parquet")
    assert first.read_bytes() == second.read_bytes()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"old")
    broken = Conversation(id="1", messages=(Message(role="user", content="\ud800"),))
    with pytest.raises(UnicodeEncodeError):
        write_parquet([broken], path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.parquet"]
    assert path.read_bytes() == b"old"


def test_rejects_are_json_lines(tmp_path):
    path = write_rejects([Reject(file="数据.csv", row=3, reason="empty")], tmp_path / "new" / "rejects.jsonl")
    assert path.read_text(encoding="utf-8") == '{"file": "数据.csv", "row": 3, "reason": "empty"}\n'
