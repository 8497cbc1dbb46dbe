"""The model that a worker trains: the base with every weight trained, or frozen with something small and trainable on it.

Knows no data, no optimizer and no Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from r1ray.train.order import WorkOrder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["trained_model"]


def trained_model(order: WorkOrder) -> PreTrainedModel:
    """In training mode on the CPU (transformers moves it); an adapter is initialised alike on all ranks, by the seed."""
    from transformers import set_seed

    from r1ray.model.adapters import lora
    from r1ray.model.checkpoint import read_json
    from r1ray.model.family import family_of
    from r1ray.model.load import load_model
    from r1ray.registry import Registry

    config = order.config
    model = load_model(order.base, registry=Registry(order.settings), dtype=order.dtype, device="cpu")  # type: ignore[arg-type]
    model.set_attn_implementation(order.attention)
    model.config.use_cache = False
    model.train()
    if config.method == "full":
        return model
    from peft import get_peft_model

    set_seed(config.seed)
    shape = config.lora
    family = family_of(read_json(order.base.path / "config.json"))
    settings = lora(family, rank=shape.rank, alpha=shape.alpha, dropout=shape.dropout, targets=shape.targets, use_dora=shape.dora)
    # DeepSpeed keeps the float32 master copy; two dtypes in one model would break ZeRO-3's gathering
    return get_peft_model(model, settings, autocast_adapter_dtype=False)
