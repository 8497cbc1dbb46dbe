"""One training on a cluster that changes; run by test_elastic.py in a process of its own, since the session has a cluster.

grow-and-shrink: a node joins, later it dies without a word. drain: a node of two announces that it will go, and goes.
Prints one JSON object: the versions made, the curve's lines, the steps of the checkpoints with the number of workers that wrote them.
Usage: python elastic.py MODEL_DIRECTORY SCENARIO
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from r1ray.environment import prepare_environment

# Ray reads these as they are spelt: a dead node is noticed within seconds
os.environ["RAY_health_check_failure_threshold"] = "2"  # noqa: SIM112
os.environ["RAY_health_check_period_ms"] = "1000"  # noqa: SIM112
os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "1"
prepare_environment()

from ray.cluster_utils import Cluster  # noqa: E402

from r1ray.model.importer import import_model  # noqa: E402
from r1ray.registry import Registry  # noqa: E402
from r1ray.settings import Settings  # noqa: E402
from r1ray.train import checkpoint  # noqa: E402
from r1ray.train.progress import FILE  # noqa: E402

SHAPE = {"num_workers": [1, 2], "dtype": "float32", "batch_size": 32, "micro_batch_size": 8, "learning_rate": 1e-3, "num_epochs": 9}
SAVING = {"checkpoint_every_steps": 4, "checkpoint_every_seconds": None, "num_checkpoints": 100, "threads_per_worker": 1, "max_failures": 1}


class Witness:
    """Reads the run's directory, as anybody could."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def directory(self) -> Path | None:
        return next(iter(self.settings.checkpoints.glob("elastic-*")), None)

    def saved(self) -> list[tuple[int, int]]:
        """(step, number of workers) of each whole checkpoint, in the order of writing."""
        if self.directory is None:
            return []
        metas = []
        for path in sorted(checkpoint.found(self.directory), key=lambda path: path.name.rpartition("_")[2]):
            try:
                meta = checkpoint.read(path)
            except checkpoint.CheckpointCorrupt:
                continue  # being written
            metas.append((meta.step, meta.world_size))
        return metas

    def wait(self, what: str, seen: Callable[[], bool], timeout_s: float = 100) -> None:
        end = time.monotonic() + timeout_s
        while not seen():
            if time.monotonic() > end:
                raise AssertionError(f"{what}: not within {timeout_s} s; saved {self.saved()}")
            time.sleep(0.2)
        print(f"{time.monotonic():.1f} {what}; saved {self.saved()[-3:]}", file=sys.stderr, flush=True)


def grow_and_shrink(nodes: Cluster, witness: Witness) -> None:
    witness.wait("one worker trains", lambda: (4, 1) in witness.saved())
    second = nodes.add_node(num_cpus=1)
    witness.wait("two workers train", lambda: sum(world == 2 for _, world in witness.saved()) >= 2)
    nodes.remove_node(second, allow_graceful=False)


def drain(nodes: Cluster, witness: Witness) -> None:
    second = nodes.add_node(num_cpus=1)
    witness.wait("two workers train", lambda: (20, 2) in witness.saved())
    command = ["drain-node", "--address", nodes.address, "--node-id", second.node_id, "--deadline-remaining-seconds", "6"]
    why = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    subprocess.run([str(Path(sys.executable).with_name("ray")), *command, *why], check=True, capture_output=True)
    witness.wait("saved off the beat", lambda: any(step % 20 for step, _ in witness.saved()))
    time.sleep(6)
    nodes.remove_node(second, allow_graceful=False)


def processes_of(home: Path) -> list[tuple[psutil.Process, str]]:
    """Ray's processes that this one has started, by the home that they inherited, with what each says it is."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("R1RAY_HOME") == str(home):
                found.append((process, " ".join(process.cmdline())[:60]))
        except psutil.Error:
            continue  # gone, or somebody else's
    return found


def main(model: Path, scenario: Callable[[Cluster, Witness], None], more: dict[str, Any]) -> None:
    import ray

    from r1ray.train.config import FinetuneConfig
    from r1ray.train.launcher import finetune

    settings = Settings()
    settings.home.mkdir(parents=True, exist_ok=True)
    data = settings.home / "rows.jsonl"
    rows = [{"text": f"my card number {n} is lost " + "and so is the other one " * 8, "label": f"lost {n % 7}"} for n in range(640)]
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    import_model(str(model), name="tiny", registry=Registry(settings))
    config = FinetuneConfig.model_validate({"name": "elastic", "base": "tiny", "data": {"path": str(data)}, "train": SHAPE | SAVING | more})
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    witness = Witness(settings)
    made: list[str] = []
    training = threading.Thread(target=lambda: made.append(finetune(config, settings).ref))
    try:
        os.environ["RAY_ADDRESS"] = nodes.address
        ray.init(address=nodes.address, log_to_driver=True)
        training.start()
        scenario(nodes, witness)  # nodes are added from the main thread only
        training.join()
        assert witness.directory is not None
        lines = [json.loads(line) for line in (witness.directory / FILE).read_text().splitlines()]
        steps = [(line["step"], line["loss"]) for line in lines]
        told = {"made": made, "steps": steps, "saved": witness.saved()}
        print("FOUND " + json.dumps(told), flush=True)
    finally:
        ray.shutdown()
        # a raylet that ends while it ends an actor leaves that actor behind: let it finish first
        psutil.wait_procs([process for process, what in processes_of(settings.home) if "Train" in what], timeout=10)
        nodes.shutdown()
        time.sleep(1)
        for process, what in processes_of(settings.home):
            print(f"{what} ({process.pid}) outlived its node", file=sys.stderr)
            process.kill()


if __name__ == "__main__":
    if sys.argv[2] == "drain":
        main(Path(sys.argv[1]), drain, {"max_steps": 180, "max_failures": 0, "checkpoint_every_steps": 20})
    else:
        main(Path(sys.argv[1]), grow_and_shrink, {"max_steps": 120})
