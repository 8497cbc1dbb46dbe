"""From an artifact and a config to an engine, not yet started. The one place that knows which engines and backends exist."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from r1ray.engine.config import QUANTISED, EngineConfig, Precision
from r1ray.engine.hardware import choose_threads, engine_device
from r1ray.engine.kinds import check_kind
from r1ray.engine.memory import CacheWish, blocks_for, num_kv_blocks
from r1ray.engine.protocol import Engine
from r1ray.errors import UnsupportedModel
from r1ray.types import Artifact

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from r1ray.engine.backend import Backend
    from r1ray.model.checkpoint import Tensors
    from r1ray.registry import Registry

__all__ = ["create_engine"]

log = logging.getLogger(__name__)


def create_engine(artifact: Artifact, config: EngineConfig, registry: Registry) -> Engine:
    """Load the artifact's weights (an adapter is merged into its base) into an engine of `config.type`.

    Raises:
        UnsupportedModel: no engine of that type can run this kind of artifact, or the chosen backend cannot.
    """
    if config.type == "fake":
        from r1ray.engine.fake import FakeEngine

        return FakeEngine(config, context_length=artifact.manifest.context_length)
    check_kind(artifact, config)
    from r1ray.model.architecture import read_architecture
    from r1ray.model.load import base_of
    from r1ray.model.soft import soft_kind

    is_adapter = artifact.manifest.kind == "adapter"
    directory = base_of(artifact, registry).path if is_adapter else artifact.path
    shape = read_architecture(directory)
    limit = artifact.manifest.context_length
    if config.type == "vllm":
        from r1ray.engine.vllm.create import create_vllm

        return create_vllm(artifact, config, base=directory, shape=shape, eos_token_ids=_eos_ids(artifact, directory, shape))
    config = config.model_copy(
        update={
            "max_context": min(config.max_context or limit, limit),
            "num_threads": choose_threads(config.num_threads, num_ranks=config.tensor_parallel),
        }
    )
    from r1ray.engine.batching import BatchingEngine

    if is_adapter and soft_kind(artifact.path):
        backend, limit = _soft_prompted(artifact, config, registry, shape)
    elif config.type == "onnx":
        backend = _onnx(artifact, config, shape)
    else:
        backend = _backend(artifact, config, registry, shape)
    return BatchingEngine(backend, config, context_length=limit, eos_token_ids=_eos_ids(artifact, directory, shape))


def _soft_prompted(artifact: Artifact, config: EngineConfig, registry: Registry, shape: PretrainedConfig) -> tuple[Backend, int]:
    """The base behind the artifact's soft prompt, and the context that is left."""
    from r1ray.engine.soft import SoftPrompted, check_soft_prompt
    from r1ray.model.load import base_of
    from r1ray.model.soft import read_soft_prompt

    if config.stages * config.tensor_parallel > 1:
        raise UnsupportedModel(
            f"{artifact.ref} is a soft prompt, which a split model does not take. Set engine.stages=1 and engine.tensor_parallel=1."
        )
    soft = read_soft_prompt(artifact.path)
    check_soft_prompt(soft, shape.get_text_config().hidden_size)
    assert config.max_context is not None, "create_engine has filled it in"
    return SoftPrompted(_backend(base_of(artifact, registry), config, registry, shape), soft), config.max_context - soft.num_tokens


def _onnx(artifact: Artifact, config: EngineConfig, shape: PretrainedConfig) -> Backend:
    import torch

    from r1ray.engine.onnx import OnnxBackend, OnnxOptions
    from r1ray.engine.paged import kv_bytes_per_token

    assert config.max_context is not None and config.num_threads is not None, "create_engine has filled them in"
    exported = artifact.manifest.config
    device = str(exported.get("device", "cpu")) if config.device == "auto" else config.device
    precision = str(exported.get("precision", "unknown"))
    held = torch.float32 if device == "cpu" else torch.float16
    weight_bytes = sum(file.stat().st_size for file in artifact.path.glob("*.onnx*"))
    options = OnnxOptions(
        precision=precision,
        num_blocks=num_kv_blocks(config, 2 * kv_bytes_per_token(shape, held), device, weight_bytes=weight_bytes),  # blocks and rows
        num_rows=config.num_slots,
        context=config.max_context,
        num_threads=config.num_threads,
        device=device,
    )
    log.info("engine backend: ONNX Runtime on %s, %s", device, precision)
    return OnnxBackend(artifact.path, options)


def _backend(artifact: Artifact, config: EngineConfig, registry: Registry, shape: PretrainedConfig) -> Backend:
    precision = _native_precision(artifact, config, registry, shape)
    is_split = config.stages * config.tensor_parallel > 1
    if config.compile is True and (is_split or precision is not None):
        why = "a split model computes eagerly" if is_split else "the native kernels are compiled already"
        log.warning("engine.compile=true has no effect: %s", why)
    if is_split:
        from r1ray.engine.split import create_split

        return create_split(artifact, config, registry, shape, precision)
    if precision is not None:
        return _native(artifact, config, registry, shape, precision)
    return _transformers(artifact, config, registry)


def _calibrated(artifact: Artifact, registry: Registry) -> Precision:
    """What `r1ray calibrate` found best for these weights on this machine; bfloat16 where it never ran."""
    from r1ray.engine.calibration import load_calibration

    if (found := load_calibration(artifact, registry.settings)) is None:
        log.info("engine precision: bfloat16 (%s was not calibrated here: r1ray calibrate)", artifact.ref)
        return "bfloat16"
    log.info("engine precision: %s (calibrated: %s)", found.chosen, found.reason)
    return cast("Precision", found.chosen)


def _native_precision(artifact: Artifact, config: EngineConfig, registry: Registry, shape: PretrainedConfig) -> Precision | None:
    """What the native backend shall hold the weights in; None when another backend runs the model. Says why."""
    from r1ray.engine.native import build
    from r1ray.engine.native.model import refusal

    precision = _calibrated(artifact, registry) if config.dtype == "auto" else config.dtype
    if config.backend == "transformers":
        why: str | None = "engine.backend says transformers"
    elif (device := engine_device(config)) != "cpu":
        why = f"the device is {device}"
    elif config.tensor_parallel > 1:
        why = f"engine.tensor_parallel={config.tensor_parallel}, and the native kernels compute whole layers only"
    else:
        why = build.why_not() or refusal(shape, precision)
    if why is None:
        log.info("engine backend: native, %s", precision)
        return precision
    if config.backend == "native":
        raise UnsupportedModel(f"engine.backend=native cannot run this model here: {why}. Set engine.backend=auto.")
    if config.dtype in QUANTISED:
        raise UnsupportedModel(
            f"engine.dtype={config.dtype} needs the native backend, which does not run here: {why}. Set engine.dtype=auto."
        )
    log.info("engine backend: transformers (%s)", why)
    return None


def _native(artifact: Artifact, config: EngineConfig, registry: Registry, shape: PretrainedConfig, precision: Precision) -> Backend:
    from r1ray.engine.native.model import NativeModel, NativeOptions

    assert config.max_context is not None and config.num_threads is not None, "create_engine has filled them in"
    options = NativeOptions(precision=precision, context=config.max_context, num_threads=config.num_threads)
    backend = NativeModel(shape, _tensors(artifact, registry, "float32" if precision == "float32" else "auto"), options)
    backend.allocate(blocks_for([backend.room(wish := CacheWish.of(config))], wish))
    return backend


def _tensors(artifact: Artifact, registry: Registry, dtype: Literal["float32", "auto"]) -> Tensors:
    """From the files, without transformers' modules, where that is enough; from a merged model otherwise."""
    from r1ray.model.checkpoint import checkpoint_tensors
    from r1ray.model.load import base_of, load_model
    from r1ray.model.lora import merged, read_lora, why_not_plain

    if artifact.manifest.kind != "adapter":
        return checkpoint_tensors(artifact.path)
    if why_not_plain(artifact.path) is None:
        return merged(checkpoint_tensors(base_of(artifact, registry).path), read_lora(artifact.path))
    return load_model(artifact, registry=registry, dtype=dtype).state_dict().get


def _transformers(artifact: Artifact, config: EngineConfig, registry: Registry) -> Backend:
    import torch

    from r1ray.engine.compiled import is_wanted
    from r1ray.engine.paged import TransformersBackend

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    model, wish = _modules(artifact, config, registry), CacheWish.of(config)
    compiles = is_wanted(config.compile, str(model.device))
    backend = TransformersBackend(model)
    backend.allocate(blocks_for([backend.room(wish, compiles=compiles)], wish))
    if compiles:
        backend.compile_decode(wish)
    return backend


def _modules(artifact: Artifact, config: EngineConfig, registry: Registry) -> PreTrainedModel:
    """transformers' modules with their weights; an FP8 checkpoint's are read by us: transformers does it on some GPUs only."""
    import torch
    from transformers import AutoConfig

    from r1ray.engine.partial import load_layers
    from r1ray.model.checkpoint import read_json
    from r1ray.model.fp8 import fp8_of
    from r1ray.model.load import choose_dtype, load_model

    device = engine_device(config)
    if artifact.manifest.kind == "adapter" or fp8_of(read_json(artifact.path / "config.json"), artifact.path) is None:
        dtype = cast(Literal["auto", "float32", "bfloat16"], config.dtype)
        return load_model(artifact, registry=registry, dtype=dtype, device=device)
    shape = AutoConfig.from_pretrained(artifact.path)
    wanted = choose_dtype(device)[0] if config.dtype == "auto" else getattr(torch, config.dtype)
    return load_layers(artifact.path, shape, wanted, (0, shape.num_hidden_layers)).to(torch.device(device))


def _eos_ids(artifact: Artifact, directory: Path, shape: PretrainedConfig) -> list[int]:
    """The generation config's, the model config's and the tokenizer's: a chat model's end-of-turn token is often in only one of them."""
    from r1ray.model.checkpoint import read_json
    from r1ray.model.load import end_token_id

    file = directory / "generation_config.json"
    configured = read_json(file).get("eos_token_id") if file.is_file() else None
    configured = shape.eos_token_id if configured is None else configured
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    of_tokenizer = end_token_id(artifact)
    return sorted({*ids, *([] if of_tokenizer is None else [of_tokenizer])})
