"""Main memory that a fine-tuning job takes of its busiest node: when it starts, while it trains, when it saves.

Counts what transformers, DeepSpeed and r1ray/train do as they are configured; the memory of a worker's process is an assumption of
gpus.yaml. Arithmetic, not calibrated on GPU nodes. Weight files are mapped, and the kernel takes their pages back: what counts is copies,
of weights that are stored in another number type than they are trained in, and of experts, which transformers fuses in memory.

| when | what |
|---|---|
| start, ZeRO 0-2 | nothing, each worker reads the base to its GPU; trained weights twice where the GPU has no room for two of each |
| start, ZeRO-3 | the experts of a layer, on the node of rank 0, which deals the base out |
| start, tensor or pipeline | the copies of the whole base on every worker; a tensor part |
| training | what is offloaded |
| saving | the largest piece that is copied at once: each worker's float32 masters, and rank 0's trained weights, at ZeRO-3 an adapter's |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from r1ray.model.plan.hardware import GIB, Assumptions, Pool
from r1ray.model.plan.shape import ModelShape

if TYPE_CHECKING:
    from r1ray.model.plan.training import Memory, TrainingWish

__all__ = ["HostMemory", "host_memory"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """Bytes of the busiest node, which has `num_workers`."""

    num_workers: int
    processes: float
    start: float
    training: float
    saving: float

    @property
    def peak(self) -> float:
        return self.processes + max(self.start, self.training + self.saving)


def host_memory(
    shape: ModelShape, wish: TrainingWish, pool: Pool, assumptions: Assumptions, *, trainable: int, memory: Memory
) -> HostMemory:
    """Of GPU nodes; where the workers compute in main memory, `Memory` has it all.

    Args:
        trainable: Weights of the whole model that are trained.
        memory: Of one GPU.
    """
    num, size = min(pool.num, pool.per_node), wish.bytes_per_value
    held = trainable / (wish.tensor * wish.pipeline)
    shares = pool.num // (wish.tensor * wish.pipeline)
    masters = 4 * held / shares if wish.zero_stage and wish.offload == "none" else 0.0
    return HostMemory(
        num_workers=num,
        processes=num * assumptions.worker_host_gib * GIB,
        start=_start(shape, wish, pool, trainable),
        training=num * memory.host,
        saving=num * masters + (held * size if wish.zero_stage < 3 or wish.method != "full" else 0.0),
    )


def _start(shape: ModelShape, wish: TrainingWish, pool: Pool, trainable: int) -> float:
    num, size = min(pool.num, pool.per_node), wish.bytes_per_value
    if wish.tensor * wish.pipeline > 1:
        part = shape.parameters.total * size / wish.tensor if wish.tensor > 1 else 0.0
        return num * (_copied(shape, wish) + part)
    if wish.zero_stage == 3:
        return float(shape.num_experts * shape.expert_parameters * size)
    twice = 2.0 * trainable * size
    return num * twice if wish.zero_stage and twice > pool.gpu.memory_gib * GIB else 0.0


def _copied(shape: ModelShape, wish: TrainingWish) -> float:
    """Bytes of a base in main memory beside its mapped files; published ones in FP8 are bfloat16 by then."""
    stored = "float32" if shape.stored_bytes == 4 else "bfloat16"
    numbers = shape.parameters.experts if stored == wish.dtype else shape.parameters.total
    return float(numbers * wish.bytes_per_value)
