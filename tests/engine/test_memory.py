"""The cache is as large as the fullest process of a model can hold."""

from __future__ import annotations

import pytest

from r1ray.engine.memory import CacheWish, Room, blocks_for, room_on
from r1ray.errors import InvalidValue

GB = 10**9
WISH = CacheWish(num_slots=32, context=32_000)


def gpu(name: str, free: int, block: int, workspace: int = 0) -> Room:
    return Room(memory=name, kind="cuda", free_bytes=free, bytes_per_block=block, workspace_bytes=workspace)


def test_the_fullest_process_decides_and_each_has_blocks_of_its_own_layers() -> None:
    rooms = [gpu("a", 40 * GB, 4_000_000), gpu("b", 20 * GB, 4_000_000), gpu("c", 30 * GB, 8_000_000)]
    assert blocks_for(rooms, WISH) == int(0.9 * 30 * GB / 8_000_000)
    assert blocks_for(rooms[:2], WISH) == int(0.9 * 20 * GB / 4_000_000)


def test_what_a_pass_takes_is_left() -> None:
    assert blocks_for([gpu("a", 10 * GB, 1_000_000, workspace=4 * GB)], WISH) == 5_000


def test_processes_in_one_memory_share_it() -> None:
    rooms = [gpu("a", 10 * GB, 1_000_000, workspace=GB), gpu("a", 11 * GB, 3_000_000, workspace=GB)]
    assert blocks_for(rooms, WISH) == 7 * GB // 4_000_000


def test_nobody_takes_more_than_all_slots_can_use() -> None:
    assert blocks_for([gpu("a", 80 * GB, 1_000)], CacheWish(num_slots=3, context=100)) == 3 * 4 + 1


def test_a_given_size_is_that_of_every_process() -> None:
    wish = CacheWish(num_slots=32, context=32_000, gigabytes=2.0)
    assert blocks_for([gpu("a", GB, 1_000_000), gpu("b", GB, 4_000_000)], wish) == 500


def test_no_room_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(InvalidValue, match=r"1\.00 GB are free on a; a pass wants 2\.00 GB .* set more stages"):
        blocks_for([gpu("a", GB, 1_000, workspace=2 * GB)], WISH)


def test_main_memory_is_measured() -> None:
    room = room_on("cpu", 1000)
    assert room.kind == "cpu"
    assert room.free_bytes > 0
    assert room_on("cpu", 1).memory == room.memory
