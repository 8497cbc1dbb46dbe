"""The model that a worker trains: the base with every weight trained, or frozen with something small and trainable on it.

Knows no data, no optimizer and no Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from r1ray.errors import UnsupportedModel
from r1ray.train.attention import set_attention
from r1ray.train.dropout import set_dropout
from r1ray.train.order import WorkOrder

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

__all__ = ["trained_model"]


def trained_model(order: WorkOrder) -> PreTrainedModel:
    """In training mode, where it is trained or, if it is split first, in main memory; an adapter begins alike on all ranks, by the seed.

    Raises:
        UnsupportedModel: `lora.experts` for a model that has none.
    """
    from transformers import set_seed

    from r1ray.model.load import load_model
    from r1ray.registry import Registry

    if order.config.objective == "reward":
        model = _with_head(order)
    else:
        model = load_model(order.base, registry=Registry(order.settings), dtype=order.dtype, device=_place(order))
    set_attention(model, order.attention)
    model.config.use_cache = False
    if order.config.dropout:
        set_dropout(model, order.config.dropout)
    model.train()
    if order.config.method == "full":
        return model
    from peft import get_peft_model

    set_seed(order.config.seed)
    # DeepSpeed keeps the float32 master copy; two dtypes in one model would break ZeRO-3's gathering
    adapted: PreTrainedModel = get_peft_model(model, _settings(order), autocast_adapter_dtype=False)
    if order.config.method == "prefix" and order.config.prompt.init_text is not None:
        _begin_prefix(adapted, order, order.config.prompt.init_text)
    return adapted


def _place(order: WorkOrder) -> str:
    """Where the base is read to. A GPU that holds all of it: what eight workers copy need not fit the node's memory eight times first."""
    config = order.config
    if not config.use_gpu or config.zero_stage == 3 or config.parallelism.tensor * config.parallelism.pipeline > 1:
        return "cpu"
    import torch

    return f"cuda:{torch.cuda.current_device()}"


def _settings(order: WorkOrder) -> PeftConfig:
    from peft import TaskType

    from r1ray.model.adapters import lora, prefix_tuning, prompt_tuning
    from r1ray.model.checkpoint import read_json
    from r1ray.model.family import family_of

    config = order.config
    if config.method == "prompt":
        return prompt_tuning(_num_positions(order), config.prompt.init_text, order.base.path)
    if config.method == "prefix":
        return prefix_tuning(_num_positions(order))
    shape, family = config.lora, family_of(read_json(order.base.path / "config.json"))
    if shape.experts and not family.has_experts:
        raise UnsupportedModel(f"train.lora.experts=true, but {order.base.ref} ({family.name}) has no experts. Set it to false.")
    chosen = lora(
        family,
        rank=shape.rank,
        alpha=shape.alpha,
        dropout=shape.dropout,
        targets=shape.targets,
        experts=shape.experts,
        use_dora=shape.dora,
        use_rslora=shape.rslora,
    )
    if config.objective == "reward":
        chosen.task_type, chosen.modules_to_save = TaskType.SEQ_CLS, ["score"]
    return chosen


def _num_positions(order: WorkOrder) -> int:
    from r1ray.model.load import load_tokenizer
    from r1ray.train.soft_prompt import num_positions

    return num_positions(order.config.prompt, load_tokenizer(order.base))


def _with_head(order: WorkOrder) -> PreTrainedModel:
    """For a reward model: the head is random, alike on all ranks."""
    from transformers import set_seed

    from r1ray.model.load import load_tokenizer
    from r1ray.model.reward import load_with_head

    set_seed(order.config.seed)
    pad_id = load_tokenizer(order.base).pad_token_id or 0
    return load_with_head(order.base.path, dtype=order.dtype, pad_id=pad_id, device=_place(order))


def _begin_prefix(model: Any, order: WorkOrder, text: str) -> None:
    """Keys and values of `text`, over and over, as the base computes them: random ones would take most of the training to mean anything."""
    import torch
    from peft import initialize_kv_prefix_from_past_key_values

    from r1ray.model.load import load_tokenizer

    wanted = _num_positions(order)
    ids = load_tokenizer(order.base)(text)["input_ids"]
    repeated = (ids * -(-wanted // len(ids)))[:wanted]
    with torch.no_grad(), model.disable_adapter():
        base = model.get_base_model()
        computed = base(input_ids=torch.tensor([repeated], device=base.device), use_cache=True).past_key_values
    pairs = [(layer.keys, layer.values) for layer in computed.layers]
    initialize_kv_prefix_from_past_key_values(model, past_key_values=pairs)
