"""Every check that can be made before `serve run`: is the file right, the port free, the model there, the cluster big enough?

    python -m r1ray.serve.preflight serve_config.yaml

Serve itself would answer a taken port or a missing model with a deployment that is tried again and again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from r1ray import cluster
from r1ray.errors import InvalidValue, R1RayError
from r1ray.serve.catalog import look_up
from r1ray.serve.config import AppArgs, ModelArgs
from r1ray.settings import Settings

__all__ = ["bundles_of", "preflight", "read_app_args"]


def preflight(path: str | Path, *, settings: Settings | None = None, on: cluster.Cluster | None = None) -> AppArgs:
    """Checks the file at `path`; with `on`, also that the cluster can ever hold what it asks for.

    Raises:
        InvalidValue, PortInUse, RegistryError, TemplateMismatch, CollectionNotFound, ClusterTooSmall: what would fail later.
    """
    args, http = read_app_args(path)
    _check_times(args, http)
    cluster.check_port(str(http.get("host", "127.0.0.1")), int(http.get("port", 8000)))
    look_up(args.models, settings)
    if on is not None:
        for model in args.models:
            labels, strategy = model.placement.labels, model.placement.strategy
            cluster.check_placement(on, bundles_of(model), strategy=strategy, wanted_by=f"serving {model.id}", labels=labels)
    return args


def read_app_args(path: str | Path) -> tuple[AppArgs, Mapping[str, Any]]:
    """(args of the one application, http_options) of a Serve config file.

    Raises:
        InvalidValue: no file, no YAML, not exactly one application, or args that AppArgs refuses.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        (application,) = tree["applications"]
        return AppArgs.model_validate(application.get("args") or {}), tree.get("http_options") or {}
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise InvalidValue(f"{path}: args.{where}: {problem['msg']} (got {problem.get('input')!r}). Correct the value.") from error
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise InvalidValue(f"{path} is no Serve config with one application: {error!r}. Start from serve_config.yaml.") from error


def _check_times(args: AppArgs, http: Mapping[str, Any]) -> None:
    ours, proxys = args.router.request_timeout_s, http.get("request_timeout_s")
    if ours is not None and proxys is not None and ours >= float(proxys):
        raise InvalidValue(
            f"router.request_timeout_s={ours:g} is not below http_options.request_timeout_s={float(proxys):g}: Serve's proxy would cut "
            "answers before they end with an error object. Lower ours or raise the proxy's."
        )


def bundles_of(model: ModelArgs) -> list[dict[str, float]]:
    """What the least number of replicas of a model reserves."""
    return [bundle for _ in range(max(1, model.autoscaling.min_replicas)) for bundle in model.replica_bundles]


def main(argv: list[str]) -> int:
    """Exit code: 0 ready, 1 with the reason on stderr."""
    if len(argv) != 1:
        print("usage: python -m r1ray.serve.preflight serve_config.yaml", file=sys.stderr)
        return 2
    try:
        preflight(argv[0])
    except R1RayError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
