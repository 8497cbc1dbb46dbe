"""Our settings and requests in vLLM's words: arguments of its engine and of its SamplingParams, as plain values that cross processes.

Knows neither Ray nor vLLM, so that all of it is tested without them. Arguments that vLLM does not know are its errors at start.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from r1ray.engine.config import EngineConfig
from r1ray.engine.protocol import GenerationRequest

__all__ = ["Order", "engine_arguments", "sampling_arguments"]

RANKS = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What the actor loads. `adapter` is the model's own (an artifact of kind adapter), used by every request that names none."""

    model: Path
    arguments: dict[str, Any] = field(default_factory=dict)
    adapter: Path | None = None
    num_threads: int | None = None


def engine_arguments(
    config: EngineConfig, *, context: int, kv_cache_bytes: int | None, adapter_rank: int | None, device: Literal["cuda", "cpu"] = "cuda"
) -> dict[str, Any]:
    """Of vLLM's AsyncEngineArgs. `adapter_rank` is that of the model's own adapter, None when it has none.

    vLLM 0.32 has two faults on CPUs that are avoided here. A request with a seed kills it when its prompt is cut into chunks ("CPU
    Generator does not use offset", gpu_model_runner.py), so prompts are computed whole. A request without an adapter that shares a batch
    with others gets the adapter of the last place (lora/ops/torch_ops indexes by -1), so that place is kept empty; one more is for an
    adapter that is replaced while streams use it (worker.py).
    """
    whole = device == "cpu"
    arguments: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # its own defaults, not the model's: a request says everything
        "dtype": config.dtype,
        "max_model_len": context,
        "max_num_seqs": config.num_slots,
        "max_num_batched_tokens": (max(config.prefill_chunk, context) if whole else config.prefill_chunk) + config.num_slots,
        "enable_chunked_prefill": not whole,
        "enable_prefix_caching": config.prefix_cache,
        "scheduling_policy": "priority",
        "max_logprobs": -1,
        "tensor_parallel_size": config.tensor_parallel,
        "pipeline_parallel_size": config.stages,
        "enforce_eager": config.vllm.eager,
        "disable_log_stats": True,
    }
    if config.stages * config.tensor_parallel > 1:
        arguments["distributed_executor_backend"] = config.vllm.executor
    if kv_cache_bytes is None:
        arguments["gpu_memory_utilization"] = config.vllm.gpu_memory_share
    else:
        arguments["kv_cache_memory_bytes"] = kv_cache_bytes
    if config.vllm.max_adapters or adapter_rank is not None:
        largest = max(config.vllm.max_adapter_rank if config.vllm.max_adapters else 0, adapter_rank or 0)
        arguments |= {
            "enable_lora": True,
            "max_loras": config.vllm.max_adapters + (adapter_rank is not None) + (2 if device == "cpu" else 0),
            "max_lora_rank": next(rank for rank in RANKS if rank >= largest),
        }
    return arguments


def sampling_arguments(request: GenerationRequest, *, max_tokens: int, eos_token_ids: Collection[int]) -> dict[str, Any]:
    """Of vLLM's SamplingParams. End-of-text ids travel as stop ids: vLLM, which loads no tokenizer here, knows none of them."""
    sampling = request.sampling
    stop_ids = () if request.ignore_eos else {*eos_token_ids, *request.stop_token_ids}
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "seed": sampling.seed,
        "max_tokens": max_tokens,
        "min_tokens": min(request.min_tokens, max_tokens),
        "ignore_eos": request.ignore_eos,
        "stop_token_ids": sorted(stop_ids),
        "logit_bias": dict(request.logit_bias) or None,
        "logprobs": request.num_logprobs,
        "prompt_logprobs": request.num_prompt_logprobs if request.prompt_logprobs else None,
    }
