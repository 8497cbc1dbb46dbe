"""Rows come back from the mapped file as they were written; what fails on the way leaves nothing."""

import pyarrow as pa
import pytest

from r1ray.train.mapped import MappedRows, mapped, write_rows

SCHEMA = pa.schema([("ids", pa.list_(pa.int32())), ("text", pa.string())])
ROWS = [{"ids": list(range(number)), "text": f"行 {number}"} for number in range(5000)]  # more than a block


def test_rows_are_read_as_they_were_written(tmp_path) -> None:
    write_rows(tmp_path / "deep" / "rows.arrow", SCHEMA, iter(ROWS[-4200:]))
    rows = MappedRows(mapped(tmp_path / "deep" / "rows.arrow"), lambda row: (len(row["ids"]), row["text"]))
    assert (len(rows), rows[0], rows[-1], rows[4150]) == (4200, (800, "行 800"), (4999, "行 4999"), (4950, "行 4950"))
    assert rows[1:6:2] == [(801, "行 801"), (803, "行 803"), (805, "行 805")]
    with pytest.raises(IndexError):
        rows[4200]


def test_what_fails_leaves_no_file(tmp_path) -> None:
    def rows():
        yield ROWS[1]
        raise ValueError("a row that cannot be made")

    with pytest.raises(ValueError, match="cannot be made"):
        write_rows(tmp_path / "rows.arrow", SCHEMA, rows())
    assert list(tmp_path.iterdir()) == []
