"""`serve run serve_config.yaml`: from AppArgs to a Serve application. Composition only.

Router (FastAPI) -> Retrieval (unary)
                 -> ModelReplica, one deployment per model (streaming)
"""

import math
import os
from typing import Any

from ray import serve
from ray.serve import Application

from r1ray.serve.catalog import Entry, look_up
from r1ray.serve.config import AppArgs, ModelArgs
from r1ray.serve.preflight import preflight
from r1ray.serve.replica import ModelReplica
from r1ray.serve.retriever import Retrieval
from r1ray.serve.router import Router

# No `from __future__ import annotations` here: Serve reads build's annotation as a class to turn `args:` into AppArgs.

__all__ = ["build", "preflight"]

HEALTH = {"health_check_period_s": 2, "health_check_timeout_s": 30}


def build(args: AppArgs) -> Application:
    """The application.

    Raises:
        RegistryError, TemplateMismatch, CollectionNotFound: as catalog.look_up, before anything is deployed.
    """
    entries = look_up(args.models)
    models = {model.id: _model(model) for model in args.models}
    collections = {id_: entry.collection for id_, entry in entries.items() if entry.collection}
    longest_s = max(model.drain_timeout_s for model in args.models)  # every stream of every model goes through it
    router = serve.deployment(serve.ingress()(Router)).options(
        name="Router", graceful_shutdown_timeout_s=longest_s, **_front_options(args.router.num_replicas, args.router.num_cpus)
    )
    return router.bind(args, {id_: entry.card for id_, entry in entries.items()}, collections, models, _retrieval(args, entries))


def _retrieval(args: AppArgs, entries: dict[str, Entry]) -> Application | None:
    collections = sorted({entry.collection for entry in entries.values() if entry.collection})
    if not collections:
        return None
    options = _front_options(args.retrieval.num_replicas, args.retrieval.num_cpus)
    return serve.deployment(Retrieval).options(**options).bind(collections)


def _front_options(num_replicas: int, num_cpus: float) -> dict[str, Any]:
    """Router and Retrieval wait more than they compute, so they take many requests at once."""
    return {"num_replicas": num_replicas, "max_ongoing_requests": 1000, "ray_actor_options": _actor(num_cpus=num_cpus), **HEALTH}


def _model(args: ModelArgs) -> Application:
    return serve.deployment(ModelReplica).options(name=deployment_name(args.id), **_model_options(args)).bind(args)


def deployment_name(model_id: str) -> str:
    """The name of a model's deployment in Serve's dashboard and status."""
    return f"ModelReplica-{model_id.replace('/', '--')}"


def _model_options(args: ModelArgs) -> dict[str, Any]:
    place = args.placement
    actor = _actor(num_cpus=place.num_cpus, num_gpus=place.num_gpus, resources=dict(place.resources))
    options: dict[str, Any] = {
        # the engine admits exactly and says so; Serve's own limit only has to lie above it
        "max_ongoing_requests": 2 * (args.engine.num_slots + args.engine.max_waiting),
        "autoscaling_config": _autoscaling(args),
        "max_surge_percent": args.max_surge_percent,
        "graceful_shutdown_timeout_s": args.drain_timeout_s,
        "graceful_shutdown_wait_loop_s": 0.2,
        **HEALTH,
    }
    bundles = args.replica_bundles
    if place.bundles or len(bundles) > 1 or args.engine.tensor_parallel > 1:
        options["placement_group_bundles"] = bundles
        options["placement_group_strategy"] = place.strategy
        if place.labels:
            options["placement_group_bundle_label_selector"] = [dict(place.labels) for _ in bundles]
    elif place.labels:
        actor["label_selector"] = dict(place.labels)
    return options | {"ray_actor_options": actor}


def _autoscaling(args: ModelArgs) -> dict[str, Any]:
    scale = args.autoscaling
    return {
        "min_replicas": scale.min_replicas,
        "max_replicas": scale.max_replicas,
        "initial_replicas": max(1, scale.min_replicas),
        "target_ongoing_requests": max(1, math.floor(args.engine.num_slots * scale.target_per_slot)),
        "upscale_delay_s": scale.upscale_delay_s,
        "downscale_delay_s": scale.downscale_delay_s,
        # Serve averages over this window; a longer one than the delay would hide the load from it
        "look_back_period_s": max(1.0, min(30.0, scale.upscale_delay_s)),
    }


def _actor(**resources: Any) -> dict[str, Any]:
    """Actor options; replicas see the same R1RAY_* settings as the process that builds the application."""
    settings = {key: value for key, value in os.environ.items() if key.startswith("R1RAY_")}
    wanted = {key: value for key, value in resources.items() if value or key == "num_cpus"}
    return wanted | ({"runtime_env": {"env_vars": settings}} if settings else {})
