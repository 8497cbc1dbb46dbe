"""Rows and states arrive as they were sent, over the way that fits where the ranks compute; what waits for a dead rank is ended."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from r1ray.engine.backend import Piece
from r1ray.engine.link import ROW, Link, Place, StatesForm, choose_way
from r1ray.engine.paged import TransformersBackend
from r1ray.engine.pipeline import _free_port
from r1ray.errors import EngineStopped
from tests.engine.conftest import lively
from tests.engine.test_tensor import logits_of, split_backend


def linked(places: list[Place], timeout_s: float = 20) -> list[Link]:
    port = _free_port()
    with ThreadPoolExecutor(len(places)) as pool:
        return list(pool.map(lambda place: Link("127.0.0.1", port, place, timeout_s=timeout_s), places))


def test_rows_of_any_length_arrive() -> None:
    rows = [[], [7], list(range(ROW - 1)), list(range(ROW)), list(range(3 * ROW))]
    other, driver = linked([Place(stage=stage, num_stages=2) for stage in range(2)])
    for row in rows:
        driver.send_row(row, 1)
        assert other.receive_row(0) == row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_arrive_to_the_last_bit_in_the_order_of_the_passes(dtype: torch.dtype) -> None:
    places = [Place(stage=stage, num_stages=3) for stage in range(3)]
    first, middle, last = (link.line(StatesForm(hidden=6, dtype=dtype)) for link, _ in zip(linked(places), places, strict=True))
    sent = [torch.randn(num, 6).to(dtype) for num in (1, 5, 300)]
    for states in sent:
        first.send(states)
    assert first.receive(1) is None
    for states in sent:
        handed = middle.receive(len(states))
        assert handed is not None
        middle.send(handed)
    for states in sent:
        arrived = last.receive(len(states))
        assert arrived is not None and arrived.dtype == dtype
        assert torch.equal(arrived, states)
        last.send(arrived)  # goes nowhere


def test_a_lost_neighbour_is_named() -> None:
    places = [Place(stage=stage, num_stages=2) for stage in range(2)]
    _, link = links = linked(places, timeout_s=1)
    line = link.line(StatesForm(hidden=4))
    assert len(links) == 2
    with pytest.raises(EngineStopped, match="Rank 0 of the pipeline lost rank 1"):
        line.receive(1)


@pytest.mark.parametrize(
    ("gpus", "carrier", "reason"),
    [
        (["", ""], "gloo", "they compute on CPUs"),
        (["a", ""], "gloo", "they compute on CPUs"),
        (["a", "a", "b"], "gloo", "3 ranks on 2 GPUs, and NCCL wants one each"),
        (["a", "b", "c"], "nccl", "each of 3 ranks has a GPU of its own"),
    ],
)
def test_nccl_carries_where_each_rank_has_a_gpu_of_its_own(gpus: list[str], carrier: str, reason: str) -> None:
    way = choose_way(gpus)
    assert way.carrier == carrier
    assert way.reason.endswith(reason)


def test_the_ranks_of_a_stage_follow_each_other_and_the_driver_is_the_first_of_the_last() -> None:
    places = [Place(stage=stage, num_stages=3, tensor=tensor, num_tensor=2) for stage in (2, 0, 1) for tensor in (0, 1)]
    assert [place.rank for place in places] == list(range(6))
    assert [place.bundle for place in places] == [0, 0, 1, 1, 2, 2]
    assert [place.before for place in places] == [4, 5, None, None, 2, 3]
    assert [place.after for place in places] == [None, None, 4, 5, 0, 1]


def test_an_idle_rank_waits_for_longer_than_a_pass_may_take() -> None:
    driver, other = linked([Place(num_tensor=2), Place(tensor=1, num_tensor=2)], timeout_s=2)
    rows: list[list[int]] = []
    follower = threading.Thread(target=lambda: rows.append(other.receive_row(0)), daemon=True)
    follower.start()
    time.sleep(3)
    driver.send_row([7, 8], 1)
    follower.join(5)
    assert rows == [[7, 8]]


def test_stages_in_bfloat16_hand_on_what_one_process_computes(tiny_llama: Path, tmp_path: Path) -> None:
    """States travel in the model's own numbers, and lose nothing."""
    lively(tiny_llama).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    split = split_backend(tmp_path, 2, 1, "bfloat16")
    assert torch.equal(logits_of(split), logits_of(TransformersBackend(model, num_blocks=4)))
    split.close()


class Waiting:
    """Stands for a group of NCCL, which waits for a dead rank until it is told to stop."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def abort(self) -> None:
        self.ended.set()


def test_what_waits_on_a_gpu_for_a_dead_rank_is_ended_after_the_streams_have_heard(tiny_llama: Path) -> None:
    backend = split_backend(tiny_llama, 2, 1)
    workers: Any = backend._workers
    backend._link._on_gpus.append(group := Waiting())
    heard: list[bool] = []
    backend.watch(lambda _reason: heard.append(group.ended.is_set()))

    def dies(*_: Any) -> torch.Tensor:
        raise RuntimeError("gone")

    workers._workers[0].layers.stage = dies
    backend.submit([Piece(ids=[5], start=0, table=[3], num_logits=1)])
    assert group.ended.wait(20)
    assert heard == [False]
