"""Fine-tuning on paper: memory per GPU, tokens per second, hours and money, before anything is started.

Counts what DeepSpeed's ZeRO optimizer holds, as r1ray's trainer configures it (r1ray/train/zero.py). Memory is arithmetic and
calibrated (docs/planning.md); time rests on the assumptions of gpus.yaml, which every result repeats. Asks no cluster.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

from pydantic import Field, model_validator

from r1ray.config import Config
from r1ray.errors import InvalidValue
from r1ray.model.adapters import MOST_POSITIONS, POSITIONS_BLOCK
from r1ray.model.plan.activations import Activations, Attention, Batch, activations_of
from r1ray.model.plan.adapter import Adapter, adapter_of, soft_prompt_of
from r1ray.model.plan.hardware import GIB, Assumptions, Hardware, Pool
from r1ray.model.plan.host import HostMemory, host_memory
from r1ray.model.plan.parts import part_of, wires
from r1ray.model.plan.shape import ModelShape

__all__ = ["Memory", "Speed", "TrainingPlan", "TrainingWish", "cheapest_first", "fewest", "plan_training", "relaxed"]

BUCKET, ADAPTER_BUCKET = 5e8, 5e7  # reduce_bucket_size, in numbers: DeepSpeed's own, and what r1ray/train/zero.py sets for adapters
LIVE = 1e9  # ZeRO-3 gathers at most this many weights at a time (stage3_max_live_parameters)
MASTER_BYTES = 12  # float32 master weight and AdamW's two moments
MOST_NODES = 512

Bound = Literal["arithmetic", "network", "offloading"]


class TrainingWish(Config):
    """What is to be trained and how; what jobs/configs/finetune_*.yaml has a key for has its name and values here."""

    method: Literal["full", "lora", "prompt", "prefix"] = Field(
        default="lora", description="All weights, a LoRA adapter, a soft prompt, or its keys and values in every layer."
    )
    rank: int = Field(default=16, ge=1, description="Rank of the adapter.")
    targets: tuple[str, ...] | None = Field(default=None, description="Linear layers to adapt; null: the family's own.")
    num_virtual_tokens: int = Field(
        default=POSITIONS_BLOCK,
        ge=POSITIONS_BLOCK,
        le=MOST_POSITIONS,
        multiple_of=POSITIONS_BLOCK,
        description="Positions of a soft prompt.",
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(default=2, description="1 splits optimizer states, 2 gradients too, 3 weights too.")
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        default="bfloat16", description="Weights and arithmetic; master weights stay float32."
    )
    attention: Attention = Field(default="sdpa", description="eager keeps all attention probabilities, blockwise half, sdpa none.")
    gradient_checkpointing: bool = Field(default=False, description="Compute activations twice to store less.")
    offload: Literal["none", "optimizer", "parameters"] = Field(
        default="none", description="To the node's memory: optimizer states, or weights too."
    )
    micro_batch_size: int = Field(default=4, ge=1, description="Dialogues per forward pass of a GPU.")
    accumulation: int = Field(default=1, ge=1, description="Forward passes per optimizer step.")
    length: int = Field(default=1024, ge=1, description="Tokens of the longest dialogue in a pass.")
    supervised_share: float = Field(default=1.0, gt=0, le=1, description="Share of the positions that carry loss.")
    tensor: int = Field(default=1, ge=1, description="GPUs that share every matrix (train.parallelism.tensor).")
    pipeline: int = Field(default=1, ge=1, description="Stages of layers, one per GPU (train.parallelism.pipeline).")
    sequence: int = Field(default=1, ge=1, description="GPUs that share every dialogue (train.parallelism.sequence).")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.offload == "parameters" and self.zero_stage != 3:
            raise ValueError("offload parameters keeps the weights on the host, which only zero_stage 3 can fetch from; set zero_stage=3")
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload needs a ZeRO optimizer; set zero_stage to 1, 2 or 3")
        if self.zero_stage == 0 and self.dtype != "float32":
            raise ValueError(f"zero_stage 0 with {self.dtype} keeps no float32 master weights; set zero_stage=1 or dtype=float32")
        if self.method == "prefix" and self.attention == "blockwise":
            raise ValueError("method prefix goes without attention blockwise, which knows no cached keys; set attention=eager or sdpa")
        if self.method == "prefix" and (self.zero_stage == 3 or self.gradient_checkpointing):
            raise ValueError("method prefix goes without zero_stage 3 and gradient_checkpointing; set zero_stage=2, or method=prompt")
        if self.split > 1 and self.method in ("prompt", "prefix"):
            raise ValueError(f"method {self.method} is not trained in a split model; set tensor, pipeline and sequence to 1")
        if sum(degree > 1 for degree in (self.tensor, self.pipeline, self.sequence)) > 1:
            raise ValueError("one of tensor, pipeline and sequence may be above 1, as in training")
        if self.split > 1 and (self.dtype == "float16" or (self.offload != "none" and self.sequence == 1)):
            raise ValueError("training refuses a split with float16 or offload, which were not tried; set dtype=bfloat16 offload=none")
        most = 1 if self.pipeline > 1 else 2 if self.tensor > 1 else 3
        if self.zero_stage > most:
            raise ValueError(f"this split goes with zero_stage up to {most}; set zero_stage={most}")
        return self

    @property
    def split(self) -> int:
        """GPUs that hold one copy of the model, or of its activations, together."""
        return self.tensor * self.pipeline * self.sequence

    @property
    def batch(self) -> Batch:
        """One GPU's part of a pass."""
        positions = self.micro_batch_size * self.length
        supervised = max(1, round(self.supervised_share * positions / self.sequence))
        is_whole = self.method == "full" or self.zero_stage == 3 or self.dtype == "float16" or self.tensor * self.pipeline > 1
        length = -(-self.length // self.sequence)
        return Batch(size=self.micro_batch_size, length=length, num_supervised=supervised, whole_logits=is_whole)

    @property
    def bytes_per_value(self) -> int:
        return 4 if self.dtype == "float32" else 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on the busiest GPU, and what offloading puts on its share of the host."""

    weights: float
    gradients: float
    optimizer: float
    buckets: float
    step: float
    """Float32 copy of the gradients that the optimizer works on, after the activations are gone."""
    activations: Activations
    overhead: float
    host: float
    reuses_freed: bool
    slack: float
    """Lost by the allocator between the activations."""

    @property
    def peak(self) -> float:
        """At the end of the forward pass, or in the optimizer's step when that needs more."""
        lasting = self.weights + self.optimizer + self.overhead
        if not self.reuses_freed:
            temporary = max(self.activations.working, self.activations.logits, self.gradients + self.step)
            return lasting + self.buckets + self.activations.kept + self.slack + temporary
        backward = max(self.activations.peak, self.activations.kept + self.gradients) + self.slack
        return lasting + self.buckets + max(backward, self.gradients + self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Of one optimizer step over all GPUs."""

    step_s: float
    tokens_per_s: float
    operations_per_token: float
    utilisation: float
    """The assumed MFU, before waiting for wires."""
    bound: Bound


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """The answer: does it fit, how fast, what does it cost."""

    wish: TrainingWish
    pool: Pool
    trainable: int
    total: int
    memory: Memory
    speed: Speed
    host: HostMemory | None
    """Of a node; None where the workers compute in main memory themselves."""

    @property
    def usable(self) -> float:
        """Bytes that may be taken of one GPU."""
        return self.pool.gpu.memory_gib * GIB * (1 - self.pool.gpu.headroom)

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.usable

    def hours(self, num_tokens: float) -> float:
        return num_tokens / self.speed.tokens_per_s / 3600

    def money(self, num_tokens: float) -> float:
        return self.hours(num_tokens) * self.pool.price_per_hour


def plan_training(shape: ModelShape, wish: TrainingWish, pool: Pool, assumptions: Assumptions) -> TrainingPlan:
    """One way of training on one pool of GPUs, one worker per GPU.

    Raises:
        InvalidValue: the pool's GPUs cannot be split so.
    """
    if pool.num % wish.split:
        raise InvalidValue(f"{pool.num} GPUs cannot be split by {wish.split}. Give a multiple of {wish.split}, or smaller degrees.")
    adapter = _adapter(shape, wish)
    base = shape.parameters.total
    trainable = adapter.parameters if adapter else base
    total = base + (adapter.parameters if adapter else 0)
    memory = _memory(shape, wish, pool)
    return TrainingPlan(
        wish=wish,
        pool=pool,
        trainable=trainable,
        total=total,
        memory=memory,
        host=host_memory(shape, wish, pool, assumptions, trainable=trainable, memory=memory) if pool.gpu.is_gpu else None,
        speed=_speed(shape, wish, pool, trainable, assumptions),
    )


def fewest(shape: ModelShape, wish: TrainingWish, name: str, hardware: Hardware) -> TrainingPlan | None:
    """The smallest pool of a type that the job fits into: part of a node, then whole nodes; None when splitting further is no help."""
    per_node = hardware.gpus[name].gpus_per_node
    inside = [num for num in (1, 2, 4, 8, 16) if num < per_node]
    for num in (*inside, *(per_node * nodes for nodes in range(1, MOST_NODES + 1))):
        if num % wish.split:
            continue
        plan = plan_training(shape, wish, hardware.pool(f"{num}x{name}"), hardware.assumptions)
        if plan.fits:
            return plan
    return None


def cheapest_first(shape: ModelShape, wish: TrainingWish, hardware: Hardware, num_tokens: float) -> list[TrainingPlan]:
    """`fewest` of every GPU type that can hold the job at all, by money."""
    plans = [fewest(shape, wish, name, hardware) for name, gpu in hardware.gpus.items() if gpu.is_gpu]
    return sorted((plan for plan in plans if plan is not None), key=lambda plan: plan.money(num_tokens))


def _adapter(shape: ModelShape, wish: TrainingWish) -> Adapter | None:
    if wish.method == "full":
        return None
    if wish.method == "lora":
        return adapter_of(shape, rank=wish.rank, targets=wish.targets)
    return soft_prompt_of(shape, wish.method, wish.num_virtual_tokens)


def _memory(whole: ModelShape, wish: TrainingWish, pool: Pool) -> Memory:
    shape = part_of(whole, tensor=wish.tensor, pipeline=wish.pipeline)
    adapter = _adapter(shape, wish)
    size, num, stage = wish.bytes_per_value, pool.num // (wish.tensor * wish.pipeline), wish.zero_stage
    # a stage has the embedding or the head
    base = shape.parameters.total - (shape.parameters.embedding if wish.pipeline > 1 and not shape.tied else 0)
    trainable = adapter.parameters if adapter else base
    total = base + (adapter.parameters if adapter else 0)
    share = 1 / num if stage >= 1 else 1.0
    weights = total * size / (num if stage == 3 else 1)
    gradients = trainable * size / (num if stage >= 2 else 1)
    # ZeRO-0 in float32 needs no master copy; the stages above keep one whatever the dtype.
    optimizer = trainable * (MASTER_BYTES if stage else 8) * share
    step = trainable * 4 * share if stage else 0.0
    bucket = (
        BUCKET if wish.method == "full" else ADAPTER_BUCKET
    )  # all of it is taken from a GPU; of the system's memory only what gradients are written to
    buckets = (bucket if pool.gpu.is_gpu else min(trainable, bucket)) * size if stage else 0.0
    if stage == 3 and num > 1:
        buckets += min(total, LIVE) * size
    host = 0.0
    if wish.offload != "none":
        host, optimizer, step, gradients = optimizer + gradients + step, 0.0, 0.0, 0.0
    if wish.offload == "parameters":
        host, weights = host + weights, 0.0
        buckets += min(total, LIVE) * size if num == 1 else 0.0
    activations = activations_of(
        shape, wish.batch, adapter=adapter, attention=wish.attention, checkpointing=wish.gradient_checkpointing, bytes_per_value=size
    )
    if wish.pipeline > 1:
        activations = _busiest(activations, waiting=min(wish.pipeline, wish.accumulation))
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        buckets=buckets,
        step=step,
        activations=activations,
        overhead=pool.gpu.overhead_gib * GIB,
        host=host,
        reuses_freed=pool.gpu.reuses_freed,
        slack=activations.kept * pool.gpu.activation_slack,
    )


def _busiest(one: Activations, *, waiting: int) -> Activations:
    """The first stage keeps the passes that it has begun and not ended (1F1B, arXiv 2104.04473), the last one has the logits."""
    first, last = replace(one, kept=one.kept * waiting, logits=0.0), one
    return max(first, last, key=lambda stage: stage.peak)


def _speed(shape: ModelShape, wish: TrainingWish, pool: Pool, trainable: int, assumptions: Assumptions) -> Speed:
    operations = _operations(shape, wish, trainable)
    utilisation = assumptions.mfu_full if wish.method == "full" else assumptions.mfu_lora
    if shape.num_experts:
        utilisation = min(utilisation, assumptions.mfu_experts)
    rate = pool.gpu.bf16_tflops * 1e12 * utilisation / (2 if wish.dtype == "float32" else 1)
    num_groups = pool.num // wish.split
    tokens = wish.accumulation * wish.micro_batch_size * wish.length
    idle = (wish.pipeline - 1) / wish.accumulation  # stages wait for the first pass and after the last (arXiv 2104.04473)
    arithmetic = tokens * operations / wish.split / rate * (1 + idle)
    own = _own_wires(pool, wish.split)
    arithmetic += wires(shape, tokens * wish.bytes_per_value, tensor=wish.tensor, sequence=wish.sequence) / (own * 1e9)
    held = trainable // (wish.tensor * wish.pipeline)
    network = _traffic(shape, wish, pool.num // (wish.tensor * wish.pipeline), held) / (pool.collective_gbs * 1e9)
    offloading = _offloading(shape, wish, pool.num // (wish.tensor * wish.pipeline), held, assumptions)
    times: dict[Bound, float] = {"arithmetic": arithmetic, "network": network, "offloading": arithmetic + offloading}
    bound = max(times, key=lambda name: times[name]) if offloading else ("network" if network > arithmetic else "arithmetic")
    step = max(times.values())
    return Speed(
        step_s=step, tokens_per_s=tokens * num_groups / step, operations_per_token=operations, utilisation=utilisation, bound=bound
    )


def _own_wires(pool: Pool, split: int) -> float:
    """GB/s among the GPUs of one copy: neighbours, while a node holds them."""
    return pool.gpu.link_gbs if split <= pool.per_node else pool.gpu.network_gbs


def _operations(shape: ModelShape, wish: TrainingWish, trainable: int) -> float:
    """Per token: forward, gradients of inputs, gradients of the trained weights, and the second forward pass of checkpointing."""
    length = wish.length + (wish.num_virtual_tokens if wish.method == "prompt" else 0)
    attended = length if wish.attention == "eager" else length / 2  # eager computes what the causal mask hides, too
    attended += wish.num_virtual_tokens if wish.method == "prefix" else 0
    forward = shape.forward_operations(attended)
    inputs = forward + shape.attention_operations(attended)
    touched = {"full": shape.multiplied_parameters, "lora": trainable}.get(wish.method, 0)  # nothing multiplies a soft prompt
    once = forward + inputs + 2.0 * touched + (forward if wish.gradient_checkpointing else 0.0)
    return once * length / wish.length


def _traffic(shape: ModelShape, wish: TrainingWish, num: int, trainable: int) -> float:
    """Bytes that each GPU sends in a step; hidden behind arithmetic as far as that lasts."""
    size, ring = wish.bytes_per_value, (num - 1) / num
    reduce = trainable * size * (2 if wish.zero_stage < 2 else 1)
    if wish.zero_stage == 3:
        gathered = shape.parameters.total * size * (3 if wish.gradient_checkpointing else 2)
        return ring * wish.accumulation * (gathered + reduce)
    passes = wish.accumulation if wish.zero_stage == 2 else 1  # ZeRO-2 keeps no whole gradient, so it reduces after every pass
    update = trainable * size if wish.zero_stage else 0.0
    return ring * (passes * reduce + update)


def _offloading(shape: ModelShape, wish: TrainingWish, num: int, trainable: int, assumptions: Assumptions) -> float:
    """Seconds per step, not hidden: gradients down, the host's AdamW, weights up."""
    if wish.offload == "none":
        return 0.0
    mine = trainable / num
    moved = 2 * mine * wish.bytes_per_value
    if wish.offload == "parameters":
        moved += wish.accumulation * 2 * shape.parameters.total / num * wish.bytes_per_value
    return moved / (assumptions.pcie_gbs * 1e9) + mine * 28 / (assumptions.host_adam_gbs * 1e9)


def relaxed(wish: TrainingWish) -> list[TrainingWish]:
    """What to try when nothing fits, mildest first: checkpointing, ZeRO-3, single dialogues, offloading."""
    steps: list[dict[str, object]] = [
        {"gradient_checkpointing": True},
        {"zero_stage": 3},
        {"micro_batch_size": 1},
        {"offload": "optimizer"},
    ]
    if wish.method == "prefix":  # it can be neither computed twice nor split
        steps = [step for step in steps if not {"gradient_checkpointing", "zero_stage"} & step.keys()]
    if wish.tensor * wish.pipeline > 1:  # ZeRO-3 would split the same weights, and offloading was not tried
        steps = [step for step in steps if not {"zero_stage", "offload"} & step.keys()]
    wishes, current = [], wish
    for step in steps:
        changed = _changed(current, step)
        if changed != current:
            wishes.append(changed)
            current = changed
    return wishes


def _changed(wish: TrainingWish, changes: dict[str, object]) -> TrainingWish:
    """A validated copy."""
    return TrainingWish.model_validate({**wish.model_dump(), **changes})
