"""Ray Train runs the workers of one order, for a fine-tuning job and for each trial of a sweep alike.

Takes a WorkOrder, gives the workers' summary. `LeanTrainer` is Ray's TorchTrainer less the helper actors that have nothing to do
here: each of them is a Python process that imports Ray, pandas and pyarrow, about five seconds of a core before the first step.
Knows no registry, no MLflow and no data.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2._internal.execution.scaling_policy import ScalingPolicy
from ray.train.v2.api.exceptions import TrainingFailedError

from r1ray import cluster
from r1ray.environment import worker_environment
from r1ray.errors import OutOfMemory, R1RayError
from r1ray.train import shared
from r1ray.train.backoff import halved
from r1ray.train.config import TrainConfig
from r1ray.train.controller import AskNobody, FollowCluster, NotInVain, ProcessGroupConfig
from r1ray.train.failures import unwrap
from r1ray.train.order import WorkOrder, worker_bundles
from r1ray.train.standing import KEPT
from r1ray.train.worker import work

__all__ = ["LeanTrainer", "fit"]

_RESIZE_INTERVAL_S = 5.0
_log = logging.getLogger(__name__)


def fit(
    order: WorkOrder, *, callbacks: Sequence[Any] = (), outlived: bool = False, say: Callable[[str], object] = _log.warning
) -> dict[str, Any]:
    """Run the workers to the end, with fewer dialogues per pass where the memory wants it; what rank 0 returned.

    Args:
        callbacks: Ray Train's callbacks.
        outlived: The Ray job goes on when this training dies, as a sweep does; else the job's end frees what it held.
        say: Is told of a choice, with its reason.

    Raises:
        HomeNotShared: a worker's node has another directory at the path of the run's.
        OutOfMemory: even one dialogue per pass is too many.
        TrainingError: a worker failed more often than `max_failures`, or any other R1RayError that all workers agreed on.
    """
    while True:
        try:
            return _fit(order, callbacks, outlived)
        except OutOfMemory as error:
            order = halved(order, error)
            batch, rows = order.config.batch_size, order.config.micro_batch_size
            say(f"micro_batch_size {rows} from here on, batches stay {batch}, because: {error}")


def _fit(order: WorkOrder, callbacks: Sequence[Any], outlived: bool) -> dict[str, Any]:
    found = cluster.connect(order.settings)
    try:
        with shared.offered(order.run_directory) as token, _controller_environment(order.config, found):
            outcome: dict[str, Any] = _trainer(order, token, callbacks, outlived).fit().return_value
    except TrainingFailedError as error:
        raise unwrap(error, order.run_directory) from error
    if isinstance(outcome.get("error"), R1RayError):
        raise outcome["error"]
    return outcome


def _trainer(order: WorkOrder, token: str, callbacks: Sequence[Any], outlived: bool) -> LeanTrainer:
    config = order.config
    trainer = LeanTrainer(
        work,
        train_loop_config={"order": order, "token": token},
        torch_config=ProcessGroupConfig(
            backend="nccl" if config.use_gpu else "gloo", timeout_s=config.collective_timeout_s, threads=config.threads_per_worker
        ),
        scaling_config=ScalingConfig(
            num_workers=(config.min_workers, config.max_workers) if config.is_elastic else config.max_workers,
            use_gpu=config.use_gpu,
            resources_per_worker=worker_bundles(config)[0],
            elastic_resize_monitor_interval_s=_RESIZE_INTERVAL_S,
        ),
        run_config=RunConfig(
            name=order.run,
            storage_path=str(order.run_directory.parent),
            callbacks=list(callbacks),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=_kept(config),
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": _environment(order)},
        ),
    )
    trainer.order, trainer.outlived = order, outlived
    return trainer


def _environment(order: WorkOrder) -> dict[str, str]:
    """Of every worker alike; how many threads share a node's cores is known on that node, when its workers join their group."""
    config = order.config
    found = worker_environment(threads=config.threads_per_worker or 1, use_gpu=config.use_gpu, keeps_freed=config.keeps_freed)
    return {**found, "PYTHONWARNINGS": "ignore"}


def _kept(config: TrainConfig) -> CheckpointConfig:
    """Ray Train keeps so many and the newest one; where something is held out, the last ones that were the best."""
    if not config.eval_share:
        return CheckpointConfig(num_to_keep=config.num_checkpoints)
    return CheckpointConfig(num_to_keep=config.num_checkpoints, checkpoint_score_attribute=KEPT, checkpoint_score_order="max")


@contextmanager
def _controller_environment(config: TrainConfig, found: cluster.Cluster) -> Iterator[None]:
    """What Ray Train's controller reads from the driver's environment.

    On a cluster of one node that will stay so, nobody can announce that a worker's node goes and the job stays: no actor need watch.
    A range of workers is not waited for: a start that finds no room counted a node which had just died, and is decided again.
    """
    wanted = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"} if len(found.nodes) == 1 else {}
    if config.is_elastic:
        wanted = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


class LeanTrainer(TorchTrainer):
    """TorchTrainer without what it starts for Ray Data, autoscaling and crashed controllers.

    - DatasetManager hands shards of Ray Datasets to the workers: ours read their rows from the token cache.
    - AutoscalingCoordinator shares a growing cluster between Ray Data and Ray Train. Without it, the pending placement group is
      what the autoscaler sees. On a busy machine its start exceeds Ray's 5 s limit, which prints a traceback into the job's log.
      A range of workers needs it: it asks the autoscaler for the most and knows what came.
    - PlacementGroupCleaner frees the workers' bundles when a controller dies: the end of the job does that too, unless the
      training is `outlived`.

    Ray has no settings for these. Two of its private methods are the seam; tests/train/test_fit.py fails when an upgrade moves it.
    """

    order: WorkOrder | None = None
    outlived = False

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        idle: tuple[type[RayTrainCallback], ...] = (DatasetsCallback, *(() if self.outlived else (PlacementGroupCleanerCallback,)))
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, idle)]

    def _initialize_and_run_controller(self, **parts: Any) -> Result:
        policies = {"scaling_policy": self._scaling_policy(), "failure_policy": NotInVain(self.run_config.failure_config)}
        return super()._initialize_and_run_controller(**{**parts, **policies})

    def _scaling_policy(self) -> ScalingPolicy:
        if self.order is None or not self.order.config.is_elastic:
            return AskNobody(self.scaling_config)
        config = self.order.config
        saves = config.checkpoint_every_steps is not None or config.checkpoint_every_seconds is not None
        return FollowCluster(self.scaling_config, self.order.run_directory, waits_for_checkpoint=saves)
