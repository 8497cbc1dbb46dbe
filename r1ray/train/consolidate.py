"""Weights in memory or in a ZeRO-3 checkpoint's shards -> safetensors, a few layers in memory at a time.

Training at stage 3 saves shards only: gathering 671 billion weights on one rank for each checkpoint is what ends runs with a full host
memory (LLaMA-Factory issue 6843). The weights are put together once, from the float32 masters, when somebody wants them. Below stage 3 the
rank that writes has them all and copies them from its GPU layer by layer; where tensors are split it asks for one after the other, and the
workers that hold their parts take part. Experts that transformers fuses in memory get their own tensors
again, as in every checkpoint of the family.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1ray.errors import CheckpointCorrupt
from r1ray.model.checkpoint import INDEX, weight_files

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["take_part", "with_weights", "write_weights"]

_SHARD_BYTES = 2 << 30
_LAYER = re.compile(r".*?\.layers\.\d+\.")
_log = logging.getLogger(__name__)


def with_weights(checkpoint: Path, dtype: str) -> list[Path]:
    """The weight files of a checkpoint of full training; written now, in `dtype`, where it holds only ZeRO's shards.

    Raises:
        CheckpointCorrupt: there are neither weights nor shards of all ranks.
    """
    if not any(checkpoint.glob("model*.safetensors")):
        _consolidate(checkpoint, dtype)
    return weight_files(checkpoint)


def _tied_names(model: PreTrainedModel) -> frozenset[str]:
    """Tensors that are another one under a second name, and are stored under the first alone."""
    return (
        frozenset(getattr(model, "_tied_weights_keys", None) or ()) if getattr(model.config, "tie_word_embeddings", False) else frozenset()
    )


def write_weights(model: PreTrainedModel, tensors: Mapping[str, Any], out: Path, dtype: str | None = None) -> None:
    """Safetensors and their index in `out`; at most a shard and a layer are copied at a time.

    Args:
        model: Knows how its tensors are named in files; its own weights are not looked at.
        tensors: By the model's names; copied from a GPU, or put together (asked for their `contiguous()`), when their turn comes.
        dtype: What numbers are stored in; None keeps each tensor's own.
    """
    from safetensors.torch import save_file

    files: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(_shards(model, tensors, dtype), start=1):
        name = f"model-{number:05d}.safetensors"
        save_file(shard, out / name, metadata={"format": "pt"})
        files |= dict.fromkeys(shard, name)
        total += sum(tensor.nbytes for tensor in shard.values())
    (out / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=2), encoding="utf-8")


def take_part(model: PreTrainedModel, tensors: Mapping[str, Any]) -> None:
    """Where other workers write: ask for the same tensors in the same order as `write_weights` does there, and let each go."""
    import torch

    for layer in _layers(tensors, model):
        for part in layer.values():
            if not isinstance(part, torch.Tensor):
                part.contiguous()


def _consolidate(checkpoint: Path, dtype: str) -> None:
    unfinished = checkpoint / ".weights"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    _log.info("putting the weights of %s together in %s", checkpoint.name, dtype)
    write_weights(_skeleton(checkpoint), _masters(checkpoint), unfinished, dtype)
    for path in sorted(unfinished.iterdir(), key=lambda path: path.name == INDEX):  # the index last: it says that all is there
        path.rename(checkpoint / path.name)
    unfinished.rmdir()


def _shards(model: PreTrainedModel, tensors: Mapping[str, Any], dtype: str | None) -> Iterator[dict[str, torch.Tensor]]:
    from transformers.core_model_loading import revert_weight_conversion

    shard: dict[str, torch.Tensor] = {}
    for layer in _layers(tensors, model):
        stored = revert_weight_conversion(model, {name: _stored(part, dtype) for name, part in layer.items()})
        if shard and sum(tensor.nbytes for tensor in (*shard.values(), *stored.values())) > _SHARD_BYTES:
            yield shard
            shard = {}
        shard |= {name: tensor.contiguous() for name, tensor in stored.items()}
    yield shard


def _skeleton(checkpoint: Path) -> PreTrainedModel:
    """The model without weights: it knows which of its tensors are named otherwise in files, and which are tied."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint))
    return model


def _masters(checkpoint: Path) -> Mapping[str, Any]:
    """Name -> what gathers that tensor from the ranks' shards when it is asked for."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found: Mapping[str, Any] = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), lazy_mode=True)
    except (ValueError, FileNotFoundError, KeyError) as error:
        raise CheckpointCorrupt(
            f"The weights in {checkpoint} cannot be put together: {error}. Train again from an older checkpoint."
        ) from error
    return found


def _layers(masters: Mapping[str, Any], model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """The tensors of a layer together, since its experts may share one; those of no layer each alone. Tied copies are left out."""
    tied = _tied_names(model)
    groups: dict[str, dict[str, Any]] = {}
    for name, part in masters.items():
        if name not in tied:
            layer = _LAYER.match(name)
            groups.setdefault(layer[0] if layer else name, {})[name] = part
    yield from groups.values()


def _stored(part: Any, dtype: str | None) -> torch.Tensor:
    """A copy in main memory, whose storage is its own: DeepSpeed lays the weights of a model end to end in one."""
    import torch

    tensor: torch.Tensor = part.contiguous().detach()
    wanted = getattr(torch, dtype) if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.to("cpu", wanted, copy=isinstance(part, torch.Tensor))
