"""Slices of a set: together they hold each row once, in order, with the place that it has in its whole file."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1ray.data.config import DataConfig
from r1ray.data.files import rows_of
from r1ray.data.read import read_conversations, read_slice, survey_conversations
from r1ray.data.records import BadRow
from r1ray.errors import InvalidValue, MissingColumn, NothingToTrain, WrongEncoding

LINE = st.one_of(
    st.builds(lambda text, label: json.dumps({"text": text, "label": label}, ensure_ascii=False), st.text(), st.sampled_from("ab")),
    st.sampled_from(["", "   ", '{"text": ', "[1]", '"x"', '{"text": "你好", "label": "卡"}']),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(LINE, max_size=30), st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans(), st.integers(1, 200))
def test_lines_keep_their_numbers_wherever_a_file_is_cut(tmp_path_factory, lines, end, is_marked, is_ended, slice_bytes) -> None:
    path = tmp_path_factory.mktemp("set") / "rows.jsonl"
    text = end.join(['{"text": "first", "label": "a"}', *lines]) + (end if is_ended else "")
    path.write_bytes((b"\xef\xbb\xbf" if is_marked else b"") + text.encode("utf-8", "replace"))
    surveyed = survey_conversations(DataConfig(path=path), slice_bytes)
    assert [row for piece in surveyed.slices for row in piece.rows()] == list(rows_of(path))
    assert surveyed.num_bytes == path.stat().st_size


@pytest.mark.parametrize("slice_bytes", [1, 600, 10**9])
def test_parquet_is_cut_between_row_groups(tmp_path, slice_bytes) -> None:
    table = pa.table({"text": [f"question {n}" for n in range(100)], "label": ["a", "b"] * 50})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=7)
    surveyed = survey_conversations(DataConfig(path=tmp_path), slice_bytes)
    assert len(surveyed.slices) == {1: 15, 600: len(surveyed.slices), 10**9: 1}[slice_bytes]
    rows = [row for piece in surveyed.slices for row in piece.rows()]
    assert rows == list(rows_of(tmp_path / "x.parquet"))


def test_other_files_are_one_slice_each_and_folders_and_patterns_give_them_in_name_order(tmp_path) -> None:
    (tmp_path / "b.csv").write_text("text,label\nhow,x\n")
    (tmp_path / "a.json").write_text(json.dumps([{"text": "who", "label": "x"}]))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.jsonl").write_text(json.dumps({"text": "why", "label": "x"}))
    for path, names in ((tmp_path, "a.json b.csv c.jsonl"), (tmp_path / "*.*", "a.json b.csv"), (tmp_path / "**/c*", "c.jsonl")):
        surveyed = survey_conversations(DataConfig(path=path), 1)
        assert [piece.path.name for piece in surveyed.slices] == names.split()
        assert len(read_conversations(DataConfig(path=path)).conversations) == len(names.split())


def test_rows_that_are_read_apart_are_those_that_are_read_together(tmp_path) -> None:
    lines = [{"id": f"n{n // 2}", "text": f"what {n}", "label": "a"} if n % 5 else {"text": "", "label": "a"} for n in range(40)]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    config = DataConfig(path=tmp_path, max_bad_share=1)
    apart = [row for piece in survey_conversations(config, 100).slices for row in read_slice(piece, config)]
    together = read_conversations(config)
    found = [row.found for row in apart if not isinstance(row.found, BadRow)]
    known = {conversation.source: conversation for conversation in together.conversations}
    assert len(apart) == together.num_rows == 40
    assert len(found) > len(known), "whoever sees all rows judges ids that come twice"
    assert all(conversation == known[conversation.source] for conversation in found if conversation.source in known)
    assert all(row.names_itself for row in apart if not isinstance(row.found, BadRow))


def test_a_set_is_named_by_its_bytes_and_not_by_its_place(tmp_path) -> None:
    digests = []
    for folder, texts in (("a", "xy"), ("b", "xy"), ("c", "xz"), ("d", "yx")):
        (tmp_path / folder).mkdir()
        for name, text in zip(("1.jsonl", "2.jsonl"), texts, strict=True):
            (tmp_path / folder / name).write_text(json.dumps({"text": text, "label": "l"}))
        digests.append(survey_conversations(DataConfig(path=tmp_path / folder)).digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


@pytest.mark.parametrize(
    ("name", "data", "error"),
    [
        ("x.jsonl", b"", NothingToTrain),
        ("x.csv", b"colour,size\na,b\n", MissingColumn),
        ("x.jsonl", '{"text": "卡", "label": "a"}'.encode("gbk"), WrongEncoding),
        ("nothing.txt", b"x", NothingToTrain),
    ],
)
def test_a_file_that_cannot_be_read_at_all_is_refused_before_anything_starts(tmp_path, name, data, error) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(error):
        survey_conversations(DataConfig(path=tmp_path))


def test_a_pattern_without_a_match_names_itself(tmp_path, monkeypatch) -> None:
    with pytest.raises(InvalidValue, match=r"No file matches .*none-\*"):
        survey_conversations(DataConfig(path=tmp_path / "none-*.jsonl"))
    monkeypatch.setenv("R1RAY_HOME", str(tmp_path))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "x.jsonl").write_text(json.dumps({"text": "x", "label": "l"}))
    relative = DataConfig(path="corpus/*.jsonl")
    monkeypatch.chdir(tmp_path.parent)
    assert len(read_conversations(relative).conversations) == 1
