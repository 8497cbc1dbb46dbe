"""What a worker tells while it trains, and to whom: figures, a checkpoint; and what it is told, that its node will go.

The seam between the training loop and Ray Train: a loop with another reporter runs in plain torch.distributed processes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

__all__ = ["RayReporter", "Reporter"]


class Reporter(Protocol):
    """All ranks call the same methods in the same order."""

    def report(self, metrics: dict[str, float]) -> None:
        """Figures of the step that is done."""

    def save(self, metrics: dict[str, float], source: Path, destination: Path, publish: Callable[[Path], None]) -> None:
        """`publish(source)` moves this rank's files to `destination`; returns when every rank's are there."""

    def is_leaving(self) -> bool:
        """Whether the end of a node was announced to this rank; ranks may learn of it at different steps."""


class RayReporter:
    """To Ray Train: its dashboard, its list of checkpoints, from which the oldest are deleted."""

    def report(self, metrics: dict[str, float]) -> None:
        import ray.train

        ray.train.report(metrics)

    def save(self, metrics: dict[str, float], source: Path, destination: Path, publish: Callable[[Path], None]) -> None:
        import ray.train

        def move(local: ray.train.Checkpoint, _name: str) -> ray.train.Checkpoint:
            publish(Path(local.path))
            return ray.train.Checkpoint(str(destination), filesystem=local.filesystem)

        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(str(source)),
            checkpoint_dir_name=destination.name,
            checkpoint_upload_fn=move,
            delete_local_checkpoint_after_upload=True,
        )

    def is_leaving(self) -> bool:
        # `ray.train.get_preemption_info` asks all ranks through an actor; ours agree in the exchange that they make anyway
        from ray.train.v2._internal.execution.context import get_train_context

        return get_train_context().preemption_context.preemption_info is not None
