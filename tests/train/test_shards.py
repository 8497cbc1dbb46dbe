"""Token rows on disk: what was written is what is read, from mapped files, and nothing unfinished counts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1ray.errors import DiskFull
from r1ray.train import shards

ROWS = st.lists(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 1)), min_size=1, max_size=20), max_size=40)


def table(rows) -> pa.Table:
    columns = {"input_ids": [[number for number, _ in row] for row in rows], "mask": [[mark for _, mark in row] for row in rows]}
    return with_origins(pa.table(columns, schema=shards.TOKENS))


def with_origins(rows: pa.Table) -> pa.Table:
    return rows.append_column(shards.ORIGIN, pa.array([2**64 - 1 - row for row in range(len(rows))], shards.ORIGIN.type))


def written(place, rows, *, at_once=7, shard_bytes=200):
    with shards.replacing(place) as unfinished, shards.ShardWriter(unfinished, is_mixed=False, shard_bytes=shard_bytes) as writer:
        for start in range(0, len(rows), at_once):
            writer.append(table(rows[start : start + at_once]))
        writer.close({"rejected": 3}, {})
    return place


@settings(deadline=None, max_examples=40)
@given(ROWS)
def test_rows_come_back_in_order_from_any_number_of_shards(tmp_path_factory, rows) -> None:
    place = written(tmp_path_factory.mktemp("set") / "key", rows)
    ids, masks = shards.columns(place)
    assert [list(zip(*pair, strict=True)) for pair in zip(ids, masks, strict=True)] == rows
    assert list(shards.weights(place, "length")) == [len(row) for row in rows]
    assert list(shards.weights(place, "trained")) == [sum(mark for _, mark in row) for row in rows]
    assert [int(origin) for origin in shards.origins(place)] == [2**64 - 1 - row % 7 for row in range(len(rows))]
    counted = shards.counts(place)
    assert counted is not None
    assert (counted["rows"], counted["tokens"], counted["rejected"]) == (len(rows), sum(map(len, rows)), 3)


def test_a_set_of_several_shards_can_be_sliced_and_picked_from_without_a_copy(tmp_path) -> None:
    rows = [[(number, 1), (number + 1, 0)] for number in range(100)]
    ids, _ = shards.columns(written(tmp_path / "key", rows))
    assert len(list((tmp_path / "key").glob("*.arrow"))) > 3
    assert (ids[-1], len(ids), list(ids[98:])) == ([99, 100], 100, [[98, 99], [99, 100]])
    assert list(shards.Picked(ids, [5, 3])) == [[5, 6], [3, 4]]
    with pytest.raises(IndexError):
        ids[100]


def test_the_roles_of_a_mix_are_kept_beside_the_lengths(tmp_path) -> None:
    with shards.replacing(tmp_path / "key") as unfinished, shards.ShardWriter(unfinished, is_mixed=True) as writer:
        rows = table([[(1, 1)], [(2, 1)]])
        writer.append(rows.append_column("role", pa.array(["domain", "history"])).append_column("chars", pa.array([9, 8])))
        writer.close({}, {"r1ray.mix": "plan"})
    found = pq.read_table(tmp_path / "key" / shards.ROWS)
    assert found.select(["length", "role", "chars"]).to_pylist() == [
        {"length": 1, "role": "domain", "chars": 9},
        {"length": 1, "role": "history", "chars": 8},
    ]
    assert pq.read_metadata(tmp_path / "key" / shards.ROWS).metadata[b"r1ray.mix"] == b"plan"


def test_a_file_that_was_cut_off_does_not_count(tmp_path) -> None:
    place = written(tmp_path / "key", [[(1, 1)]] * 50)
    shard = sorted(place.glob("*.arrow"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    assert shards.counts(place) is None
    assert shards.counts(tmp_path / "nothing") is None


def test_an_error_leaves_nothing_and_a_full_disk_says_so(tmp_path) -> None:
    for raised, shown in ((ValueError("no"), ValueError), (OSError(28, "No space left on device"), DiskFull)):
        with (
            pytest.raises(shown),
            shards.replacing(tmp_path / "key") as unfinished,
            shards.ShardWriter(unfinished, is_mixed=False) as writer,
        ):
            writer.append(table([[(1, 1)]]))
            raise raised
        assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_jobs_that_write_the_same_set_is_kept(tmp_path) -> None:
    with shards.replacing(tmp_path / "key") as slow:
        (slow / "who").write_text("slow")
        written(tmp_path / "key", [[(1, 1)]])
    assert shards.counts(tmp_path / "key") is not None
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


KILLED = """
import sys, pathlib, time, pyarrow as pa
from r1ray.train import shards
with shards.replacing(pathlib.Path(sys.argv[1])) as unfinished, shards.ShardWriter(unfinished, is_mixed=False) as writer:
    writer.append(pa.table({"input_ids": [[1, 2]], "mask": [[0, 1]], "origin": pa.array([1], pa.uint64())}))
    print("written", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_does_not_count_and_is_swept(tmp_path) -> None:
    place = tmp_path / "key"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(place)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        os.kill(process.pid, signal.SIGKILL)
    assert not place.exists() and shards.counts(place) is None
    assert len(list(tmp_path.iterdir())) == 1, "its hidden directory"
    written(place, [[(1, 1)]])
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
