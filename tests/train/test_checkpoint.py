from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from r1ray.errors import CheckpointCorrupt
from r1ray.train import checkpoint
from r1ray.train.checkpoint import Meta
from r1ray.train.standing import Standing


def save(run: Path, step: int, world: int = 2, *, best_step: int = 0) -> Path:
    """A checkpoint as two ranks write it, DeepSpeed's shards replaced by small files."""
    standing = Standing(loss=1.0, best_loss=0.5, best_step=best_step) if best_step else Standing()
    meta = Meta(run="r", step=step, world_size=world, zero_stage=2, elapsed_s=step / 10, standing=standing)
    destination = run / checkpoint.directory_name(step, meta.elapsed_s)
    for rank in range(world):
        staged = run / ".saving" / str(rank)
        (staged / "global_step").mkdir(parents=True, exist_ok=True)
        (staged / "global_step" / f"shard{rank}.pt").write_bytes(bytes([rank]) * 1000)
        checkpoint.publish(staged, destination, meta, rank)
    return destination


def test_the_newest_checkpoint_is_found_whatever_the_order_of_saving(tmp_path) -> None:
    save(tmp_path, 20)
    save(tmp_path, 100)
    found = checkpoint.last_good(tmp_path)
    assert found is not None and found[1].step == 100
    assert checkpoint.last_good(tmp_path / "none") is None


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "unfinished", "garbled list"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path, caplog, damage) -> None:
    save(tmp_path, 10)
    last = save(tmp_path, 20)
    shard = last / "global_step" / "shard1.pt"
    if damage == "truncated":
        shard.write_bytes(b"\1" * 10)
    elif damage == "altered":
        shard.write_bytes(b"\1" * 999 + b"\2")
    elif damage == "missing":
        shard.unlink()
    elif damage == "unfinished":
        (last / "meta-rank1.json").unlink()
    else:
        (last / "meta-rank1.json").write_text("{")
    found = checkpoint.last_good(tmp_path)
    assert found is not None and found[1].step == 10
    assert last.name in caplog.text and "step 10" in caplog.text


def test_no_good_checkpoint_left_is_an_error_that_says_what_to_do(tmp_path) -> None:
    (save(tmp_path, 10) / "global_step" / "shard0.pt").write_bytes(b"")
    with pytest.raises(CheckpointCorrupt, match=r"train\.restart=true"):
        checkpoint.last_good(tmp_path)


def test_a_first_checkpoint_that_was_never_finished_is_no_checkpoint(tmp_path) -> None:
    (save(tmp_path, 10) / "meta-rank0.json").unlink()
    assert checkpoint.last_good(tmp_path) is None


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from r1ray.train import checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))
run = Path(sys.argv[1])
meta = checkpoint.Meta(run="r", step=20, world_size=1, zero_stage=2, elapsed_s=2)
try:
    checkpoint.publish(run / "staged", run / checkpoint.directory_name(20, 2), meta, 0)
except checkpoint.DiskFull as error:
    print(error)
"""


def test_no_room_for_a_checkpoint_is_disk_full_and_leaves_the_last_one_usable(tmp_path) -> None:
    save(tmp_path, 10)
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged" / "shard.pt").write_bytes(b"x" * 1000)
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "No room to save" in done.stdout and "resumes" in done.stdout
    found = checkpoint.last_good(tmp_path)
    assert found is not None and found[1].step == 10


def test_torchs_failed_write_counts_as_a_full_disk_only_when_the_disk_is_full(tmp_path) -> None:
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    assert checkpoint.out_of_room(OSError(28, "No space left on device"), tmp_path)
    assert not checkpoint.out_of_room(error, tmp_path)


def test_readers_that_share_a_checkpoint_find_every_damage_once(tmp_path) -> None:
    directory = save(tmp_path, 10, world=5)
    for damaged in sorted(directory.rglob("*.pt")):
        whole = damaged.read_bytes()
        damaged.write_bytes(b"\7" * len(whole))
        for num_readers in (2, 3, 8):
            found = [problem_of(directory, part, num_readers) for part in range(num_readers)]
            assert sum(damaged.name in problem for problem in found if problem) == 1
        damaged.write_bytes(whole)
    assert [problem_of(directory, part, 2) for part in range(2)] == [None, None]


def problem_of(directory: Path, part: int, of: int) -> str | None:
    try:
        checkpoint.read(directory, part=part, of=of)
    except CheckpointCorrupt as error:
        return str(error)
    return None


def test_sweeping_removes_what_was_never_finished_and_nothing_else(tmp_path, caplog) -> None:
    whole, altered, cut, listless, known = (save(tmp_path, step) for step in (10, 20, 30, 40, 50))
    (altered / "global_step" / "shard1.pt").write_bytes(b"")
    (cut / "meta-rank1.json").unlink()
    (listless / "meta-rank0.json").unlink()
    (known / "meta-rank1.json").unlink()
    (tmp_path / "checkpoint_manager_snapshot.json").write_text(f'{{"checkpoint_dir_name": "{known.name}"}}')
    checkpoint.staging(tmp_path, 5).mkdir(parents=True)
    (tmp_path / "run.json").touch()
    assert checkpoint.sweep(tmp_path) == [known, altered, whole]
    assert checkpoint.found(tmp_path) == [known, altered, whole], "Ray Train would not start without what it has listed"
    assert not checkpoint.staging(tmp_path, 5).exists() and (tmp_path / "run.json").exists()
    assert cut.name in caplog.text and listless.name in caplog.text


def heard_of(run: Path, *known: Path) -> None:
    """As Ray Train keeps its list."""
    names = ", ".join(f'{{"checkpoint_dir_name": "{directory.name}"}}' for directory in known)
    (run / "checkpoint_manager_snapshot.json").write_text(f'{{"checkpoint_results": [{names}]}}')


def test_a_checkpoint_whose_workers_died_before_they_told_ray_is_resumed_from(tmp_path) -> None:
    known, untold = save(tmp_path, 10), save(tmp_path, 20)
    heard_of(tmp_path, known)
    assert checkpoint.sweep(tmp_path) == [untold, known]
    found = checkpoint.last_good(tmp_path)
    assert found is not None and found[0] == untold


def test_however_often_workers_die_before_they_tell_ray_the_disk_does_not_fill(tmp_path, caplog) -> None:
    known = save(tmp_path, 10)
    heard_of(tmp_path, known)
    for attempt in range(2, 9):
        newest = save(tmp_path, 10 * attempt)
        kept = checkpoint.sweep(tmp_path)
        assert kept[0] == newest and kept[-1] == known
        assert len(checkpoint.found(tmp_path)) == len(kept) <= 3
    assert "newer checkpoints have taken its place" in caplog.text


def test_the_best_checkpoint_stays_though_ray_does_not_know_it_until_there_is_a_better_one(tmp_path) -> None:
    best = save(tmp_path, 10, best_step=10)
    for step in (20, 30, 40):
        save(tmp_path, step, best_step=10)
        assert best in checkpoint.sweep(tmp_path)
    for step in (50, 60, 70):
        save(tmp_path, step, best_step=50)
        assert best not in checkpoint.sweep(tmp_path)
    assert checkpoint.best_good(tmp_path) == (kept := checkpoint.found(tmp_path)[-1], checkpoint.read(kept))
    assert checkpoint.read(kept).step == 50


def test_what_the_ranks_have_just_read_is_not_read_again(tmp_path) -> None:
    before, last = save(tmp_path, 10), save(tmp_path, 20)
    shard = last / "global_step" / "shard1.pt"
    shard.write_bytes(b"\7" * 1000)
    seen = checkpoint.best_good(tmp_path, checked=[last.name])
    assert seen is not None and seen[0] == last, "only its files' sizes are looked at"
    read = checkpoint.best_good(tmp_path)
    assert read is not None and read[0] == before
    shard.write_bytes(b"\7" * 999)
    short = checkpoint.best_good(tmp_path, checked=[last.name])
    assert short is not None and short[0] == before, "a file that was cut off since is seen"


def test_the_best_checkpoint_alone_is_read_and_the_newest_takes_its_place_when_it_is_damaged(tmp_path, caplog) -> None:
    best, newest = save(tmp_path, 10, best_step=10), save(tmp_path, 20, best_step=10)
    (newest / "global_step" / "shard0.pt").write_bytes(b"\7" * 1000)
    found = checkpoint.best_good(tmp_path)
    assert found is not None and found[0] == best, "what the newest one weighs is nobody's business"
    (newest / "global_step" / "shard0.pt").write_bytes(b"\0" * 1000)
    (best / "global_step" / "shard0.pt").write_bytes(b"\7" * 1000)
    found = checkpoint.best_good(tmp_path)
    assert found is not None and found[0] == newest and "the best one, cannot be read" in caplog.text
