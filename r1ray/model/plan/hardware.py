"""Accelerators, their prices and what software reaches of them: gpus.yaml, overlaid by the user's own file.

Takes names such as `8xh100`. Knows no model.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import Field, ValidationError

from r1ray.config import Config
from r1ray.errors import InvalidValue
from r1ray.settings import Settings

__all__ = ["GIB", "Assumptions", "Gpu", "Hardware", "Pool", "load_hardware"]

GIB = 1024**3
SHIPPED = Path(__file__).with_name("gpus.yaml")


class Gpu(Config):
    """One accelerator's data sheet and price."""

    memory_gib: float = Field(gt=0, description="Memory as the driver shows it.")
    bf16_tflops: float = Field(gt=0, description="Dense bfloat16 arithmetic.")
    fp8_tflops: float | None = Field(default=None, gt=0, description="Dense FP8 arithmetic; null where there is none.")
    bandwidth_gbs: float = Field(gt=0, description="Memory bandwidth, GB/s.")
    link_gbs: float = Field(gt=0, description="To neighbours in the node, one direction, GB/s.")
    network_gbs: float = Field(gt=0, description="To other nodes, per GPU, one direction, GB/s.")
    gpus_per_node: int = Field(default=8, ge=1, description="Most of them in one node.")
    overhead_gib: float = Field(default=1.5, ge=0, description="Context, communication buffers, workspaces: taken before any weight.")
    headroom: float = Field(default=0.05, ge=0, lt=1, description="Share of the memory lost to fragmentation in training.")
    is_gpu: bool = Field(default=True, description="False for main memory and processor: asked for by name only.")
    reuses_freed: bool = Field(default=True, description="Whether the allocator serves gradients from the activations' freed memory.")
    activation_slack: float = Field(default=0.0, ge=0, description="Share of the activations that the allocator loses between them.")
    price_per_hour: float = Field(ge=0, description="Per GPU and hour.")


class Assumptions(Config):
    """What software reaches of the hardware. Everything that is estimated rests on these and on nothing else."""

    mfu_full: float = Field(gt=0, le=1, description="Share of bf16_tflops in full fine-tuning of dense models.")
    mfu_lora: float = Field(gt=0, le=1, description="Same with LoRA.")
    mfu_experts: float = Field(gt=0, le=1, description="Same for models with experts.")
    prefill_efficiency: float = Field(gt=0, le=1, description="Share of the arithmetic reached when reading prompts.")
    bandwidth_efficiency: float = Field(gt=0, le=1, description="Share of the memory bandwidth reached when decoding.")
    all_reduce_us: float = Field(ge=0, description="Latency of one all-reduce inside a node.")
    expert_layer_us: float = Field(ge=0, description="Routing and small products of one decoding layer with experts.")
    hop_us: float = Field(ge=0, description="Latency between pipeline stages.")
    step_us: float = Field(ge=0, description="Scheduling and sampling of one engine step.")
    host_adam_gbs: float = Field(gt=0, description="Host memory bandwidth per GPU for an offloaded optimizer.")
    pcie_gbs: float = Field(gt=0, description="Host to GPU, per GPU.")
    worker_host_gib: float = Field(default=3.0, ge=0, description="Main memory of a GPU worker's process: libraries, CUDA, pinned buffers.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """So many equal GPUs, in nodes of `per_node`."""

    name: str
    gpu: Gpu
    num: int
    per_node: int

    @property
    def num_nodes(self) -> int:
        return -(-self.num // self.per_node)

    @property
    def price_per_hour(self) -> float:
        return self.num * self.gpu.price_per_hour

    @property
    def collective_gbs(self) -> float:
        """What a collective over all of them gets per GPU: the slowest wire it crosses."""
        return self.gpu.link_gbs if self.num <= self.per_node else self.gpu.network_gbs


class Hardware(Config):
    """gpus.yaml as read."""

    currency: str = Field(description="Of every price.")
    gpus: dict[str, Gpu] = Field(min_length=1, description="Name -> data.")
    assumptions: Assumptions = Field(description="What software reaches of the hardware.")

    def pool(self, text: str, per_node: int | None = None) -> Pool:
        """`8xh100`, `h100:8` or `h100` (one); `per_node` GPUs share a node, the type's largest node when absent.

        Raises:
            InvalidValue: not of that form, or an unknown type; names the nearest.
        """
        found = re.fullmatch(r"(?:(\d+)\s*[x*]\s*)?([a-z][\w.-]*?)(?::(\d+))?", text.strip().lower())
        if not found or (found[1] and found[3]):
            raise InvalidValue(f"{text!r} names no GPUs. Write e.g. 8xh100; types: {', '.join(self.gpus)}.")
        name, num = found[2], int(found[1] or found[3] or 1)
        if name not in self.gpus:
            near = [key for key in self.gpus if name in key] or difflib.get_close_matches(name, self.gpus, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise InvalidValue(f"Unknown GPU type {name!r}.{hint} Types: {', '.join(self.gpus)}; add yours with --gpu-file.")
        if num < 1 or (per_node is not None and per_node < 1):
            raise InvalidValue(f"{text!r} asks for {num} GPUs, {per_node or 'any'} per node; both must be at least 1.")
        gpu = self.gpus[name]
        return Pool(name=name, gpu=gpu, num=num, per_node=min(per_node or gpu.gpus_per_node, num))


def load_hardware(file: Path | None = None, settings: Settings | None = None) -> Hardware:
    """The shipped data, overlaid by `file`, else by gpus.yaml in r1ray's home where that exists.

    Raises:
        InvalidValue: the file is missing, no YAML, or has a key or value that does not belong there.
    """
    tree = _read(SHIPPED)
    own = file or (settings or Settings()).home / "gpus.yaml"
    if file is not None or own.is_file():
        tree = _overlaid(tree, _read(own))
    try:
        return Hardware.model_validate(tree)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors(include_url=False))
        raise InvalidValue(f"In {own}: {problems}. See {SHIPPED.name} of r1ray for the form.") from error


def _read(path: Path) -> dict[str, object]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidValue(f"{path} is no readable YAML: {error}. Give a file of the form of r1ray's gpus.yaml.") from error
    if not isinstance(tree, dict):
        raise InvalidValue(f"{path} holds no `key: value` lines. Give a file of the form of r1ray's gpus.yaml.")
    return tree


def _overlaid(below: Mapping[str, object], above: Mapping[str, object]) -> dict[str, object]:
    """Sections are merged key by key, so that a file with one price in it is enough."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _overlaid(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
