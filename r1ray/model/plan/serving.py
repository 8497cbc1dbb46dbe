"""Serving on paper: how a model lies over GPUs, how many requests its cache holds, how fast it answers.

A replica is `stages` groups of `tensor_parallel` GPUs. Inside a group the heads are split, so the degree must divide the heads and
the KV heads; MLA's latent belongs to all heads, so every GPU of a group keeps the whole of it. Between the groups the layers are
split. Times come from bandwidth and arithmetic, whichever is longer, times the efficiencies of gpus.yaml. Asks no cluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self

from pydantic import Field, model_validator

from r1ray.config import Config
from r1ray.errors import ClusterTooSmall, InvalidValue
from r1ray.model.plan.hardware import GIB, Assumptions, Pool
from r1ray.model.plan.shape import ModelShape

__all__ = ["Layout", "Replica", "ServingWish", "choose", "layouts", "plan_replica"]

MOST_STREAMS = 512  # engine.num_slots ends there
IDLE_FACTOR = 4  # an idle engine reads so many pieces of a prompt in one step (r1ray/engine/scheduler.py)
BLOCK = 32  # positions of a KV block

Precision = Literal["auto", "bfloat16", "fp8", "int8", "int4"]
WEIGHT_BYTES = {"bfloat16": 2.0, "fp8": 1 + 4 / 128**2, "int8": 1 + 2 / 64, "int4": 0.5 + 2 / 64}


class ServingWish(Config):
    """What is to be served and how good it has to be."""

    context: int = Field(default=4096, ge=2, description="Prompt and answer of one request, in tokens.")
    prompt: int = Field(default=1024, ge=1, description="Tokens of a prompt, for the time to the first token.")
    streams: int = Field(default=8, ge=1, description="Requests that one replica must be able to run together.")
    weights: Precision = Field(default="auto", description="Stored precision; auto keeps the model's own where the GPU computes in it.")
    cache: Literal["bfloat16", "fp8"] = Field(default="bfloat16", description="Precision of the KV cache.")
    tpot_ms: float = Field(default=100.0, gt=0, description="Longest acceptable time between two tokens of a stream.")
    prefill_chunk: int = Field(default=1024, ge=1, description="Prompt tokens computed per step beside the running streams.")
    tensor_parallel: int | None = Field(default=None, ge=1, description="Fixed degree; null: chosen.")
    stages: int | None = Field(default=None, ge=1, description="Fixed number of stages; null: chosen.")
    memory_share: float = Field(default=0.9, gt=0, le=1, description="Share of a GPU's memory that the engine may take.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.prompt >= self.context:
            raise ValueError(f"prompt {self.prompt} leaves no room for an answer in context {self.context}; raise context")
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """`layers[i]` is the number of decoder layers of stage i."""

    tensor_parallel: int
    layers: tuple[int, ...]

    @property
    def stages(self) -> int:
        return len(self.layers)

    @property
    def num_gpus(self) -> int:
        return self.tensor_parallel * self.stages


@dataclass(frozen=True, slots=True)
class _Stage:
    """Per GPU of the group: what it stores, what a token costs there."""

    num_layers: int
    num_moe_layers: int
    stored: float
    always_read: float
    expert_bytes: float
    kv_per_token: float
    operations: float
    """Per token, without attention."""


@dataclass(frozen=True)
class Replica:
    """One model over one layout of GPUs."""

    shape: ModelShape
    pool: Pool
    layout: Layout
    wish: ServingWish
    assumptions: Assumptions

    @cached_property
    def precision(self) -> str:
        """What `auto` means here."""
        if self.wish.weights != "auto":
            return self.wish.weights
        return "fp8" if self.shape.stored_bytes < 2 and self.pool.gpu.fp8_tflops else "bfloat16"

    @property
    def cache_bytes(self) -> int:
        return 2 if self.wish.cache == "bfloat16" else 1

    @cached_property
    def stages(self) -> tuple[_Stage, ...]:
        starts = [sum(self.layout.layers[:number]) for number in range(self.layout.stages)]
        return tuple(self._stage(start, start + num) for start, num in zip(starts, self.layout.layers, strict=True))

    def _stage(self, first: int, end: int) -> _Stage:
        shape, split = self.shape, self.layout.tensor_parallel
        per_weight = WEIGHT_BYTES[self.precision]
        layers = range(first, end)
        weights = sum(shape.layer_parameters(layer) for layer in layers)
        num_moe = max(0, end - max(first, shape.num_dense_layers)) if shape.num_experts else 0
        experts = num_moe * shape.num_experts * shape.expert_parameters
        active = sum(shape.active_layer_parameters(layer) for layer in layers)
        matrix = shape.vocab * shape.hidden
        last = end == shape.num_layers
        # Embedding and head stay in bfloat16; tied ones are needed at both ends of a pipeline.
        lookup = matrix if first == 0 else 0
        head = matrix if last and not (shape.tied and first == 0) else 0
        whole = len(layers) * self._unsplit
        stored = ((weights - whole) * per_weight + 2 * (lookup + head)) / split + whole * per_weight
        return _Stage(
            num_layers=len(layers),
            num_moe_layers=num_moe,
            stored=stored,
            always_read=((weights - experts) * per_weight + (2 * matrix if last else 0)) / split,
            expert_bytes=experts * per_weight / split,
            kv_per_token=len(layers) * shape.cached_values * self.cache_bytes / (1 if shape.latent else split),
            operations=2.0 * (active + (matrix if last else 0)) / split,
        )

    @property
    def _unsplit(self) -> int:
        """Weights of a layer that every GPU of a group has: MLA's projections into the latent."""
        latent = self.shape.latent
        return self.shape.hidden * (latent.kv_rank + latent.rope_dim + (latent.query_rank or 0)) if latent else 0

    @cached_property
    def weight_bytes(self) -> float:
        """On the fullest GPU."""
        return max(stage.stored for stage in self.stages)

    @cached_property
    def free_bytes(self) -> tuple[float, ...]:
        """For the cache, per stage; negative where the weights alone are too much."""
        gpu, shape = self.pool.gpu, self.shape
        width = max(shape.intermediate, shape.expert_intermediate * shape.experts_per_token) / self.layout.tensor_parallel
        temporary = IDLE_FACTOR * self.wish.prefill_chunk * 2 * (6 * shape.hidden + 3 * width)
        taken = gpu.overhead_gib * GIB + temporary
        return tuple(gpu.memory_gib * GIB * self.wish.memory_share - taken - stage.stored for stage in self.stages)

    @cached_property
    def cache_tokens(self) -> int:
        """Tokens that fit into the KV cache, whole blocks; the poorest stage decides."""
        room = min(free / stage.kv_per_token for free, stage in zip(self.free_bytes, self.stages, strict=True))
        return max(0, int(room // BLOCK) * BLOCK)

    @property
    def num_requests(self) -> int:
        """Of `context` tokens each, at the same time."""
        return self.cache_tokens // (-(-self.wish.context // BLOCK) * BLOCK)

    @property
    def fits(self) -> bool:
        return self.num_requests >= self.wish.streams

    # --- time --------------------------------------------------------------------------------------------------------------------

    @property
    def _arithmetic(self) -> float:
        """Operations per second that large products reach."""
        gpu = self.pool.gpu
        peak = gpu.fp8_tflops if self.precision == "fp8" and gpu.fp8_tflops else gpu.bf16_tflops
        return peak * 1e12 * self.assumptions.prefill_efficiency

    @property
    def _bandwidth(self) -> float:
        return self.pool.gpu.bandwidth_gbs * 1e9 * self.assumptions.bandwidth_efficiency

    def _exchange(self, stage: _Stage, num_tokens: float) -> float:
        """Seconds of the group's all-reduces, two per layer."""
        split = self.layout.tensor_parallel
        if split == 1:
            return 0.0
        moved = 2 * (split - 1) / split * num_tokens * self.shape.hidden * 2
        return 2 * stage.num_layers * (self.assumptions.all_reduce_us * 1e-6 + moved / (self.pool.gpu.link_gbs * 1e9))

    def _stage_s(self, stage: _Stage, tokens: float, context_tokens: float) -> float:
        """One pass of `tokens` new tokens that attend to `context_tokens` earlier ones in total."""
        touched = 1 - (1 - self.shape.experts_per_token / self.shape.num_experts) ** tokens if self.shape.num_experts else 0.0
        read = stage.always_read + touched * stage.expert_bytes + context_tokens * stage.kv_per_token
        share = stage.num_layers / self.shape.num_layers / self.layout.tensor_parallel
        operations = tokens * stage.operations + share * self.shape.attention_operations(context_tokens, absorbed=True)
        return max(read / self._bandwidth, operations / self._arithmetic) + self._routing(stage) + self._exchange(stage, tokens)

    def _routing(self, stage: _Stage) -> float:
        return stage.num_moe_layers * self.assumptions.expert_layer_us * 1e-6

    def seconds(self, prefill_tokens: float, rows: float, context_tokens: float) -> float:
        """One engine step, as the simulator asks for it: everybody's next token and a piece of a prompt.

        The step is cut into as many micro-batches as there are stages, so that all of them work.
        """
        tokens = prefill_tokens + rows
        flights = max(1.0, min(self.layout.stages, tokens))
        times = [self._stage_s(stage, tokens / flights, context_tokens / flights) for stage in self.stages]
        hops = (self.layout.stages - 1) * self.assumptions.hop_us * 1e-6
        return max(sum(times) + hops, flights * max(times)) + self.assumptions.step_us * 1e-6

    def decode_s(self, streams: int, context: float) -> float:
        """Seconds between two tokens of each of `streams` streams with `context` tokens behind them."""
        return self.seconds(0, streams, streams * context)

    def decode_rate(self, streams: int, context: float) -> float:
        """Tokens per second of all streams of one replica."""
        return streams / self.decode_s(streams, context)

    def prefill_s(self, num_tokens: int) -> float:
        """Time to the first token on an idle replica: the prompt passes the stages one after the other."""
        attention = self.shape.attention_operations(num_tokens / 2) * num_tokens / self.layout.tensor_parallel
        total = 0.0
        for stage in self.stages:
            operations = num_tokens * stage.operations + attention * stage.num_layers / self.shape.num_layers
            read = stage.always_read + stage.expert_bytes
            total += max(operations / self._arithmetic, read / self._bandwidth) + self._routing(stage) + self._exchange(stage, num_tokens)
        return total + (self.layout.stages - 1) * self.assumptions.hop_us * 1e-6 + self.assumptions.step_us * 1e-6

    @cached_property
    def most_streams(self) -> int:
        """Streams at once that neither the cache nor `tpot_ms` forbids; at least one where one fits."""
        low, high = min(1, self.num_requests), min(MOST_STREAMS, self.num_requests)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.decode_s(middle, self.wish.context) <= self.wish.tpot_ms / 1000 else (low, middle - 1)
        return low

    # --- over the pool -----------------------------------------------------------------------------------------------------------

    @property
    def stages_per_node(self) -> int:
        return self.pool.per_node // self.layout.tensor_parallel

    @property
    def num_replicas(self) -> int:
        """How many of them the pool holds; a group of GPUs never crosses nodes."""
        full, rest = divmod(self.pool.num, self.pool.per_node)
        return (full * self.stages_per_node + rest // self.layout.tensor_parallel) // self.layout.stages

    @property
    def pool_rate(self) -> float:
        """Tokens per second of all replicas at `most_streams` of full context each."""
        return self.num_replicas * self.decode_rate(self.most_streams, self.wish.context) if self.most_streams else 0.0

    @property
    def strategy(self) -> Literal["PACK", "STRICT_SPREAD"]:
        """STRICT_SPREAD where every stage takes a node of its own."""
        return "STRICT_SPREAD" if self.layout.stages > 1 and self.stages_per_node == 1 else "PACK"

    def bundles(self) -> list[dict[str, float]]:
        """Ray's placement group: one per stage, the first with the replica's own process in it."""
        size = self.layout.tensor_parallel
        return [{"CPU": float(size + (number == 0)), "GPU": float(size)} for number in range(self.layout.stages)]


def plan_replica(shape: ModelShape, pool: Pool, wish: ServingWish, assumptions: Assumptions, degrees: tuple[int, int]) -> Replica:
    """The replica of (tensor_parallel, stages), which must be possible for the shape."""
    layout = Layout(tensor_parallel=degrees[0], layers=_balanced(shape, degrees[1]))
    return Replica(shape, pool, layout, wish, assumptions)


def layouts(shape: ModelShape, pool: Pool, wish: ServingWish, assumptions: Assumptions) -> list[Replica]:
    """Every layout whose weights and `streams` requests fit, best first: within `tpot_ms`, then tokens per second of the whole pool."""
    found = [plan_replica(shape, pool, wish, assumptions, degrees) for degrees in _degrees(shape, pool, wish)]
    return sorted((replica for replica in found if replica.fits and replica.num_replicas), key=_merit)


def choose(shape: ModelShape, pool: Pool, wish: ServingWish, assumptions: Assumptions) -> Replica:
    """The best of `layouts`.

    Raises:
        InvalidValue: a context beyond the model's, or degrees that do not divide it.
        ClusterTooSmall: no layout holds the model and its requests; says how much is missing.
    """
    if wish.context > shape.max_context:
        raise InvalidValue(f"context {wish.context} is beyond the model's {shape.max_context} tokens. Lower --context.")
    degrees = list(_degrees(shape, pool, wish))
    if not degrees:
        heads = f"{shape.num_heads} heads" + ("" if shape.latent else f", {shape.num_kv_heads} KV heads")
        raise InvalidValue(
            f"No layout: tensor_parallel {wish.tensor_parallel or 'any'} x {wish.stages or 'any'} stages on {pool.num} GPUs, "
            f"{pool.per_node} per node. The degree must divide {heads} and lie in a node; {shape.num_layers} layers are the most stages."
        )
    if fitting := layouts(shape, pool, wish, assumptions):
        return fitting[0]
    raise ClusterTooSmall(_shortage(shape, pool, wish, assumptions, degrees))


def _shortage(shape: ModelShape, pool: Pool, wish: ServingWish, assumptions: Assumptions, degrees: list[tuple[int, int]]) -> str:
    roomiest = max((plan_replica(shape, pool, wish, assumptions, each) for each in degrees), key=lambda replica: replica.num_requests)
    total = sum(stage.stored for stage in roomiest.stages) * roomiest.layout.tensor_parallel / GIB
    held = f"its cache then holds {roomiest.num_requests} requests" if roomiest.cache_tokens else "nothing is left for the cache"
    return (
        f"{wish.streams} requests of {wish.context} tokens do not fit on {pool.num} x {pool.name} ({pool.gpu.memory_gib:g} GiB each): the "
        f"weights in {roomiest.precision} take {total:.0f} GiB; {held}. Add GPUs, lower --context or --streams, or set --weights int4."
    )


def _merit(replica: Replica) -> tuple[bool, float, float]:
    late = replica.decode_s(max(1, replica.most_streams), replica.wish.context) > replica.wish.tpot_ms / 1000
    return late, -round(replica.pool_rate, 3), replica.prefill_s(replica.wish.prompt)


def _degrees(shape: ModelShape, pool: Pool, wish: ServingWish) -> Iterator[tuple[int, int]]:
    for split in range(1, min(pool.per_node, shape.num_heads) + 1):
        if wish.tensor_parallel not in (None, split) or not _divides(split, shape):
            continue
        full, rest = divmod(pool.num, pool.per_node)
        groups = full * (pool.per_node // split) + rest // split
        for stages in range(1, min(groups, shape.num_layers) + 1):
            if wish.stages in (None, stages):
                yield split, stages


def _divides(split: int, shape: ModelShape) -> bool:
    heads = shape.num_heads % split == 0 and (shape.latent is not None or shape.num_kv_heads % split == 0)
    experts = not shape.num_experts or shape.num_experts % split == 0
    return heads and experts and shape.intermediate % split == 0


def _balanced(shape: ModelShape, stages: int) -> tuple[int, ...]:
    """Consecutive layers per stage, each stage near its share of the weights and none empty."""
    ends, total = [0], shape.parameters.total
    passed = float(shape.vocab * shape.hidden)
    for layer in range(shape.num_layers):
        stage, left = len(ends), shape.num_layers - layer
        middle = passed + shape.layer_parameters(layer) / 2
        passed += shape.layer_parameters(layer)
        must = left == stages - stage  # one layer for each stage that is still to come
        if stage < stages and layer > ends[-1] and (must or middle >= total * stage / stages):
            ends.append(layer)
    return tuple(end - start for start, end in zip(ends, [*ends[1:], shape.num_layers], strict=True))
