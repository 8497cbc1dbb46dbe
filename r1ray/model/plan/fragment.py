"""A replica on paper as an entry of serve_config.yaml's `models`, each key with its comment.

Takes a Replica, gives text. The keys are r1ray/serve/config.py's, which this package cannot import; the command line checks them.
"""

from __future__ import annotations

from typing import Literal

from r1ray.model.plan.serving import Replica

__all__ = ["EngineType", "engine_type", "fragment"]

EngineType = Literal["auto", "torch", "pipeline", "vllm"]
INDENT = " " * 8


def engine_type(replica: Replica, wanted: EngineType = "auto") -> str:
    """`auto`: torch on one GPU, pipeline on several."""
    if wanted != "auto":
        return wanted
    return "torch" if replica.layout.num_gpus == 1 else "pipeline"


def fragment(name: str, replica: Replica, wanted: EngineType = "auto") -> str:
    """YAML lines, indented as in serve_config.yaml."""
    kind, layout = engine_type(replica, wanted), replica.layout
    lines = [
        f"- id: {name} # what clients ask for",
        f"  ref: {name}@production # registry reference; import the model under this name",
        "  engine: # r1ray.engine.config.EngineConfig",
        f"    type: {kind} # {_why(kind, replica)}",
        f"    num_slots: {max(1, replica.most_streams)} # what cache and {replica.wish.tpot_ms:g} ms per token allow at full context",
        f"    max_context: {replica.wish.context} # prompt and answer in tokens",
        f"    prefill_chunk: {replica.wish.prefill_chunk} # prompt tokens per step: a GPU wants more than the CPU's 256",
        f"    dtype: {_dtype(replica)}",
    ]
    if kind != "torch":
        lines += [
            f"    tensor_parallel_size: {layout.tensor_parallel} # GPUs that share every layer; they lie in one node",
            f"    pipeline_parallel_size: {layout.stages} # stages of {', '.join(map(str, layout.layers))} layers",
        ]
    lines += [
        "  autoscaling: # number of replicas",
        "    min_replicas: 1 # kept when idle",
        f"    max_replicas: {replica.num_replicas} # what {replica.pool.num} x {replica.pool.name} hold",
        *_placement(replica, kind),
    ]
    return "\n".join(INDENT + line for line in lines) + "\n"


def _placement(replica: Replica, kind: str) -> list[str]:
    if replica.layout.num_gpus == 1:
        return ["  placement: # what one replica reserves", "    num_cpus: 1 # its process", "    num_gpus: 1 # holds the whole model"]
    bundles = ", ".join(f"{{CPU: {b['CPU']:g}, GPU: {b['GPU']:g}}}" for b in replica.bundles(single=kind == "vllm"))
    spread = "one stage per node" if replica.strategy == "STRICT_SPREAD" else "on as few nodes as hold it"
    return [
        "  placement: # what one replica reserves, and where",
        "    num_cpus: 1 # the replica's own process, in bundle 0",
        "    num_gpus: 0 # its workers take the bundles' GPUs",
        f"    bundles: [{bundles}] # one per {'GPU' if kind == 'vllm' else 'stage'}",
        f"    strategy: {'PACK' if kind == 'vllm' else replica.strategy} # {spread}",
    ]


def _why(kind: str, replica: Replica) -> str:
    reasons = {"torch": "one GPU holds it", "pipeline": f"{replica.layout.num_gpus} GPUs hold it", "vllm": "in an environment of its own"}
    return reasons.get(kind, "as asked")


def _dtype(replica: Replica) -> str:
    if replica.precision == "bfloat16":
        return "bfloat16 # weights and cache"
    return f"auto # planned with {replica.precision} weights, as the engine must then hold them"
