"""A training on two nodes of which the second has an empty directory where the first has its checkpoints; run by test_homes.py.

The second raylet runs in a mount namespace of its own, as on another machine. Prints one JSON object: the error, seconds until it came.
Usage: python homes.py MODEL_DIRECTORY
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from r1ray.environment import prepare_environment

prepare_environment()

import ray  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from r1ray.errors import R1RayError  # noqa: E402
from r1ray.model.importer import import_model  # noqa: E402
from r1ray.registry import Registry  # noqa: E402
from r1ray.settings import Settings  # noqa: E402


def other_machine(address: str, hidden: Path) -> subprocess.Popen[bytes]:
    """A raylet of one CPU that sees nothing of `hidden`."""
    start = f"mount -t tmpfs tmpfs {hidden} && exec {Path(sys.executable).with_name('ray')} start --address={address} --num-cpus=1 --block"
    return subprocess.Popen(["unshare", "--mount", "bash", "-c", start], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main(model: Path) -> None:
    from r1ray.train.config import FinetuneConfig
    from r1ray.train.launcher import finetune

    settings = Settings()
    settings.checkpoints.mkdir(parents=True)
    data = settings.home / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"card {n} is lost", "label": "lost"}) for n in range(24)), encoding="utf-8")
    import_model(str(model), name="tiny", registry=Registry(settings))
    shape = {"num_workers": 2, "max_steps": 2, "batch_size": 4, "dtype": "float32", "max_failures": 2}
    config = FinetuneConfig.model_validate({"name": "apart", "base": "tiny", "data": {"path": str(data)}, "train": shape})
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    other = other_machine(nodes.address, settings.checkpoints)
    try:
        os.environ["RAY_ADDRESS"] = nodes.address
        ray.init(address=nodes.address, log_to_driver=False)
        while sum(node["Alive"] for node in ray.nodes()) < 2:
            assert other.poll() is None, "the second node did not start"
            time.sleep(0.2)
        began = time.monotonic()
        try:
            finetune(config, settings)
        except R1RayError as error:
            seconds = time.monotonic() - began
            print("FOUND " + json.dumps({"kind": type(error).__name__, "text": str(error), "seconds": seconds}), flush=True)
    finally:
        ray.shutdown()
        other.terminate()
        other.wait(30)
        nodes.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
