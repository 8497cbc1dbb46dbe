from __future__ import annotations

import tracemalloc
from pathlib import Path

from r1ray.data.config import DataConfig
from r1ray.data.lines import LONGEST_ROW_BYTES, MIB, TOO_LONG, text_lines
from r1ray.data.read import read_conversations

ROW = b'{"text": "my card is lost", "label": "card_lost"}\n'


def with_long_line(path: Path, num_bytes: int) -> Path:
    """A row, a line of so many zero bytes that take no room on the disk, a row."""
    with path.open("wb") as file:
        file.write(ROW)
        file.seek(num_bytes, 1)
        file.write(b"\n" + ROW)
    return path


def test_a_line_of_a_gigabyte_is_skipped_in_bounded_memory(tmp_path) -> None:
    path = with_long_line(tmp_path / "rows.jsonl", 1024 * MIB)
    tracemalloc.start()
    with path.open("rb") as file:
        lines = list(text_lines(file, path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [number for number, _ in lines] == [1, 2, 3]
    assert [text is None for _, text in lines] == [False, True, False]
    assert peak < 3 * LONGEST_ROW_BYTES


def test_a_line_that_is_too_long_is_one_rejected_row_with_its_reason(tmp_path) -> None:
    path = with_long_line(tmp_path / "rows.jsonl", LONGEST_ROW_BYTES)
    loaded = read_conversations(DataConfig(path=path, max_bad_share=0.5))
    assert len(loaded.conversations) == 2
    assert [TOO_LONG in reject.reason for reject in loaded.rejects] == [True]
