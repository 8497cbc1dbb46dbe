"""One Ray cluster for the whole session: starting one takes seconds, and two on a machine disturb each other."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from r1ray.environment import prepare_environment
from r1ray.settings import Settings


@dataclass(frozen=True)
class RayCluster:
    """What tests need to know about the session's cluster."""

    address: str
    dashboard_url: str
    settings: Settings


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    """A local cluster of four logical CPUs with its dashboard on loopback and an empty R1RAY_HOME."""
    home: Path = tmp_path_factory.mktemp("home")
    saved = dict(os.environ)
    os.environ.update(R1RAY_HOME=str(home), RAY_AUTH_MODE="disabled", RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S="2")
    os.environ.pop("RAY_ADDRESS", None)
    prepare_environment()
    import ray

    context = ray.init(
        "local", num_cpus=4, include_dashboard=True, dashboard_host="127.0.0.1", log_to_driver=True, object_store_memory=200 * 2**20
    )
    address = context.address_info["address"]
    # Train's clean-up actors look the cluster up by this variable.
    os.environ["RAY_ADDRESS"] = address
    try:
        yield RayCluster(address=address, dashboard_url=f"http://{context.dashboard_url}", settings=Settings())
    finally:
        ray.shutdown()
        os.environ.clear()
        os.environ.update(saved)
