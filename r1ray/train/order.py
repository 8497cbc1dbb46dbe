"""What is left to choose when a training begins, chosen: steps, number type, attention, threads; and what the workers reserve.

For a fine-tuning job and for each trial of a sweep alike. Runs in the driver, whose machine stands for its siblings. Starts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from r1ray.errors import InvalidValue
from r1ray.model.checkpoint import read_json
from r1ray.model.load import Dtype, choose_dtype
from r1ray.settings import Settings
from r1ray.train import runs
from r1ray.train.batches import BatchPlan, accumulation_steps
from r1ray.train.config import TrainConfig
from r1ray.train.parallel.layout import layout_of, slides
from r1ray.types import Artifact

__all__ = ["Material", "WorkOrder", "attention_of", "plan_for", "plan_of", "resolve_order", "worker_bundles"]

_BLOCKWISE_TYPES = ("deepseek_v3", "llama", "qwen2")
"""Of which tests/train/test_attention.py holds that blockwise attention gives what eager does."""
_SHORT = 512
"""Tokens. With rows as short, what eager attention frees is where DeepSpeed's buffers for all weights come from in each step; without it
the kernel has to map them anew (docs/training.md)."""
_MUCH_PADDING = 0.05
"""Share of the positions. Less of it costs about what attending row by row does."""


class Material(Protocol):
    """Tokenised rows on disk and what they hold; small, since it is pickled to the workers."""

    @property
    def path(self) -> Path:
        """Their Parquet file."""

    @property
    def num_rows(self) -> int: ...

    @property
    def told(self) -> str:
        """`2400 dialogues, 310000 tokens, ...` for the job log."""

    @property
    def is_mixed(self) -> bool:
        """Whether a mix plan in the file says which rows come when."""

    @property
    def is_complete(self) -> bool:
        """Whether `lengths` are those of the forward passes; prompts are answered only then."""

    def lengths(self) -> Sequence[int]:
        """Tokens of each row, in order: what batches are grouped by."""

    def rows(self) -> Any:
        """The rows themselves, on a worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkOrder:
    """All that a worker needs, resolved by the driver; small, since it is pickled."""

    config: TrainConfig
    base: Artifact
    material: Material
    run: str
    run_directory: Path
    num_steps: int
    dtype: Dtype
    attention: str
    settings: Settings
    held_out: Material | None = None


def plan_of(config: TrainConfig, lengths: Sequence[int]) -> BatchPlan:
    """The batches that driver and workers agree on."""
    return BatchPlan(
        lengths, batch_size=config.batch_size, num_epochs=config.num_epochs, seed=config.seed, group_window=config.group_window
    )


def plan_for(config: TrainConfig, material: Material) -> BatchPlan:
    """The same, in the order of the mix plan where the material has one."""
    if not material.is_mixed:
        return plan_of(config, material.lengths())
    from r1ray.train.mixed import MixedPlan
    from r1ray.train.parts import Part

    rows = material.chosen if isinstance(material, Part) else None
    shape = (config.batch_size, config.num_epochs, config.seed, config.group_window)
    return MixedPlan(material.lengths(), *shape, tokens=material.path, rows=rows)


def resolve_order(
    config: TrainConfig, base: Artifact, material: Material, directory: Path, settings: Settings, say: Callable[[str], object]
) -> WorkOrder:
    """The order for the workers of the run in `directory`; tells `say` what was chosen and why."""
    known = runs.load(directory)
    if known is not None and known.micro_batch_size is not None and known.micro_batch_size < config.micro_batch_size:
        say(f"micro_batch_size {known.micro_batch_size} instead of {config.micro_batch_size}, because the run ran out of memory before")
        config = config.model_copy(update={"micro_batch_size": known.micro_batch_size})
    material, held_out = _parts(config, material)
    plan = plan_for(config, material)
    num_steps = min(plan.num_steps, config.max_steps or plan.num_steps)
    layout = layout_of(config, config.max_workers)
    accumulation = accumulation_steps(config.rows_per_batch, layout.data, config.micro_batch_size)
    dtype, reason = (known.dtype, "the run began with it") if known else _dtype(config)
    attention = attention_of(config, read_json(base.path / "config.json"), base.ref, longest=max(material.lengths()))
    padding = plan.padding_share(layout.data, accumulation) if material.is_complete else 0.0
    if config.packing is None:
        config = config.model_copy(update={"packing": _can_pack(config, attention) and padding > _MUCH_PADDING})
    say(f"{directory.name} on {base.ref}")
    padded = f"no padding (end to end instead of {padding:.1%})" if config.packing else f"{padding:.1%} padding"
    say(f"{material.told}, {padded}" if material.is_complete else material.told)
    budget = f", at most {config.max_seconds:.0f} s" if config.max_seconds else ""
    say(f"{num_steps} steps of {config.batch_size} dialogues ({_workers(config)} x {accumulation} passes){budget}")
    if (told := plan.told(num_steps)) is not None:
        say(told)
    threads = f"{config.threads_per_worker} threads per worker" if config.threads_per_worker else "workers share their node's cores"
    say(f"{config.objective}, {config.method}, ZeRO-{config.zero_stage}, {dtype} because {reason}, {attention} attention, {threads}")
    if config.offload != "none" and not config.use_gpu:
        say(f"train.offload={config.offload} saves nothing without GPUs: all of it is in the node's memory anyway")
    return WorkOrder(
        config=config,
        base=base,
        material=material,
        run=directory.name,
        run_directory=directory,
        num_steps=num_steps,
        dtype=dtype,
        attention=attention,
        settings=settings,
        held_out=held_out,
    )


def attention_of(config: TrainConfig, model: Mapping[str, Any], ref: str, *, longest: int) -> str:
    """Which of transformers' attention functions, or ours, a training with `config` uses.

    Args:
        model: config.json of what is trained, or of its teacher.
        ref: Its name, for the message.
        longest: Tokens of the longest row.

    Raises:
        InvalidValue: `attention: blockwise` for a model of which no test holds that it gives the same.
    """
    is_known = model.get("model_type") in _BLOCKWISE_TYPES and not slides(model)
    if config.attention == "blockwise" and not is_known:
        raise InvalidValue(
            f"train.attention=blockwise is for models of type {', '.join(_BLOCKWISE_TYPES)} without sliding windows; {ref} is of type "
            f"{model.get('model_type')}. Set train.attention=auto."
        )
    if config.attention != "auto":
        return config.attention
    if config.use_gpu or config.parallelism.sequence > 1:
        return "sdpa"
    is_masked = config.dropout or config.method == "prefix" or (config.packing and config.learns_logits)
    gains_nothing = config.method == "full" and longest <= _SHORT
    return "blockwise" if is_known and not is_masked and not gains_nothing else "eager"


def _can_pack(config: TrainConfig, attention: str) -> bool:
    """At no cost that grows with the length of a pass."""
    has_rows = config.objective in ("sft", "distill") and not config.learns_logits and config.method in ("lora", "full")
    return attention == "blockwise" and has_rows and config.parallelism.split == 1


def _parts(config: TrainConfig, material: Material) -> tuple[Material, Material | None]:
    """(trained on, held out)."""
    if not config.eval_share:
        return material, None
    from r1ray.train.parts import parted
    from r1ray.train.tokens import TokenSet

    assert isinstance(material, TokenSet), "the config refuses eval_share for objectives that hold rows out themselves"
    return parted(material, config.eval_share, config.seed)


def worker_bundles(config: TrainConfig) -> list[dict[str, float]]:
    """What the workers of one training reserve, the fewest where their number may change."""
    return [{"CPU": config.cpus_per_worker, **({"GPU": 1.0} if config.use_gpu else {})}] * config.min_workers


def _workers(config: TrainConfig) -> str:
    return f"{config.min_workers} to {config.max_workers} workers" if config.is_elastic else f"{config.max_workers} workers"


def _dtype(config: TrainConfig) -> tuple[Dtype, str]:
    if config.dtype != "auto":
        return config.dtype, "train.dtype says so"
    if config.zero_stage == 0:
        return "float32", "ZeRO-0 keeps no float32 master weights"
    if config.use_gpu:  # none is seen from here: the workers look whether theirs does (precision.py)
        return "bfloat16", "GPUs multiply it"
    dtype, reason = choose_dtype("cpu")
    return ("bfloat16" if str(dtype) == "torch.bfloat16" else "float32"), reason
