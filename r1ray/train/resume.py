"""Where an attempt starts: the last good checkpoint, checked by all ranks together, in a form that this number of them can load.

Rank 0 looks, each rank reads its part, all follow one verdict: two ranks that judged for themselves could start from different steps.
Knows no trainer and no Ray.
"""

from __future__ import annotations

import logging
from pathlib import Path

from r1ray.errors import CheckpointCorrupt, TrainingError
from r1ray.train import checkpoint, universal
from r1ray.train.order import WorkOrder
from r1ray.train.parallel.layout import Layout
from r1ray.train.peers import Peers

__all__ = ["agreed_start"]

_log = logging.getLogger(__name__)


def agreed_start(order: WorkOrder, layout: Layout, peers: Peers) -> tuple[Path, checkpoint.Meta] | None:
    """The same on every rank; None for a run without a checkpoint. What was left half-saved is removed first.

    Raises:
        CheckpointCorrupt: on every rank; no checkpoint can be read, or these workers cannot go on from the one that can.
        DiskFull: on every rank; no room to convert it.
    """

    def check(directory: Path) -> checkpoint.Meta:
        return _checked(directory, peers)

    def warn(text: str) -> None:
        if peers.rank == 0:
            _log.warning("%s", text)

    try:
        finished = peers.told(checkpoint.sweep(order.run_directory) if peers.rank == 0 else [])
        found = checkpoint.last_good(order.run_directory, among=finished, check=check, warn=warn)
        if found is None:
            return None
        warn(f"resuming {order.run} from step {found[1].step}")
        return _loadable(*found, order, layout, peers), found[1]
    except TrainingError as error:
        error.agreed = True  # type: ignore[attr-defined]
        raise


def _checked(directory: Path, peers: Peers) -> checkpoint.Meta:
    """As `checkpoint.read`, by all ranks together, with the same outcome on each."""
    answers = peers.gathered(_answer(directory, peers))
    for answer in answers:
        if isinstance(answer, CheckpointCorrupt):
            raise answer
    assert isinstance(answers[0], checkpoint.Meta)
    return answers[0]


def _answer(directory: Path, peers: Peers) -> checkpoint.Meta | CheckpointCorrupt:
    try:
        return checkpoint.read(directory, part=peers.rank, of=peers.world)
    except CheckpointCorrupt as error:
        return error


def _loadable(directory: Path, meta: checkpoint.Meta, order: WorkOrder, layout: Layout, peers: Peers) -> Path:
    """The directory itself where as many workers wrote it, else what it was converted to."""
    if meta.zero_stage != order.config.zero_stage:  # each stage lays its states out in its own way
        raise CheckpointCorrupt(
            f"{directory} was written at ZeRO stage {meta.zero_stage}; this job has stage {order.config.zero_stage}. Set "
            f"train.zero_stage={meta.zero_stage} to resume, or train.restart=true to start over."
        )
    if meta.world_size == peers.world:
        return directory
    if layout.split > 1:
        raise CheckpointCorrupt(
            f"{directory} was written by {meta.world_size} workers, and this job has {peers.world}; where workers share a model "
            f"(train.parallelism) their number cannot change. Set train.num_workers={meta.world_size}, or train.restart=true."
        )
    if meta.zero_stage == 0:  # splits nothing over the workers
        return directory
    converted = peers.told(_converted(directory, meta, peers) if peers.rank == 0 else directory)
    if isinstance(converted, TrainingError):
        raise converted
    return converted


def _converted(directory: Path, meta: checkpoint.Meta, peers: Peers) -> Path | TrainingError:
    _log.warning("%s was written by %d workers: converting it for %d", directory.name, meta.world_size, peers.world)
    try:
        return universal.converted(directory)
    except TrainingError as error:
        return error
