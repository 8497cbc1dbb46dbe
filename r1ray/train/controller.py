"""What of a training runs in Ray Train's controller: the workers' process group, and how many workers there are.

The controller waits and needs no torch. `ray.train.torch.TorchConfig` would set up the same group, but its module imports torch
wherever it is unpickled: seconds before the first worker starts, and half a gigabyte until the last one ends.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.util import TrainingFramework

__all__ = ["AskNobody", "ProcessGroupConfig"]

_SHUTDOWN_TIMEOUT_S = 30
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProcessGroupConfig(BackendConfig):
    """`backend` is torch.distributed's: gloo or nccl. A collective that lasts longer than `timeout_s` fails."""

    backend: str
    timeout_s: int = 1800

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
        return {"backend": self.backend, "timeout_s": self.timeout_s}


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


def _join(address: str, port: int, config: ProcessGroupConfig) -> None:
    """What `torchrun` would put into the environment, then the group."""
    import ray.train
    import ray.train.torch
    import torch.distributed

    context = ray.train.get_context()
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


def _leave() -> None:
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
