"""From an artifact and a config to an engine, not yet started. The one place that knows which engines exist."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import psutil

from r1ray.engine.config import EngineConfig
from r1ray.engine.protocol import Engine
from r1ray.errors import UnsupportedModel
from r1ray.types import Artifact

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from r1ray.registry import Registry

__all__ = ["choose_device", "choose_threads", "create_engine"]

log = logging.getLogger(__name__)


def create_engine(artifact: Artifact, config: EngineConfig, registry: Registry, *, model: PreTrainedModel | None = None) -> Engine:
    """Load the artifact's weights (an adapter is merged into its base) into an engine of `config.type`.

    Args:
        model: The artifact's model when it is in memory already. The engine takes it over: call it directly no more.

    Raises:
        UnsupportedModel: no engine of that type can run this kind of artifact.
    """
    if config.type == "fake":
        from r1ray.engine.fake import FakeEngine

        return FakeEngine(config, context_length=artifact.manifest.context_length)
    if artifact.manifest.kind == "onnx":
        raise UnsupportedModel(f"{artifact.ref} is an ONNX export; the torch engine runs weights. Take one of its parents.")
    return _torch_engine(artifact, config, registry, model)


def _torch_engine(artifact: Artifact, config: EngineConfig, registry: Registry, model: PreTrainedModel | None) -> Engine:
    from r1ray.engine.torch import TorchEngine
    from r1ray.model.load import load_model, load_tokenizer

    if model is None:
        model = load_model(artifact, registry=registry, dtype=config.dtype, device=choose_device(config.device))
    eos = _eos_ids(model, load_tokenizer(artifact).eos_token_id)
    limit = artifact.manifest.context_length
    chosen = {"max_context": min(config.max_context or limit, limit), "num_threads": choose_threads(config.num_threads)}
    return TorchEngine(model, config.model_copy(update=chosen), eos_token_ids=eos)


def _eos_ids(model: PreTrainedModel, of_tokenizer: int | None) -> list[int]:
    """The generation config's and the tokenizer's: a chat model's end-of-turn token is often in only one of them."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    return sorted({*ids, *([] if of_tokenizer is None else [of_tokenizer])})


def choose_device(wanted: str) -> str:
    """`auto` is a GPU when one is visible."""
    import torch

    if wanted != "auto":
        return wanted
    device = "cuda" if torch.cuda.is_available() else "cpu"
    log.info("engine device: %s (%s)", device, "a GPU is visible" if device == "cuda" else "no GPU is visible")
    return device


def choose_threads(wanted: int | None) -> int:
    """`wanted`, else the physical cores that this process may use.

    Ray sets OMP_NUM_THREADS to the CPUs that an actor reserves, and to 1 for a job's driver. A reservation is book-keeping: left
    alone, torch would compute on one core of many.
    """
    if wanted is not None:
        return wanted
    num_threads = max(1, min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1))
    log.info("engine threads: %d (this process's physical cores; set engine.num_threads where processes share them)", num_threads)
    return num_threads
