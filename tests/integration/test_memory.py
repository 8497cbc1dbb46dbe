"""A worker whose memory ends in the middle of a training: its address space is really limited, the allocation really fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from ray import cloudpickle
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

from r1ray.config import load_config
from r1ray.model.importer import import_model
from r1ray.registry import Registry
from r1ray.train import runs
from r1ray.train.config import FinetuneConfig
from r1ray.train.fit import fit
from r1ray.train.objective import objective_of
from r1ray.train.order import plan_of, resolve_order
from r1ray.train.progress import FILE

pytestmark = pytest.mark.ray
ROOM = 1200 * 2**20  # a sixth of it for the bucket of gradients that DeepSpeed allocates, however small the adapter is


class SmallMemory(WorkerGroupCallback):
    """Gives each worker `ROOM` bytes beyond what its libraries take."""

    def after_worker_group_start(self, worker_group) -> None:
        worker_group.execute(limit, ROOM)


def limit(room: int) -> None:
    import resource

    import deepspeed  # noqa: F401
    import trl.trainer.sft_trainer  # noqa: F401

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))


def test_a_batch_that_does_not_fit_is_taken_in_smaller_passes_from_the_last_checkpoint(ray_cluster, tiny_llama, tmp_path) -> None:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    settings = ray_cluster.settings.model_copy(update={"home": tmp_path / "home"})
    registry = Registry(settings)
    base = import_model(str(tiny_llama), name="tiny-llama", registry=registry)
    rows = [{"text": "card " * (380 if n % 2 else 3), "label": "lost"} for n in range(192)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = ["batch_size=96", "micro_batch_size=96", "group_window=2", "max_length=500", "dtype=float32", "checkpoint_every_steps=1"]
    overrides = ["base=tiny-llama", f"data.path={tmp_path / 'rows.jsonl'}", *(f"train.{item}" for item in shape)]
    objective = objective_of("sft")
    wanted = load_config(FinetuneConfig, None, overrides)
    material = objective.prepare(objective.read(wanted), base, wanted, settings)
    lengths = material.lengths()
    seed = next(seed for seed in range(99) if max(map(lengths.__getitem__, plan_of(of(wanted, seed), lengths).batch(0))) < 50)
    directory = settings.checkpoints / "tight"
    directory.mkdir(parents=True)
    runs.store(directory, runs.RunState(mlflow_run_id="m", dtype="float32"))
    told: list[str] = []
    order = resolve_order(of(wanted, seed), base, material, directory, settings, told.append)
    outcome = fit(order, callbacks=[SmallMemory()], say=told.append)
    assert outcome["step"] == 2
    chosen = [line for line in told if "from here on" in line]
    assert chosen and "ran out of memory in step 2, with 96 dialogues per forward pass" in chosen[0]
    assert [json.loads(line)["step"] for line in (directory / FILE).read_text().splitlines()] == [1, 2], "step 1 was not trained twice"
    state = runs.load(directory)
    assert state is not None and state.micro_batch_size in (48, 24, 12)
    told.clear()
    resolve_order(of(wanted, seed), base, material, directory, settings, told.append)
    assert "instead of 96, because the run ran out of memory before" in told[0]


def of(wanted: FinetuneConfig, seed: int):
    return wanted.train.model_copy(update={"seed": seed})
