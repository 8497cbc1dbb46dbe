"""Starts the actor that holds vLLM, in vLLM's environment and on the replica's GPUs, and waits until the model is loaded.

Inside a placement group (a Serve replica's) the actor takes bundle 1, and this process has bundle 0; without one it reserves for itself.
"""

from __future__ import annotations

import logging
import os
import shlex
from typing import Any

from r1ray import cluster
from r1ray.engine.config import EngineConfig
from r1ray.engine.vllm import worker as source
from r1ray.engine.vllm.arguments import Order
from r1ray.engine.vllm.environment import Environment
from r1ray.errors import ClusterTooSmall, EngineStopped

__all__ = ["launch"]

log = logging.getLogger(__name__)

PLACE_TIMEOUT_S = 120.0  # of an actor in a bundle that is reserved already
LOAD_TIMEOUT_S = 1800.0
VARIABLES = ("VLLM_", "HF_", "TRANSFORMERS_", "NCCL_", "GLOO_")


def launch(order: Order, config: EngineConfig, environment: Environment) -> tuple[Any, dict[str, Any]]:
    """(the actor, what it says of the loaded model: vocab_size, context, dtype, num_blocks, chunked_prefill, pid).

    Raises:
        ClusterTooSmall: no place for it within two minutes.
        EngineStopped: vLLM could not load the model.
    """
    import ray
    from ray import cloudpickle
    from ray.exceptions import GetTimeoutError, RayError

    if not ray.is_initialized():
        cluster.connect()
    cloudpickle.register_pickle_by_value(source)
    options = _options(config, environment)
    actor = ray.remote(source.VllmWorker).options(**options).remote()
    try:
        ray.get(actor.__ray_ready__.remote(), timeout=PLACE_TIMEOUT_S if "scheduling_strategy" in options else LOAD_TIMEOUT_S)
        own = None if order.adapter is None else str(order.adapter)
        found = ray.get(actor.start.remote(str(order.model), order.arguments, own, order.num_threads), timeout=LOAD_TIMEOUT_S)
    except GetTimeoutError as error:
        ray.kill(actor)
        raise ClusterTooSmall(
            f"vLLM did not start on {options['num_cpus']:g} CPUs and {options['num_gpus']:g} GPUs in time. If another version still holds "
            f"the replica's, give R1RAY_REV another value; if its node has no {environment.python.parents[1]}, prepare it there."
        ) from error
    except RayError as error:
        ray.kill(actor)
        cause = getattr(error, "cause", None) or error
        raise EngineStopped(f"vLLM could not load {order.model}: {cause}. The actor's log in Ray's session directory has more.") from error
    log.info("vLLM %s on %s: %s, %d cache blocks", environment.version, environment.device, found["dtype"], found["num_blocks"])
    return actor, found


def _options(config: EngineConfig, environment: Environment) -> dict[str, Any]:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    carried = {name: value for name, value in os.environ.items() if name.startswith(VARIABLES)}
    defaults = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    total = {name: sum(bundle[name] for bundle in config.actor_bundles) for name in ("CPU", "GPU")}
    options: dict[str, Any] = {
        "runtime_env": {"py_executable": shlex.quote(str(environment.python)), "env_vars": defaults | carried},
        "num_cpus": total["CPU"],
        "num_gpus": 0 if config.vllm.executor == "ray" else total["GPU"],  # vLLM's own Ray workers take them
    }
    group = ray.util.get_current_placement_group()
    if group is not None and group.bundle_count > 1:
        # the bundle has the CPUs already: a new version may load beside the old one
        options["num_cpus"] = 0
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
            placement_group=group, placement_group_bundle_index=1, placement_group_capture_child_tasks=True
        )
    return options
