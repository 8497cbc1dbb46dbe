"""One GPU's part of a model that is split for training, as a smaller model: heads and widths by `tensor`, layers by `pipeline`.

What r1ray/train/parallel splits, and nothing else: embedding, head, norms, router and latents stay whole under `tensor`, so activations and
parameters follow from the smaller shape by the formulas of the whole one (activations: Korthikanti et al., arXiv 2205.05198,
section 4.1, without sequence-parallel norms). Ulysses (`sequence`) splits no weights: there a GPU has fewer positions.
"""

from __future__ import annotations

from dataclasses import replace

from r1ray.model.plan.shape import ModelShape

__all__ = ["part_of", "wires"]


def part_of(shape: ModelShape, *, tensor: int, pipeline: int) -> ModelShape:
    """The busiest GPU's part; of a mixture in stages, one without dense layers."""
    num_layers = -(-shape.num_layers // pipeline)
    return replace(
        shape,
        num_layers=num_layers,
        num_dense_layers=shape.num_dense_layers if pipeline == 1 else 0,
        num_heads=-(-shape.num_heads // tensor),
        num_kv_heads=-(-shape.num_kv_heads // tensor),
        intermediate=-(-shape.intermediate // tensor),
        expert_intermediate=-(-shape.expert_intermediate // tensor),
    )


def wires(shape: ModelShape, token_bytes: float, *, tensor: int, sequence: int) -> float:
    """Bytes that each GPU of a group sends for the split itself; `token_bytes`: the step's tokens times the bytes of a number.

    Tensor: two sums per layer forward and two backward, each of the hidden states (Megatron-LM, arXiv 1909.08053). Sequence: queries, keys,
    values and outputs change places forward and back (DeepSpeed-Ulysses, arXiv 2309.14509).
    """
    sums = 4 * 2 * (tensor - 1) / tensor * shape.hidden
    per_head = shape.key_dim + shape.value_dim
    exchanged = 2 * (sequence - 1) / sequence**2 * per_head * (shape.num_heads + shape.num_kv_heads)
    return shape.num_layers * token_bytes * (sums + exchanged)
