"""Some layers of a transformers causal LM: built without weights, then filled with the tensors of its own layers only.

The result takes ids or hidden states (`inputs_embeds`) and gives hidden states, or logits when it holds the last layer.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1ray.errors import UnsupportedModel

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["load_layers"]


def load_layers(directory: Path, config: PretrainedConfig, dtype: torch.dtype, layers: tuple[int, int]) -> PreTrainedModel:
    """Layers [first, last) of the checkpoint in `directory`, in evaluation mode, on the CPU.

    Raises:
        UnsupportedModel: the architecture does not keep its layers in `model.layers`, or a tensor is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    body: Any = getattr(model, "model", None)
    if not hasattr(body, "layers") or not hasattr(body, "norm") or not hasattr(body, "embed_tokens"):
        raise UnsupportedModel(f"{type(model).__name__} has no model.layers to split. Serve it with engine.stages=1.")
    first, last = layers
    total = len(body.layers)
    body.layers = torch.nn.ModuleList(list(body.layers[first:last]))
    model.config.num_hidden_layers = last - first
    if last < total:
        body.norm, model.lm_head = torch.nn.Identity(), torch.nn.Identity()
    if first > 0:
        body.embed_tokens = torch.nn.Identity()
    _fill(model, directory, first, tied=config.tie_word_embeddings)
    body.rotary_emb = type(body.rotary_emb)(config)  # computed, not stored
    return model.eval()


def _fill(model: Any, directory: Path, first: int, *, tied: bool) -> None:
    from r1ray.model.checkpoint import checkpoint_tensors

    tensors = checkpoint_tensors(directory)
    state = {}
    for name, wanted in model.state_dict().items():
        stored = _stored_name(name, first)
        if stored == "lm_head.weight" and tied:
            stored = "model.embed_tokens.weight"
        if (tensor := tensors(stored)) is None and (tensor := _stacked(tensors, stored)) is None:
            raise UnsupportedModel(f"{directory} has no tensor {stored}. Import the model again.")
        state[name] = tensor.to(wanted.dtype)
    model.load_state_dict(state, assign=True)


def _stored_name(name: str, first: int) -> str:
    parts = name.split(".")
    if parts[:2] == ["model", "layers"]:
        parts[2] = str(int(parts[2]) + first)
    return ".".join(parts)


def _stacked(tensors: Any, name: str) -> torch.Tensor | None:
    """transformers 5 holds all experts of a layer in one tensor; checkpoints store them one by one."""
    import torch

    prefix, _, last = name.rpartition(".experts.")
    parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(last)
    if not prefix or parts is None:
        return None
    experts: list[torch.Tensor] = []
    while True:
        found = [tensors(f"{prefix}.experts.{len(experts)}.{part}.weight") for part in parts]
        if found[0] is None:
            return torch.stack(experts) if experts else None
        experts.append(torch.cat(found))
