"""What is trained beside a frozen base, and how many numbers that is: LoRA's matrices, a soft prompt. Knows no memory and no time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from r1ray.errors import InvalidValue
from r1ray.model.family import DEEPSEEK_TARGETS, LLAMA_TARGETS
from r1ray.model.plan.shape import ModelShape

__all__ = ["Adapter", "adapter_of", "projections", "soft_prompt_of"]

MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """`parameters` in all layers; which layers have some decides which inputs training must keep."""

    parameters: int
    rank: int = 0
    num_targets: int = 0
    adapts_mlp: bool = False
    num_embedded: int = 0
    """Virtual tokens before every prompt, which all layers compute."""
    num_cached: int = 0
    """Positions whose keys and values stand before every prompt in each layer."""


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


def soft_prompt_of(shape: ModelShape, method: str, num_virtual_tokens: int) -> Adapter:
    """A soft prompt (`prompt`: embeddings; `prefix`: keys and values in each layer).

    Raises:
        InvalidValue: a prefix for a model that caches a latent.
    """
    if method == "prompt":
        return Adapter(parameters=num_virtual_tokens * shape.hidden, num_embedded=num_virtual_tokens)
    if shape.latent is not None:
        raise InvalidValue("A prefix stands in a cache of keys and values, and this model caches a latent. Plan method prompt or lora.")
    numbers = shape.num_kv_heads * (shape.key_dim + shape.value_dim)
    return Adapter(parameters=num_virtual_tokens * shape.num_layers * numbers, num_cached=num_virtual_tokens)
