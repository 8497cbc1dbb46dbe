"""The Router deployment: the FastAPI app of api.py over a ChatService whose backends are Serve handles."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from fastapi import FastAPI
from ray.serve.handle import DeploymentHandle

from r1ray.serve.api import create_api
from r1ray.serve.chat import Card, ChatService, Served
from r1ray.serve.config import AppArgs
from r1ray.serve.grounding import Grounding
from r1ray.serve.meter import LogSink, Meter, RaySink
from r1ray.serve.overview import Overview
from r1ray.serve.replica import HandleBackend
from r1ray.serve.retriever import HandleFinder

__all__ = ["Router"]


class Router:
    """Holds no model and calls none when it starts, so that it never wakes a sleeping one."""

    def __init__(
        self,
        args: AppArgs,
        cards: Mapping[str, Card],
        collections: Mapping[str, str],
        models: Mapping[str, DeploymentHandle],
        retrieval: DeploymentHandle | None = None,
    ) -> None:
        served, overview = {}, Overview()
        for model in args.models:
            backend = HandleBackend(models[model.id], overview, may_sleep=model.autoscaling.min_replicas == 0)
            for id_ in model.ids:
                served[id_] = Served(cards[id_], backend, collections.get(id_), adapter=None if id_ == model.id else id_)
        meter = Meter([LogSink(logging.getLogger("ray.serve")), RaySink()])
        grounding = Grounding(HandleFinder(retrieval), args.retrieval) if retrieval is not None else None
        self._service = ChatService(served, args, meter, grounding)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve asks for the app once the constructor has run."""
        return create_api(self._service, echo_request_id=False)
