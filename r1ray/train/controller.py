"""What of a training runs in Ray Train's controller: the workers' process group, and how many workers there are.

The controller waits and needs no torch. `ray.train.torch.TorchConfig` would set up the same group, but its module imports torch
wherever it is unpickled: seconds before the first worker starts, and half a gigabyte until the last one ends.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    FixedScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2._internal.util import TrainingFramework
from ray.train.v2.api.config import ScalingConfig

from r1ray.environment import worker_environment
from r1ray.train import checkpoint
from r1ray.train.failures import ran_out_of_memory, worker_causes, would_repeat

__all__ = ["AskNobody", "FollowCluster", "NotInVain", "ProcessGroupConfig", "num_threads"]

_SHUTDOWN_TIMEOUT_S = 30
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProcessGroupConfig(BackendConfig):
    """`backend` is torch.distributed's: gloo or nccl. A collective that lasts longer than `timeout_s` fails.

    `threads` are those of each worker; None: the workers of a node share its cores.
    """

    backend: str
    timeout_s: int = 1800
    threads: int | None = None

    @property
    def backend_cls(self) -> type[Backend]:
        return ProcessGroup

    @property
    def train_func_context(self) -> Any:
        """Makes a GPU worker's own device the default one. Asked for in the driver, entered in the workers."""
        from ray.train.torch.config import TorchConfigContextManager

        return TorchConfigContextManager

    @property
    def framework(self) -> TrainingFramework:
        return TrainingFramework.TORCH

    def to_dict(self) -> dict[str, Any]:
        return {"backend": self.backend, "timeout_s": self.timeout_s, "threads": self.threads}


class ProcessGroup(Backend):
    """Runs in the controller, acts in the workers."""

    share_cuda_visible_devices = True  # NCCL reaches a neighbour's GPU only where it can see it

    def on_start(self, worker_group: BaseWorkerGroup, backend_config: ProcessGroupConfig) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        ray.get([worker_group.execute_single_async(i, _join, address, port, backend_config) for i in range(len(worker_group))])

    def on_shutdown(self, worker_group: BaseWorkerGroup, backend_config: ProcessGroupConfig) -> None:  # noqa: ARG002
        try:
            ray.get(worker_group.execute_async(_leave), timeout=_SHUTDOWN_TIMEOUT_S)
        except GetTimeoutError:
            _log.warning("a worker did not leave its process group within %d s", _SHUTDOWN_TIMEOUT_S)


class AskNobody(FixedScalingPolicy):
    """A fixed number of workers, requested by their placement group alone."""

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """Ray's own would start the AutoscalingCoordinator."""

    def _maybe_send_resource_request(self) -> None:
        """There is no coordinator to repeat it to."""


class NotInVain(DefaultFailurePolicy):
    """Ray's own, except that workers are not started again as they were without enough memory, or into a user's mistake."""

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        causes = worker_causes(training_failed_error).values()
        if any(ran_out_of_memory(cause) or would_repeat(cause) for cause in causes):
            return FailureDecision.RAISE
        return super().make_decision(training_failed_error)


class FollowCluster(ElasticScalingPolicy):
    """As many workers as the cluster has room for, between `min_workers` and `max_workers`.

    Ray's own policy, with two differences. Nodes are counted when asked for, where Ray's reservation is up to 20 s old and the start
    would wait for a node that has died. And workers are added right after a checkpoint, since the old ones are ended for it: nothing
    is trained twice.
    """

    def __init__(self, scaling_config: ScalingConfig, run_directory: Path, *, waits_for_checkpoint: bool) -> None:
        super().__init__(scaling_config)
        self._run_directory, self._waits = run_directory, waits_for_checkpoint
        self._wanted_since: float | None = None
        self._latest_reserved_resources_query_time: float = float("-inf")
        self._latest_reserved_resources: Any = None

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> ScalingDecision:
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if not isinstance(decision, ResizeDecision):
            return decision
        self._wanted_since = self._wanted_since or time.time()
        if self._waits and not _saved_since(self._run_directory, self._wanted_since, worker_group_state.num_workers):
            self._latest_monitor_time = float("-inf")  # look again at the next poll
            return NoopDecision()
        _log.warning("going from %d to %d workers: the cluster has changed", worker_group_state.num_workers, decision.num_workers)
        return decision

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._wanted_since = None
        return super().make_decision_for_non_running_worker_group()

    def _get_reserved_resources(self) -> Any:
        """As of now, and only of nodes that are there to stay."""
        now = time.monotonic()
        if now - self._latest_reserved_resources_query_time < self.GET_RESERVED_RESOURCES_INTERVAL_S:
            return self._latest_reserved_resources
        self._latest_reserved_resources_query_time, self._latest_reserved_resources = now, None
        coordinator = self._autoscaling_coordinator
        try:
            reserved = ray.get(
                coordinator.get_reserved_resources.remote(self._requester_id, recompute=True), timeout=_COORDINATOR_TIMEOUT_S
            )
        except GetTimeoutError:
            _log.warning("the AutoscalingCoordinator did not answer within %d s: the number of workers stays", _COORDINATOR_TIMEOUT_S)
            return None
        leaving = ray._private.state.state.get_draining_nodes()
        staying = {node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving}
        self._latest_reserved_resources = {node: resources for node, resources in reserved.items() if node in staying}
        return self._latest_reserved_resources


_COORDINATOR_TIMEOUT_S = 30  # it is an actor that starts as slowly as the machine is busy
_SETTLED_S = 1.0  # Ray Train learns of a checkpoint after its files are in place


def _saved_since(run_directory: Path, since: float, num_workers: int) -> bool:
    """Whether a checkpoint was begun after `since` and finished by all workers."""
    for directory in checkpoint.found(run_directory):
        times = [path.stat().st_mtime for path in directory.glob("meta-rank*.json")]
        if len(times) == num_workers and since <= min(times) and max(times) <= time.time() - _SETTLED_S:
            return True
    return False


def _join(address: str, port: int, config: ProcessGroupConfig) -> None:
    """What `torchrun` would put into the environment, then the group."""
    import ray.train

    context = ray.train.get_context()
    _share_cores(config, context.get_local_world_size(), is_first=context.get_world_rank() == 0)
    import ray.train.torch  # after the number of threads: torch and what it stands on read it when they are loaded
    import torch.distributed

    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(context.get_world_rank()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
        "ACCELERATE_TORCH_DEVICE": str(ray.train.torch.get_device()),
    }
    torch.distributed.init_process_group(config.backend, init_method="env://", timeout=timedelta(seconds=config.timeout_s))


def num_threads(wanted: int | None, num_workers: int) -> int:
    """Of each of `num_workers` on this node, so that all of them together use every core once."""
    return wanted or max(1, len(os.sched_getaffinity(0)) // num_workers)


def _share_cores(config: ProcessGroupConfig, num_workers: int, *, is_first: bool) -> None:
    threads = num_threads(config.threads, num_workers)
    os.environ.update(worker_environment(threads=threads, use_gpu=config.backend == "nccl"))
    if is_first and config.threads is None:
        _log.warning("%d threads per worker: its node's cores shared by %d workers", threads, num_workers)


def _leave() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
