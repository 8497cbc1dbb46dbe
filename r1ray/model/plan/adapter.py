"""How many weights a LoRA adapter trains: the projections of a family and their sizes. Knows no memory and no time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from r1ray.errors import InvalidValue
from r1ray.model.family import DEEPSEEK_TARGETS, LLAMA_TARGETS
from r1ray.model.plan.shape import ModelShape

__all__ = ["Adapter", "adapter_of", "projections"]

MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """`parameters` in all layers; whether the feed-forward blocks have some decides which of their inputs training must keep."""

    rank: int
    parameters: int
    num_targets: int
    adapts_mlp: bool


def projections(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """Linear layers of one decoder layer, name -> (inputs, outputs); experts, which LoRA leaves alone, are not among them."""
    wide = shape.num_heads * shape.key_dim
    output = {"o_proj": (shape.num_heads * shape.value_dim, shape.hidden)}
    if shape.latent is None:
        narrow = {"k_proj": shape.num_kv_heads * shape.key_dim, "v_proj": shape.num_kv_heads * shape.value_dim}
        attention = {"q_proj": (shape.hidden, wide), **{name: (shape.hidden, size) for name, size in narrow.items()}, **output}
        up = (shape.hidden, shape.intermediate)
        return {**attention, "gate_proj": up, "up_proj": up, "down_proj": (shape.intermediate, shape.hidden)}
    latent = shape.latent
    queries = {"q_proj": (shape.hidden, wide)}
    if latent.query_rank is not None:
        queries = {"q_a_proj": (shape.hidden, latent.query_rank), "q_b_proj": (latent.query_rank, wide)}
    expanded = shape.num_heads * (shape.key_dim - latent.rope_dim + shape.value_dim)
    compress = {"kv_a_proj_with_mqa": (shape.hidden, latent.kv_rank + latent.rope_dim), "kv_b_proj": (latent.kv_rank, expanded)}
    return {**queries, **compress, **output}


def adapter_of(shape: ModelShape, *, rank: int, targets: Sequence[str] | None = None) -> Adapter:
    """LoRA on `targets`, the family's own when None: two matrices per target, rank x inputs and outputs x rank.

    Raises:
        InvalidValue: a target that the model has not.
    """
    known = projections(shape)
    queries = tuple(name for name in known if name.startswith("q_"))
    usual = LLAMA_TARGETS if shape.latent is None else (*queries, *DEEPSEEK_TARGETS)
    chosen = tuple(targets or usual)
    if wrong := [name for name in chosen if name not in known]:
        raise InvalidValue(f"{wrong[0]!r} is no projection of this model that LoRA is planned for. Choose from {', '.join(known)}.")
    per_layer = sum(rank * sum(known[name]) for name in chosen)
    return Adapter(
        rank=rank,
        parameters=shape.num_layers * per_layer,
        num_targets=len(chosen),
        adapts_mlp=bool(set(chosen) & set(MLP)),
    )
