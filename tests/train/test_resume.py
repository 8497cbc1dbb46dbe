"""All ranks start from the same checkpoint, whoever of them finds the damage."""

from __future__ import annotations

from pathlib import Path

import pytest

from r1ray.errors import CheckpointCorrupt
from r1ray.settings import Settings
from r1ray.train import checkpoint
from r1ray.train.checkpoint import Meta
from r1ray.train.config import TrainConfig
from r1ray.train.order import WorkOrder
from r1ray.train.parallel.layout import Layout
from r1ray.train.resume import agreed_start
from tests.train.ranked import ranks


def save(run: Path, step: int, world: int = 2, zero_stage: int = 2) -> Path:
    meta = Meta(run="r", step=step, world_size=world, zero_stage=zero_stage, elapsed_s=step / 10)
    destination = run / checkpoint.directory_name(step, meta.elapsed_s)
    for rank in range(world):
        staged = checkpoint.staging(run, rank)
        staged.mkdir(parents=True, exist_ok=True)
        (staged / f"shard{rank}.pt").write_bytes(bytes([rank]) * 1000)
        checkpoint.publish(staged, destination, meta, rank)
    return destination


def start(run: Path, world: int, layout: Layout | None = None, **changes) -> list:
    rest = {"base": None, "material": None, "num_steps": 1, "dtype": "float32", "attention": "eager", "settings": Settings()}
    order = WorkOrder(config=TrainConfig(**changes), run="r", run_directory=run, **rest)  # type: ignore[arg-type]
    return ranks(world, lambda peers: agreed_start(order, layout or Layout(world=world), peers))


def test_a_run_without_a_checkpoint_starts_anew_on_every_rank(tmp_path) -> None:
    assert start(tmp_path, 2) == [None, None]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("damaged", ["shard0.pt", "shard1.pt"])
def test_damage_that_one_rank_reads_makes_all_of_them_fall_back(tmp_path, damaged, world, caplog) -> None:
    good = save(tmp_path, 10, zero_stage=0)
    (save(tmp_path, 20, zero_stage=0) / damaged).write_bytes(b"\7" * 1000)
    found = start(tmp_path, world, zero_stage=0)
    assert [answer[0] for answer in found] == [good] * world
    assert caplog.text.count("was altered") == 1, "rank 0 speaks for all"


def test_what_a_killed_attempt_left_half_saved_is_removed(tmp_path) -> None:
    good = save(tmp_path, 10)
    cut = save(tmp_path, 20)
    (cut / "meta-rank1.json").unlink()
    checkpoint.staging(tmp_path, 7).mkdir(parents=True)
    assert [answer[0] for answer in start(tmp_path, 2)] == [good, good]
    assert sorted(path.name for path in tmp_path.iterdir()) == [good.name]


def test_no_good_checkpoint_is_everybodys_error(tmp_path) -> None:
    (save(tmp_path, 10) / "shard1.pt").unlink()
    for error in start(tmp_path, 2):
        assert isinstance(error, CheckpointCorrupt) and getattr(error, "agreed", False)
        assert "train.restart=true" in str(error)


def test_another_stage_and_another_number_of_workers_that_share_a_model_are_refused(tmp_path) -> None:
    save(tmp_path, 10, zero_stage=1)
    for error in start(tmp_path, 2, zero_stage=2):
        assert isinstance(error, CheckpointCorrupt) and "train.zero_stage=1" in str(error)
    for error in start(tmp_path, 4, Layout(world=4, tensor=2), zero_stage=1):
        assert isinstance(error, CheckpointCorrupt) and "train.num_workers=2" in str(error)


def test_what_cannot_be_converted_is_everybodys_error(tmp_path) -> None:
    save(tmp_path, 10)
    for error in start(tmp_path, 3):
        assert isinstance(error, CheckpointCorrupt) and getattr(error, "agreed", False)
        assert "cannot be converted for another number of workers" in str(error)
