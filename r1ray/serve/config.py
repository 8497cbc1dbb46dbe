"""What a serving application is made of: models, retrieval, router. The `args` of serve_config.yaml.

Importable without ray and torch. Knows the shape and the limits, not how a deployment is built from them (deployments.py).
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from r1ray.config import Config
from r1ray.engine.config import EngineConfig

__all__ = ["AdapterArgs", "AppArgs", "AutoscalingArgs", "ModelArgs", "PlacementArgs", "RetrievalArgs", "RouterArgs"]


class AutoscalingArgs(Config):
    """How many replicas a model has. Load is measured in requests per engine slot, since slots are what a replica can run at once."""

    min_replicas: int = Field(default=1, ge=0, description="Replicas kept when idle; 0 frees everything and pays a cold start.")
    max_replicas: int = Field(default=1, ge=1, description="Replicas at full load; equal to min_replicas is a fixed number.")
    target_per_slot: float = Field(default=0.75, gt=0, le=4, description="Running and queued requests per engine slot that adds a replica.")
    upscale_delay_s: float = Field(default=5.0, ge=0, description="Load must stay above the target this long before a replica is added.")
    downscale_delay_s: float = Field(default=300.0, ge=0, description="Idle shrink: load must stay below this long before one is removed.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}; raise max_replicas")
        return self


class PlacementArgs(Config):
    """Where a replica may run and what it reserves. CPUs are Ray's book-keeping: 0.5 does not slow an engine on an idle node."""

    num_cpus: float = Field(default=0.5, ge=0, description="Logical CPUs reserved per replica.")
    num_gpus: float = Field(default=0.0, ge=0, description="GPUs reserved per replica; a fraction shares one.")
    resources: dict[str, float] = Field(default_factory=dict, description="Custom resources of cluster.yaml, name -> amount.")
    labels: dict[str, str] = Field(default_factory=dict, description="Node labels the replica needs, e.g. r1ray.io/role: serve.")
    bundles: tuple[dict[str, float], ...] = Field(default=(), description="Placement group: bundle 0 is the replica, the rest its stages.")
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(default="PACK", description="How bundles share nodes.")


class AdapterArgs(Config):
    """A LoRA adapter that answers to a model id of its own, in the same batch as its base and the other adapters."""

    id: str = Field(min_length=1, pattern=r"^[^#]+$", description="The `model` of a request.")
    ref: str = Field(min_length=1, description="Registry reference of an adapter trained on the model's ref; an alias is followed.")
    collection: str | None = Field(default=None, description="Retrieval collection; the manifest's own when absent.")
    system_prompt: str | None = Field(default=None, description="Added when a request has none; the manifest's own when absent.")


class ModelArgs(Config):
    """One served model: which version of the registry, on which engine, grounded in which documents."""

    id: str = Field(min_length=1, pattern=r"^[^#]+$", description="The `model` of a request.")
    ref: str = Field(min_length=1, description="Registry reference; name@production follows the alias, name@3 stays.")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="How tokens are made.")
    collection: str | None = Field(default=None, description="Retrieval collection; the manifest's own when absent.")
    system_prompt: str | None = Field(default=None, description="Added when a request has none; the manifest's own when absent.")
    adapters: tuple[AdapterArgs, ...] = Field(default=(), description="Adapters of this very version, served beside it from one engine.")
    chat_template: str | None = Field(default=None, description="Chat template file; refused if it differs from the version's.")
    follow_interval_s: float = Field(default=10.0, gt=0, description="How often a replica asks the registry for a new version.")
    drain_timeout_s: float = Field(
        default=600.0,
        ge=0,
        description="Longest time that streams may take to end: of an old version after a switch, of a leaving replica.",
    )
    coalesce_ms: float = Field(default=15.0, ge=0, le=1000, description="Tokens that pile up within this time travel as one chunk.")
    autoscaling: AutoscalingArgs = Field(default_factory=AutoscalingArgs, description="Number of replicas.")
    placement: PlacementArgs = Field(default_factory=PlacementArgs, description="What each replica reserves, and where.")
    max_surge_percent: int = Field(default=0, ge=0, le=100, description="Extra replicas during an update; needs that much free capacity.")

    @model_validator(mode="after")
    def _a_bundle_per_stage(self) -> Self:
        num_bundles, num_actors = len(self.placement.bundles), len(self.engine.actor_bundles)
        if num_bundles and num_actors and num_bundles != 1 + num_actors:
            raise ValueError(
                f"placement.bundles has {num_bundles} bundles for engine.stages={self.engine.stages} of type {self.engine.type}; "
                f"give {1 + num_actors}, the replica's own first, or none"
            )
        return self

    @model_validator(mode="after")
    def _room_for_adapters(self) -> Self:
        engine, num = self.engine, len(self.adapters)
        if not num:
            return self
        if engine.type == "onnx" or (engine.type == "torch" and engine.stages * engine.tensor_parallel > 1):
            raise ValueError(
                f"adapters has {num} entries, and a split model or an ONNX export takes none beside its weights; "
                "serve each as a model of its own"
            )
        if engine.type == "vllm" and engine.vllm.max_adapters < num:
            raise ValueError(f"adapters has {num} entries; set engine.vllm.max_adapters to at least that, it is {engine.vllm.max_adapters}")
        return self

    @model_validator(mode="after")
    def _gpus_where_the_model_is(self) -> Self:
        if self.engine.type == "vllm" and self.placement.num_gpus:
            raise ValueError(
                f"placement.num_gpus={self.placement.num_gpus:g} are the replica's own, and vLLM computes in an actor beside it; "
                "set engine.stage_gpus and leave num_gpus 0"
            )
        own = self.placement.bundles[0].get("GPU", 0.0) if self.placement.bundles else self.placement.num_gpus
        is_split = self.engine.type == "torch" and self.engine.stages * self.engine.tensor_parallel > 1
        if is_split and bool(own) != bool(self.engine.stage_gpus):
            raise ValueError(
                f"engine.stage_gpus={self.engine.stage_gpus:g} and {own:g} GPUs of the replica itself, which computes the last stage: "
                "give each process of a split model one (stage_gpus=1, placement.num_gpus=1) or none"
            )
        return self

    @property
    def ids(self) -> tuple[str, ...]:
        """Its own and its adapters'."""
        return (self.id, *(adapter.id for adapter in self.adapters))

    @property
    def replica_bundles(self) -> list[dict[str, float]]:
        """What one replica reserves: bundle 0 is the replica and the actors of its own stage, the others those of further stages."""
        place = self.placement
        if place.bundles:
            return [dict(bundle) for bundle in place.bundles]
        beside = self.engine.own_bundle
        own = {"CPU": place.num_cpus + beside["CPU"], "GPU": place.num_gpus + beside["GPU"]}
        bundles = [{**bundle, **place.resources} for bundle in [own, *self.engine.actor_bundles]]
        return [{name: amount for name, amount in bundle.items() if amount} for bundle in bundles]


class RetrievalArgs(Config):
    """The deployment that finds passages; deployed only if some model has a collection."""

    top_k: int = Field(default=3, ge=1, le=20, description="Passages put before the question.")
    style: Literal["official", "compact"] = Field(default="official", description="DeepSeek's search prompt, or its marks alone.")
    include_text: bool = Field(default=False, description="Whether citations carry the passage's text besides id, source and heading.")
    num_replicas: int = Field(default=1, ge=1, description="Retrieval replicas.")
    num_cpus: float = Field(default=0.1, ge=0, description="Logical CPUs reserved per retrieval replica.")


class RouterArgs(Config):
    """The HTTP front: parses, grounds, streams, meters."""

    num_replicas: int = Field(default=1, ge=1, description="Router replicas.")
    num_cpus: float = Field(default=0.1, ge=0, description="Logical CPUs reserved per router.")
    max_choices: int = Field(default=8, ge=1, le=128, description="Most generations of one request: n times the prompts.")
    first_token_timeout_s: float = Field(default=300.0, gt=0, description="503 when a request has not started after this time.")
    request_timeout_s: float | None = Field(
        default=None,
        gt=0,
        description="A request ends with an error after this time, waiting or answering, or after its own `timeout`; keep it below "
        "http_options.request_timeout_s, at which Serve's proxy cuts without a word. null: no limit of ours.",
    )


class AppArgs(Config):
    """All of it."""

    models: tuple[ModelArgs, ...] = Field(min_length=1, description="The served models; a request's `model` picks one by id.")
    retrieval: RetrievalArgs = Field(default_factory=RetrievalArgs, description="Passages for models with a collection.")
    router: RouterArgs = Field(default_factory=RouterArgs, description="The HTTP front.")

    @model_validator(mode="after")
    def _unique(self) -> Self:
        ids = [id_ for model in self.models for id_ in model.ids]
        twice = sorted({id_ for id_ in ids if ids.count(id_) > 1})
        if twice:
            raise ValueError(f"model id {twice[0]!r} is given twice; every served model needs its own")
        return self
