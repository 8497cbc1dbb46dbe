"""Trainings in torch.distributed processes without Ray; run by test_universal.py, once per rank and world size.

Each RUN:STAGE:STOP resumes a run in HOME from its last checkpoint, whatever number of workers wrote it, trains until
step `stop`, and leaves a checkpoint. Rank 0 prints the losses of each as one JSON line.
Usage: python worlds.py HOME RANK WORLD PORT RUN:STAGE:STOP[:KEY=VALUE...]...
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from r1ray.train.progress import curve

warnings.filterwarnings("ignore")
NUM_STEPS = 6


def main(home: Path, rank: int, world: int, port: str, items: list[str]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "R1RAY_HOME": str(home), "OMP_NUM_THREADS": "1"}
    from r1ray.environment import disable_deepspeed_shm, worker_environment

    os.environ |= worker_environment(threads=1, use_gpu=False)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    disable_deepspeed_shm()
    for item in items:
        run, stage, stop, *more = item.split(":")
        wanted = [f"zero_stage={stage}", f"num_workers={world}", f"checkpoint_every_steps={stop}", *more]
        losses = train(home, rank, world, f"{run}-{stage}", wanted)
        if rank == 0:
            print("LOSSES " + json.dumps([f"{run}-{stage}", losses]), flush=True)
    torch.distributed.destroy_process_group()


def train(home: Path, rank: int, world: int, name: str, wanted: list[str]) -> list[float]:
    from r1ray.config import load_config
    from r1ray.registry import Registry
    from r1ray.settings import Settings
    from r1ray.train.config import FinetuneConfig
    from r1ray.train.objective import objective_of
    from r1ray.train.order import resolve_order
    from r1ray.train.worker import Attempt

    shape = {"method": "full", "dtype": "float32", "batch_size": 4, "micro_batch_size": 1, "learning_rate": 5e-3, "max_steps": NUM_STEPS}
    overrides = ["base=tiny", f"data.path={home / 'rows.jsonl'}", *(f"train.{key}={value}" for key, value in shape.items())]
    config = load_config(FinetuneConfig, None, [*overrides, *(f"train.{setting}" for setting in wanted)])
    settings = Settings()
    base = Registry(settings).resolve("tiny")
    objective = objective_of("sft")
    material = objective.prepare(objective.read(config), base, config, settings)
    directory = settings.checkpoints / name
    directory.mkdir(parents=True, exist_ok=True)
    order = resolve_order(config.train, base, material, directory, settings, lambda _: None)
    reporter = UntilStep(config.train.checkpoint_every_steps)
    with contextlib.suppress(Stop):
        Attempt(order, rank=rank, world=world, reporter=reporter).run()
    return [step.loss for step in curve(directory)]


class Stop(BaseException):
    """The power is cut right after a checkpoint."""


class UntilStep:
    """Publishes checkpoints as Ray Train would, and ends the training after the one of step `stop`."""

    def __init__(self, stop: int | None) -> None:
        self.stop = stop

    def report(self, metrics: dict[str, float]) -> None:
        pass

    def save(self, metrics: dict[str, float], source: Path, destination: Path, publish: Callable[[Path], None]) -> None:
        publish(source)
        torch.distributed.barrier()
        if metrics["step"] == self.stop != NUM_STEPS:
            raise Stop

    def is_leaving(self) -> bool:
        return False


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:])
