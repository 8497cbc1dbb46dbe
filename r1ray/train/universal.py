"""A checkpoint of one number of workers -> the same state for any other number: DeepSpeed's universal checkpoint.

    run/checkpoint_00000040_000000061234/              as its workers left it
    run/.universal/checkpoint_00000040_000000061234/   converted
      global_step40/zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt
      latest_universal, trainer_state.json, scheduler.pt

Converted once, by one rank (a large one in several processes), and renamed into place when it is whole. The ranks' random states stay
behind: they belong to ranks. Knows no trainer and no Ray.
"""

from __future__ import annotations

import contextlib
import io
import logging
import multiprocessing
import os
import shutil
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from r1ray.errors import CheckpointCorrupt
from r1ray.train import checkpoint

__all__ = ["converted", "forget", "num_processes", "separate_steps"]

_PLACE = ".universal"
_KEPT = ("trainer_state.json", "scheduler.pt")
_SMALL_BYTES = 1 << 30
"""Converted sooner than a process that can do it has started."""
_log = logging.getLogger(__name__)


def converted(source: Path) -> Path:
    """The directory that any number of workers can resume from; needs room for 12 bytes per trained weight.

    Raises:
        CheckpointCorrupt: DeepSpeed cannot convert it.
        DiskFull: no room for the copy.
    """
    place = source.parent / _PLACE
    target, staged = place / source.name, place / f".{source.name}"
    if target.is_dir():
        return target
    shutil.rmtree(place, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        _convert_aside(source, staged, num_processes(source))
        for name in _KEPT:
            shutil.copyfile(source / name, staged / name)
    except Exception as error:
        shutil.rmtree(staged, ignore_errors=True)
        if checkpoint.out_of_room(error, source.parent):
            raise checkpoint.disk_full(staged, error) from error
        raise CheckpointCorrupt(
            f"{source} cannot be converted for another number of workers: {type(error).__name__}: {error}. Resume with the number that "
            "wrote it, or set train.restart=true."
        ) from error
    return staged.rename(target)


def forget(run_directory: Path) -> None:
    """Remove what was converted: a newer checkpoint has taken its place."""
    shutil.rmtree(run_directory / _PLACE, ignore_errors=True)


def separate_steps(engine: Any) -> None:
    """After loading: a step count of its own for each of the optimizer's tensors.

    DeepSpeed 0.19.8 gives all tensors of ZeRO-3 one and the same count, which then moves once per tensor instead of once per step.
    """
    for state in engine.optimizer.optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].clone()


def num_processes(source: Path, *, num_cores: int | None = None, free_bytes: int | None = None) -> int:
    """That convert `source` together: one if it is small, else one per core, but no more than shards that the memory holds twice."""
    shards = [path.stat().st_size for path in source.rglob("*_optim_states.pt")]
    if sum(shards) < _SMALL_BYTES:
        return 1
    cores = num_cores or len(os.sched_getaffinity(0))
    free = psutil.virtual_memory().available if free_bytes is None else free_bytes
    return max(1, min(cores, len(shards), free // (2 * max(shards))))


def _convert_aside(source: Path, staged: Path, num_workers: int) -> None:
    """Several processes are forked from one that has no thread yet, which a worker is not."""
    if num_workers == 1:
        return _convert(source, staged, 1)
    _log.warning("converting it in %d processes", num_workers)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as aside:
        return aside.submit(_convert, source, staged, num_workers).result()


def _convert(source: Path, staged: Path, num_workers: int) -> None:
    """DeepSpeed's own tool, in this process; it prints, draws bars and reads paths as patterns, so they are made relative and plain."""
    from deepspeed.checkpoint import ds_to_universal

    tag = (source / "latest").read_text(encoding="utf-8").strip()
    quiet = io.StringIO()
    with contextlib.chdir(source.parent), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        ds_to_universal.main(
            Namespace(
                input_folder=str(Path(source.name) / tag),
                output_folder=str(staged.relative_to(source.parent) / tag),
                num_extract_workers=num_workers,
                num_merge_workers=num_workers,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
