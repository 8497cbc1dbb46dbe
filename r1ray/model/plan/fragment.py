"""A replica on paper as an entry of serve_config.yaml's `models`, each key with its comment.

Takes a Replica, gives text. The keys are r1ray/serve/config.py's, which this package cannot import; a test validates them.
"""

from __future__ import annotations

from r1ray.model.plan.serving import Replica

__all__ = ["fragment"]

INDENT = " " * 8


def fragment(name: str, replica: Replica) -> str:
    """YAML lines, indented as in serve_config.yaml."""
    lines = [
        f"- id: {name} # what clients ask for",
        f"  ref: {name}@production # registry reference; import the model under this name",
        "  engine: # r1ray.engine.config.EngineConfig",
        "    type: torch # the in-house engine",
        "    device: cuda # every stage on a GPU of its own",
        f"    num_slots: {_slots(replica)} # what cache and {replica.wish.tpot_ms:g} ms per token allow at full context",
        f"    max_context: {replica.wish.context} # prompt and answer in tokens",
        f"    prefill_chunk: {replica.wish.prefill_chunk} # prompt tokens per step: a GPU wants more than the CPU's 256",
        f"    dtype: {_dtype(replica)}",
        *_stages(replica),
        "  autoscaling: # number of replicas",
        "    min_replicas: 1 # kept when idle",
        f"    max_replicas: {replica.num_replicas} # what {replica.pool.num} x {replica.pool.name} hold",
        *_placement(replica),
    ]
    return "\n".join(INDENT + line for line in lines) + "\n"


def _slots(replica: Replica) -> int:
    """Within what the engine's config takes."""
    return min(512, max(1, replica.most_streams))


def _stages(replica: Replica) -> list[str]:
    layout = replica.layout
    if layout.num_gpus == 1:
        return ["    stages: 1 # one GPU holds it"]
    return [
        f"    stages: {layout.stages} # layers {', '.join(map(str, layout.layers))}",
        f"    tensor_parallel: {layout.tensor_parallel} # GPUs of one node that share each layer",
        "    stage_cpus: 1 # of each GPU's process",
        "    stage_gpus: 1 # of each GPU's process",
    ]


def _placement(replica: Replica) -> list[str]:
    lines = [
        "  placement: # what one replica reserves, and where",
        "    num_cpus: 1 # its process",
        "    num_gpus: 1 # its own, in the last stage",
    ]
    if replica.layout.num_gpus == 1:
        return lines
    return [
        *lines,
        "    bundles: [] # one per stage, as engine.tensor_parallel, stage_cpus and stage_gpus say",
        "    strategy: PACK # on as few nodes as hold them",
    ]


def _dtype(replica: Replica) -> str:
    if replica.precision == "bfloat16":
        return "bfloat16 # weights and cache"
    return f"bfloat16 # planned with {replica.precision} weights, which this engine has not: it needs twice the memory"
