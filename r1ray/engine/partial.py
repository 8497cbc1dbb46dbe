"""Some layers of a transformers causal LM, whole or a tensor rank's part of each: built without weights, then filled with its own only.

The result takes ids or hidden states (`inputs_embeds`) and gives hidden states, or logits when it holds the last layer.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1ray.engine.tensor import WHOLE, Cut, Share, split
from r1ray.errors import UnsupportedModel
from r1ray.model.checkpoint import Tensors, checkpoint_tensors
from r1ray.model.fp8 import SCALE, Fp8, dequantized, fp8_of

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["load_layers"]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_layers(
    directory: Path, config: PretrainedConfig, dtype: torch.dtype, layers: tuple[int, int], share: Share = WHOLE
) -> PreTrainedModel:
    """Layers [first, last) of the checkpoint in `directory`, `share`'s part of each, in evaluation mode, on the CPU.

    Raises:
        UnsupportedModel: the architecture does not keep its layers in `model.layers`, or a tensor is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    body: Any = getattr(model, "model", None)
    if not hasattr(body, "layers") or not hasattr(body, "norm") or not hasattr(body, "embed_tokens"):
        raise UnsupportedModel(
            f"{type(model).__name__} has no model.layers to split. Serve it with engine.stages=1 and engine.tensor_parallel=1."
        )
    first, last = layers
    total = len(body.layers)
    body.layers = torch.nn.ModuleList(list(body.layers[first:last]))
    model.config.num_hidden_layers = last - first
    if last < total:
        body.norm, model.lm_head = torch.nn.Identity(), torch.nn.Identity()
    if first > 0:
        body.embed_tokens = torch.nn.Identity()
    _fill(model, _Source(directory, first, config), share)
    body.rotary_emb = type(body.rotary_emb)(config)  # computed, not stored
    return model.eval()


def _fill(model: Any, source: _Source, share: Share) -> None:
    import torch

    kept = tuple(model._keep_in_fp32_modules_strict or ())  # the router's correction bias, also in bfloat16
    cuts = split(model, share)
    state: dict[str, Any] = {}
    for name, wanted in model.state_dict().items():
        if name == HEAD and source.is_tied and EMBEDDING in state:
            state[name] = state[EMBEDDING]
        else:
            dtype = torch.float32 if any(part in name for part in kept) else wanted.dtype
            state[name] = source.tensor(name, cuts.get(name), share).to(dtype).contiguous()
    model.load_state_dict(state, assign=True)
    if source.is_tied and {EMBEDDING, HEAD} <= state.keys():
        model.lm_head.weight = model.model.embed_tokens.weight  # one tensor, on a GPU too


class _Source:
    """The files' tensors by their names in a model whose layers begin with number `first`. Of a cut one only the part is read: what is
    mapped from a file is read where it is touched. FP8 is cut first too, where a part ends with its blocks, then made bfloat16."""

    def __init__(self, directory: Path, first: int, config: PretrainedConfig) -> None:
        self.is_tied = bool(config.tie_word_embeddings)
        self._directory = directory
        self._first = first
        self._tensors: Tensors = checkpoint_tensors(directory, as_stored=True)
        self._fp8 = fp8_of(config.to_dict(), directory) or Fp8()

    def tensor(self, name: str, cut: Cut | None, share: Share) -> torch.Tensor:
        stored = self._stored_name(name)
        if (part := self._part(stored, cut, share)) is not None:
            return part
        if (found := self._stacked(stored, cut, share)) is None:
            raise UnsupportedModel(f"{self._directory} has no tensor {stored}. Import the model again.")
        return found

    def _part(self, name: str, cut: Cut | None, share: Share) -> torch.Tensor | None:
        found, factors = self._tensors(name), self._tensors(name + SCALE)
        if found is None or factors is None or cut is None:
            return None if found is None else _cut(self._plain({name: found, name + SCALE: factors}, name), cut, share)
        if _ends_at_blocks(found, factors, cut, share, self._fp8):
            return self._plain({name: cut(found, share), name + SCALE: cut(factors, share)}, name)
        return cut(self._plain({name: found, name + SCALE: factors}, name), share).clone()  # a part must not keep the whole

    def _plain(self, tensors: dict[str, torch.Tensor | None], name: str) -> torch.Tensor:
        plain = dequantized(tensors.get, self._fp8)(name)
        assert plain is not None, "it is one of them"
        return plain

    def _stored_name(self, name: str) -> str:
        if name == HEAD and self.is_tied:
            return EMBEDDING
        parts = name.split(".")
        if parts[:2] == ["model", "layers"]:
            parts[2] = str(int(parts[2]) + self._first)
        return ".".join(parts)

    def _stacked(self, name: str, cut: Cut | None, share: Share) -> torch.Tensor | None:
        """transformers 5 holds all experts of a layer in one tensor; checkpoints store them one by one, gate apart from up."""
        import torch

        prefix, _, last = name.rpartition(".experts.")
        parts = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}.get(last)
        if not prefix or parts is None:
            return None
        one = cut and replace(cut, packed=False)
        experts: list[torch.Tensor] = []
        while True:
            found = [self._part(f"{prefix}.experts.{len(experts)}.{part}.weight", one, share) for part in parts]
            if any(tensor is None for tensor in found):
                return torch.stack(experts) if experts else None
            experts.append(torch.cat([tensor for tensor in found if tensor is not None]))


def _cut(tensor: torch.Tensor, cut: Cut | None, share: Share) -> torch.Tensor:
    return tensor if cut is None else cut(tensor, share)


def _ends_at_blocks(weight: torch.Tensor, factors: torch.Tensor, cut: Cut, share: Share, fp8: Fp8) -> bool:
    """Whether the parts of the factors are the factors of the parts."""
    width = weight.shape[cut.dim] // (2 if cut.packed else 1)
    return factors.dim() == 2 and factors.numel() > 1 and not cut.once and width % (share.size * fp8.block[cut.dim]) == 0
