"""From an artifact and a config to a loaded vLLM: what to read, how much cache, where."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from r1ray.engine.backend import BLOCK_SIZE
from r1ray.engine.config import EngineConfig
from r1ray.engine.paged import kv_bytes_per_token
from r1ray.engine.vllm.arguments import Order, engine_arguments
from r1ray.engine.vllm.engine import VllmEngine, adapter_rank
from r1ray.engine.vllm.environment import find_environment
from r1ray.engine.vllm.launch import launch
from r1ray.errors import InvalidValue
from r1ray.types import Artifact

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["create_vllm"]

CPU_BLOCK = 128  # positions of vLLM's blocks on CPUs


def create_vllm(artifact: Artifact, config: EngineConfig, *, base: Path, shape: PretrainedConfig, eos_token_ids: list[int]) -> VllmEngine:
    """vLLM reads `base` itself, which its node must see under the same path; an adapter lies beside it, unmerged.

    Raises:
        InvalidValue, AdapterMismatch, ClusterTooSmall, EngineStopped: as find_environment, adapter_rank and launch; stages without
            compilation on CPUs.
    """
    environment = find_environment(config.vllm, wants_gpus=config.stage_gpus > 0)
    own = artifact.path if artifact.manifest.kind == "adapter" else None
    uncompiled = config.vllm.eager or config.vllm.max_adapters > 0 or own is not None
    if environment.device == "cpu" and config.stages > 1 and uncompiled:
        raise InvalidValue(
            f"engine.stages={config.stages} with vllm.eager or adapters: on CPUs vLLM 0.32 makes their buffers in its compiled warm-up "
            "and dies without it. Set engine.vllm.eager=false and max_adapters=0, or engine.stages=1."
        )
    context = min(config.max_context or artifact.manifest.context_length, artifact.manifest.context_length)
    arguments = engine_arguments(
        config,
        context=context,
        kv_cache_bytes=_kv_cache_bytes(config, shape, context, device=environment.device),
        adapter_rank=None if own is None else adapter_rank(own),
        device=environment.device,
    )
    order = Order(model=base, adapter=own, num_threads=config.num_threads, arguments=arguments)
    actor, found = launch(order, config, environment)
    return VllmEngine(actor, found, config, eos_token_ids=eos_token_ids)


def _kv_cache_bytes(config: EngineConfig, shape: PretrainedConfig, context: int, *, device: str) -> int | None:
    """On GPUs vLLM measures what is left itself; on CPUs it would take nearly all of the main memory, so we say how much."""
    from r1ray.engine.memory import num_kv_blocks

    if config.kv_cache_gb is not None:
        return int(config.kv_cache_gb * 1e9)
    if device == "cuda":
        return None
    bytes_per_token = kv_bytes_per_token(shape, torch.float32 if config.dtype == "float32" else torch.bfloat16)
    whole = -(-context // CPU_BLOCK) * CPU_BLOCK  # a context that ends in a block's middle takes all of it
    num_blocks = num_kv_blocks(config.model_copy(update={"max_context": whole}), bytes_per_token, device)
    return (num_blocks * BLOCK_SIZE + 2 * CPU_BLOCK) * bytes_per_token
