"""From an artifact and a config to the ranks of a split model: may it be split, on which device, which layers in which stage.

Each rank reads its own tensors from the artifact's files, which every node must see under the same path. The one place that knows both
Ray's actors and the pipeline.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from r1ray.engine.config import QUANTISED, EngineConfig, Precision
from r1ray.engine.hardware import engine_device
from r1ray.engine.memory import CacheWish
from r1ray.errors import UnsupportedModel
from r1ray.types import Artifact

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from r1ray.engine.pipeline import PipelineBackend
    from r1ray.engine.stage import StageOrder
    from r1ray.registry import Registry

__all__ = ["create_split"]

log = logging.getLogger(__name__)


def create_split(
    artifact: Artifact, config: EngineConfig, registry: Registry, shape: PretrainedConfig, precision: Precision | None
) -> PipelineBackend:
    """`precision`: of the compiled kernels; None where transformers' modules compute the layers.

    Raises:
        UnsupportedModel: an adapter that cannot be merged layer by layer, or an architecture that cannot be split.
        InvalidValue: a degree that does not divide the model, or devices that do not go with what is reserved.
        EngineStopped: a rank could not load its layers.
    """
    from r1ray.engine.actors import StageActors
    from r1ray.engine.pipeline import PipelineBackend
    from r1ray.engine.stage import orders_by_rank

    order = _order(artifact, config, registry, shape, precision)
    ranges = _ranges(shape, config.stages)
    log.info("pipeline: layers %s, over %d tensor ranks", ", ".join(f"{a}-{b - 1}" for a, b in ranges), config.tensor_parallel)
    workers = StageActors({"num_cpus": config.stage_cpus, "num_gpus": config.stage_gpus})
    return PipelineBackend(orders_by_rank(order, ranges, config.tensor_parallel), hidden=shape.hidden_size, workers=workers)


def _order(
    artifact: Artifact, config: EngineConfig, registry: Registry, shape: PretrainedConfig, precision: Precision | None
) -> StageOrder:
    """Of the whole model; `orders_by_rank` gives each rank its layers."""
    from r1ray.engine.stage import StageOrder

    directory, adapter = _sources(artifact, registry, is_native=precision is not None)
    if config.tensor_parallel > 1:
        _check_degree(directory, config.tensor_parallel)
    device = "cpu" if precision is not None else engine_device(config)
    assert config.num_threads is not None, "create_engine has filled it in"
    return StageOrder(
        directory=directory,
        adapter=adapter,
        layers=(0, shape.num_hidden_layers),
        precision=precision or _precision(config, device),
        native=precision is not None,
        wish=CacheWish.of(config),
        num_threads=config.num_threads,
        device=device,
    )


def _sources(artifact: Artifact, registry: Registry, *, is_native: bool) -> tuple[Path, Path | None]:
    """Where the full weights lie, and the adapter that is merged into them."""
    from r1ray.model.load import base_of
    from r1ray.model.lora import why_not_plain

    if artifact.manifest.kind != "adapter":
        return artifact.path, None
    if not is_native or why_not_plain(artifact.path):
        raise UnsupportedModel(
            f"{artifact.ref} is an adapter that cannot be merged layer by layer. Merge it first, "
            "or set engine.stages=1 and engine.tensor_parallel=1."
        )
    return base_of(artifact, registry).path, artifact.path


def _precision(config: EngineConfig, device: str) -> str:
    """What transformers' modules hold their weights in."""
    from r1ray.model.load import choose_dtype

    if config.dtype in QUANTISED:  # the kernels', whose place these modules take
        return "bfloat16"
    return str(choose_dtype(device)[0]).removeprefix("torch.") if config.dtype == "auto" else config.dtype


def _check_degree(directory: Path, num_tensor: int) -> None:
    """On transformers' own configuration, which has its plan: the engine's may be a plain one."""
    from transformers import AutoConfig

    from r1ray.engine.tensor import check_split

    check_split(AutoConfig.from_pretrained(directory), num_tensor)


def _ranges(shape: PretrainedConfig, num_stages: int) -> list[tuple[int, int]]:
    """By the numbers that a token is multiplied with; the head counts as the layers that are as large."""
    from r1ray.model.plan.shape import shape_of
    from r1ray.model.split import split_layers

    sizes = shape_of(shape.to_dict())
    costs = [float(sizes.active_layer_parameters(layer)) for layer in range(shape.num_hidden_layers)]
    return split_layers(costs, num_stages, after=float(shape.vocab_size * shape.hidden_size))
