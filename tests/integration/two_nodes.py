"""Train and serve on a cluster of two raylets; run by test_two_nodes.py in a process of its own, since the session has a cluster.

Prints one JSON object: on which nodes the training workers and the serving replicas ran, the version, the answer.
Usage: python two_nodes.py MODEL_DIRECTORY SERVE_PORT DASHBOARD_PORT
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

from r1ray.environment import prepare_environment

prepare_environment()

from ray.cluster_utils import Cluster  # noqa: E402

from r1ray.model.importer import import_model  # noqa: E402
from r1ray.registry import Registry  # noqa: E402
from r1ray.settings import Settings  # noqa: E402

ROWS = [{"text": f"my card number {n} is lost", "label": "card_lost"} for n in range(24)]


def train(settings: Settings, data: Path) -> tuple[str, set[str]]:
    """Two workers of one CPU where each node has one CPU to give: one worker per node."""
    from ray.util.state import list_actors

    from r1ray.train.config import FinetuneConfig
    from r1ray.train.launcher import finetune

    shape = {"num_workers": 2, "max_steps": 3, "batch_size": 4, "micro_batch_size": 2, "dtype": "float32", "cpus_per_worker": 1.5}
    config = FinetuneConfig.model_validate({"name": "two-nodes", "base": "tiny", "data": {"path": str(data)}, "train": shape})
    artifact = finetune(config, settings)
    workers = list_actors(filters=[("class_name", "=", "RayTrainWorker")], detail=True, limit=100)
    return artifact.ref, {worker.node_id for worker in workers}


def serve(port: int) -> tuple[dict[str, Any], set[str]]:
    """Two replicas that want 1.5 CPUs each."""
    from ray import serve as ray_serve

    from r1ray.serve.app import build
    from r1ray.serve.config import AppArgs

    model = {
        "id": "two-nodes",
        "ref": "two-nodes@production",
        "engine": {"type": "torch", "num_slots": 2, "num_threads": 1},
        "autoscaling": {"min_replicas": 2, "max_replicas": 2},
        "placement": {"num_cpus": 1.5},
    }
    ray_serve.start(http_options={"host": "127.0.0.1", "port": port})
    ray_serve.run(build(AppArgs.model_validate({"models": [model]})), name="r1ray", route_prefix="/")
    body = {"model": "two-nodes", "messages": [{"role": "user", "content": "my card is lost"}], "max_tokens": 4}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer = json.load(response)
    return answer, replica_nodes()


def replica_nodes() -> set[str]:
    from ray.util.state import list_actors

    actors = list_actors(filters=[("state", "=", "ALIVE")], detail=True, limit=200)
    return {actor.node_id for actor in actors if "ModelReplica" in actor.class_name}


def main(model: Path, port: int, dashboard_port: int) -> None:
    settings = Settings()
    settings.home.mkdir(parents=True, exist_ok=True)
    data = settings.home / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    registry = Registry(settings)
    import_model(str(model), name="tiny", registry=registry)
    import os

    import ray

    dashboard = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": dashboard_port}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, **dashboard})
    try:
        nodes.add_node(num_cpus=2)
        os.environ["RAY_ADDRESS"] = nodes.address
        ray.init(address=nodes.address, log_to_driver=False)
        version, train_nodes = train(settings, data)
        registry.promote(version)
        answer, serve_nodes = serve(port)
        found = {"version": version, "train_nodes": len(train_nodes), "serve_nodes": len(serve_nodes), "answer": answer}
        print("FOUND " + json.dumps(found), flush=True)
        from ray import serve as ray_serve

        ray_serve.shutdown()
    finally:
        ray.shutdown()
        nodes.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
