"""The registry and runs against a real MLflow server: it refuses local paths as sources of versions, which SQLite does not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from r1ray.observe.client import client
from r1ray.observe.tracking import Run
from r1ray.registry import Registry, weights_sha256
from r1ray.settings import Settings
from r1ray.types import Manifest, SamplingPolicy, TemplateInfo

pytestmark = pytest.mark.slow


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    client(f"sqlite:///{tmp_path}/server.db")  # makes the tables faster than the server would
    store = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", str(tmp_path / "served")]
    command = [sys.executable, "-m", "mlflow", "server", *store, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=tmp_path, start_new_session=True)
    try:
        yield _wait(f"http://127.0.0.1:{port}", process, tmp_path / "log")
    finally:
        os.killpg(process.pid, 15)
        process.wait(timeout=20)


def _wait(uri: str, process: subprocess.Popen[bytes], log: Path) -> str:
    for _ in range(300):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=2).close()
        except OSError:
            time.sleep(0.2)
        else:
            return uri
    raise AssertionError(log.read_text())


def test_an_mlflow_server_keeps_runs_versions_and_aliases(server, tmp_path):
    settings = Settings(home=tmp_path / "home", registry=server)
    registry = Registry(settings)
    with Run("finetune", "served", settings=settings) as run:
        run.log_params({"train": {"epochs": 1}})
        run.log_metrics({"loss": 1.0}, step=1)
        run.log_dict({"a": 1}, "report.json")
        for number in range(2):
            with registry.staging("served") as staged:
                (staged / "model.safetensors").write_bytes(bytes([number]))
                manifest = Manifest(
                    name="served",
                    kind="full",
                    family="llama",
                    weights_sha256=weights_sha256(staged),
                    template=TemplateInfo(sha256="t"),
                    context_length=8,
                    num_parameters=1,
                    created_at="2026-01-01T00:00:00+00:00",
                )
                registry.register(staged, manifest, tags={"run_id": run.id})
    registry.promote("served@1")
    registry.promote("served@2")
    assert registry.rollback("served").ref == "served@1"
    registry.annotate("served@1", {"rouge_l": 0.5})
    assert registry.attach_policy("served@1", SamplingPolicy()).policy is not None
    assert [(info.version, info.aliases, dict(info.metrics)) for info in registry.versions("served")] == [
        (2, (), {}),
        (1, ("production",), {"rouge_l": 0.5}),
    ]
    assert [model.name for model in registry.models()] == ["served"]
    registry.promote("served@2")
    assert registry.keep("served", 1) == [1]
    assert registry.resolve("served").version == 2
