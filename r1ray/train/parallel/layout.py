"""Which worker computes what: world = data x pipeline x tensor x sequence. And what cannot be combined, said before anything starts.

    place = Layout(world=8, tensor=2).place(5)      # data rank 2 of 4, tensor rank 1 of 2

Pure arithmetic on degrees, ranks and the numbers of a model's config.json; no torch, no DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from r1ray.errors import InvalidValue

if TYPE_CHECKING:
    from r1ray.train.config import TrainConfig

__all__ = ["COLUMNS", "ROWS", "Layout", "Place", "check_combination", "check_model", "layout_of"]


COLUMNS = ("q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj")
"""Linear layers before attention or an activation, split by their outputs; DeepSeek-V3's latents (q_a, kv_a) stay whole."""
ROWS = ("o_proj", "down_proj")
"""Those after it, split by their inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Of one worker. Workers of equal `data` compute the same rows; `data` counts to `Layout.data`, and so on."""

    data: int
    stage: int
    tensor: int
    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Degrees of a world. Neighbouring ranks share a tensor or a sequence; stages are the slowest, as DeepSpeed counts them."""

    world: int
    tensor: int = 1
    pipeline: int = 1
    sequence: int = 1

    def __post_init__(self) -> None:
        if self.world % self.split:
            raise InvalidValue(
                f"{self.world} workers cannot be split by tensor {self.tensor} x pipeline {self.pipeline} x sequence {self.sequence}. "
                f"Set train.num_workers to a multiple of {self.split}."
            )

    @property
    def split(self) -> int:
        """Workers that hold one copy of the model, or of its activations, together."""
        return self.tensor * self.pipeline * self.sequence

    @property
    def data(self) -> int:
        """Workers, or groups of them, that compute different rows."""
        return self.world // self.split

    def place(self, rank: int) -> Place:
        """Of the worker with this rank."""
        stage, rest = divmod(rank, self.world // self.pipeline)
        inner = self.tensor * self.sequence
        data, inside = divmod(rest, inner)
        return Place(data=data, stage=stage, tensor=inside // self.sequence, sequence=inside % self.sequence)

    def peers(self, rank: int) -> list[int]:
        """Ranks that share this rank's rows at its stage: its tensor or sequence group, in order."""
        inner = self.tensor * self.sequence
        first = rank // inner * inner
        return list(range(first, first + inner))


def layout_of(config: TrainConfig, world: int) -> Layout:
    """The layout of a training with this many workers.

    Raises:
        InvalidValue: the degrees do not divide the world.
    """
    degrees = config.parallelism
    return Layout(world=world, tensor=degrees.tensor, pipeline=degrees.pipeline, sequence=degrees.sequence)


def check_combination(config: TrainConfig) -> None:
    """What DeepSpeed 0.19 can do together, and what gives the losses of data-parallel training (docs/training.md has the table).

    Raises:
        ValueError: naming the keys and what to set.
    """
    degrees = config.parallelism
    if degrees.split == 1:
        return
    above = {name: value for name, value in degrees.model_dump().items() if value > 1}
    said = " ".join(f"parallelism.{name}={value}" for name, value in above.items())
    if len(above) > 1:
        raise ValueError(f"{said}: DeepSpeed cannot nest them in one training; set one above 1, and num_workers higher for data parallel")
    if config.max_workers % degrees.split:
        raise ValueError(f"{said} does not divide num_workers={config.max_workers}; set num_workers to a multiple of {degrees.split}")
    if config.objective != "sft":
        raise ValueError(f"{said} is for objective sft; {config.objective} needs whole texts; set it to 1 and use zero_stage=3")
    if config.method in ("prompt", "prefix"):
        raise ValueError(f"{said} with method {config.method}: what it trains is small and stands before the split; set it to 1")
    if config.packing:
        raise ValueError(f"{said} knows no packed dialogues; set packing=false (group_window keeps the padding low)")
    if config.dtype == "float16" or (config.offload != "none" and degrees.sequence == 1):
        raise ValueError(f"{said} was not tried with float16 or offload; set dtype=bfloat16 offload=none")
    if degrees.pipeline > 1 and config.zero_stage > 1:
        raise ValueError(f"{said} with zero_stage {config.zero_stage}: a pipeline keeps its gradients over a batch; set zero_stage=1 or 0")
    if degrees.tensor > 1 and config.zero_stage == 3:
        raise ValueError(f"{said} with zero_stage 3: both would split the same weights; set zero_stage=2, or tensor=1")
    if degrees.tensor > 1 and config.method == "lora" and (config.lora.dora or config.lora.experts):
        raise ValueError(f"{said} splits plain LoRA of linear layers; set lora.dora=false lora.experts=false")
    if degrees.sequence > 1 and config.attention == "eager":
        raise ValueError(f"{said} with attention eager: it wants a mask that no worker has; set attention=sdpa or auto")


def check_model(config: TrainConfig, model: Mapping[str, Any], ref: str) -> None:
    """Whether this model can be split so; in the driver, before anything starts.

    Args:
        model: Its config.json.
        ref: Its name, for the message.

    Raises:
        InvalidValue: heads, layers or widths that the degrees do not divide.
    """
    degrees = config.parallelism
    for key, name, degree in _divided(degrees.tensor, degrees.sequence, model):
        if model[key] % degree:
            raise InvalidValue(
                f"train.parallelism.{name}={degree} does not divide {key}={model[key]} of {ref}. Set it to a divisor, or to 1."
            )
    num_layers = int(model.get("num_hidden_layers", 0))
    if degrees.pipeline > max(1, num_layers):
        raise InvalidValue(
            f"train.parallelism.pipeline={degrees.pipeline}, but {ref} has {num_layers} layers and a stage needs one at least. "
            f"Set it to 1-{num_layers}."
        )
    if (degrees.pipeline > 1 or degrees.sequence > 1) and slides(model):
        raise InvalidValue(
            f"{ref} has sliding-window attention, of which neither stages nor slices of a sequence know. Set train.parallelism.pipeline=1 "
            "and sequence=1; tensor works."
        )
    if degrees.split > 1 and model.get("model_type") not in SPLITTABLE:
        raise InvalidValue(
            f"train.parallelism can split models of type {', '.join(SPLITTABLE)}; {ref} is of type {model.get('model_type')}. "
            "Set all degrees to 1 and use train.zero_stage=3, which splits every model."
        )


SPLITTABLE = ("deepseek_v3", "llama", "qwen2")
"""Types of which tests hold that the split trains as the whole does: R1, its distills, and Llama's other relatives."""


def slides(model: Mapping[str, Any]) -> bool:
    """Whether some layers of this config.json see only a window of what is before a position."""
    kinds = model.get("layer_types") or ()
    return bool(model.get("use_sliding_window")) or "sliding_attention" in kinds


def _divided(tensor: int, sequence: int, model: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """(key of config.json, name of the degree, degree) that must divide."""
    heads = [key for key in ("num_attention_heads", "num_key_value_heads") if isinstance(model.get(key), int)]
    widths = [key for key in ("intermediate_size", "moe_intermediate_size") if isinstance(model.get(key), int)]
    wanted = [(key, "tensor", tensor) for key in (*heads, *widths) if tensor > 1]
    # Ulysses repeats key-value heads where there are fewer than ranks
    few = sequence > 1 and isinstance(model.get("num_key_value_heads"), int) and sequence % model["num_key_value_heads"] == 0
    return wanted + [(key, "sequence", sequence) for key in heads if sequence > 1 and not (few and key == "num_key_value_heads")]
