"""Ray Train runs the workers of one order, for a fine-tuning job and for each trial of a sweep alike.

Takes a WorkOrder, gives the workers' summary. `LeanTrainer` is Ray's TorchTrainer less the helper actors that have nothing to do
here: each of them is a Python process that imports Ray, pandas and pyarrow, about five seconds of a core before the first step.
Knows no registry, no MLflow and no data.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2.api.exceptions import TrainingFailedError

from r1ray import cluster
from r1ray.errors import R1RayError
from r1ray.train.controller import AskNobody, ProcessGroupConfig
from r1ray.train.failures import unwrap
from r1ray.train.order import WorkOrder, num_threads, worker_bundles
from r1ray.train.worker import work

__all__ = ["LeanTrainer", "fit"]


def fit(order: WorkOrder, *, callbacks: Sequence[Any] = (), outlived: bool = False) -> dict[str, Any]:
    """Run the workers to the end; what rank 0 returned.

    Args:
        callbacks: Ray Train user callbacks.
        outlived: The Ray job goes on when this training dies, as a sweep does; else the job's end frees what it held.

    Raises:
        TrainingError: a worker failed more often than `max_failures`, or any other R1RayError that all workers agreed on.
    """
    config = order.config
    _expect_no_drain(cluster.connect(order.settings))
    trainer = LeanTrainer(
        work,
        train_loop_config={"order": order},
        torch_config=ProcessGroupConfig(backend="nccl" if config.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers, use_gpu=config.use_gpu, resources_per_worker=worker_bundles(config)[0]
        ),
        run_config=RunConfig(
            name=order.run,
            storage_path=str(order.run_directory.parent),
            callbacks=list(callbacks),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.num_checkpoints),
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": _environment(order)},
        ),
    )
    trainer.outlived = outlived
    try:
        outcome: dict[str, Any] = trainer.fit().return_value
    except TrainingFailedError as error:
        raise unwrap(error, order.run_directory) from error
    if isinstance(outcome.get("error"), R1RayError):
        raise outcome["error"]
    return outcome


def _environment(order: WorkOrder) -> dict[str, str]:
    threads, use_gpu = num_threads(order.config), order.config.use_gpu
    return {**cluster.worker_environment(threads=threads, use_gpu=use_gpu), "PYTHONWARNINGS": "ignore"}


def _expect_no_drain(found: cluster.Cluster) -> None:
    """On a cluster of one node, nobody can announce that a worker's node goes and the job stays: no actor need watch for it."""
    if len(found.nodes) == 1:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


class LeanTrainer(TorchTrainer):
    """TorchTrainer without what it starts for Ray Data, autoscaling and crashed controllers.

    - DatasetManager hands shards of Ray Datasets to the workers: ours read their rows from the token cache.
    - AutoscalingCoordinator shares a growing cluster between Ray Data and Ray Train. Without it, the pending placement group is
      what the autoscaler sees. On a busy machine its start exceeds Ray's 5 s limit, which prints a traceback into the job's log.
    - PlacementGroupCleaner frees the workers' bundles when a controller dies: the end of the job does that too, unless the
      training is `outlived`.

    Ray has no settings for these. Two of its private methods are the seam; tests/train/test_fit.py fails when an upgrade moves it.
    """

    outlived = False

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        idle: tuple[type[RayTrainCallback], ...] = (DatasetsCallback, *(() if self.outlived else (PlacementGroupCleanerCallback,)))
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, idle)]

    def _initialize_and_run_controller(self, **parts: Any) -> Result:
        return super()._initialize_and_run_controller(**{**parts, "scaling_policy": AskNobody(self.scaling_config)})
