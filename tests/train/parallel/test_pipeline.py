"""A pipeline that runs out of memory; its first batch is a fake, whose size no machine holds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerState

from r1ray.errors import OutOfMemory
from r1ray.train.backoff import halved
from r1ray.train.config import TrainConfig
from r1ray.train.order import WorkOrder
from r1ray.train.parallel.pipeline import PipelineTrainer
from r1ray.train.worker import Attempt


class Starved(PipelineTrainer):
    """Without DeepSpeed's engine, which wants a process per stage."""

    def __init__(self, order: WorkOrder) -> None:
        self.state = TrainerState()
        self._bench: Any = SimpleNamespace(order=order, callbacks=[])

    def _step(self) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Starving(Attempt):
    def _trainer(self, _: Any) -> Starved:  # type: ignore[override]
        return Starved(self.order)


def test_a_pipeline_that_runs_out_of_memory_goes_on_with_half_the_rows(tmp_path: Path) -> None:
    config = TrainConfig(batch_size=8, micro_batch_size=4, zero_stage=1)
    rest = {"base": None, "material": None, "num_steps": 3, "dtype": "float32", "attention": "eager", "settings": None}
    order = WorkOrder(config=config, run="r", run_directory=tmp_path, **rest)  # type: ignore[arg-type]
    with pytest.raises(OutOfMemory, match="in step 1, with 4 dialogues per forward pass") as caught:
        Starving(order, rank=0, world=1, reporter=None).run()  # type: ignore[arg-type]
    smaller = halved(order, caught.value).config
    assert (smaller.micro_batch_size, smaller.batch_size) == (2, 8)
