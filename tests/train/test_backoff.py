from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ray.train import FailureConfig
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import WorkerGroupError

from r1ray.errors import OutOfMemory
from r1ray.train import runs
from r1ray.train.backoff import halved, rows_per_pass
from r1ray.train.batches import accumulation_steps
from r1ray.train.config import TrainConfig
from r1ray.train.controller import NotInVain
from r1ray.train.failures import ran_out_of_memory, unwrap
from r1ray.train.order import WorkOrder


def order(directory: Path, **changes) -> WorkOrder:
    rest = {"base": None, "material": None, "num_steps": 1, "dtype": "float32", "attention": "eager", "settings": None}
    return WorkOrder(config=TrainConfig(**changes), run="r", run_directory=directory, **rest)  # type: ignore[arg-type]


def in_step() -> OutOfMemory:
    error = OutOfMemory("Worker 0 ran out of memory.")
    error.in_step = True  # type: ignore[attr-defined]
    return error


def allocation_error() -> RuntimeError:
    """torch's own words when the machine has not so much."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55)
    return caught.value


@given(batch=st.integers(1, 200), micro=st.integers(1, 300), workers=st.integers(1, 9))
def test_halving_ends_at_one_row_with_ever_fewer_rows_per_pass(batch, micro, workers) -> None:
    config = TrainConfig(batch_size=max(batch, workers), micro_batch_size=micro, num_workers=workers)
    rows = rows_per_pass(config)
    per_worker = math.ceil(config.batch_size / workers)
    assert 1 <= rows <= min(micro, per_worker)
    assert rows * accumulation_steps(config.batch_size, workers, micro) >= per_worker
    if rows > 1:
        assert rows_per_pass(config.model_copy(update={"micro_batch_size": rows // 2})) < rows


def test_the_smaller_pass_is_remembered_and_the_batch_stays(tmp_path) -> None:
    runs.store(tmp_path, runs.RunState(mlflow_run_id="m", dtype="float32"))
    smaller = halved(order(tmp_path, batch_size=12, micro_batch_size=64, num_workers=2), in_step()).config
    assert (smaller.micro_batch_size, smaller.batch_size) == (3, 12)  # six rows per worker are all that 64 could ever hold
    state = runs.load(tmp_path)
    assert state is not None and state.micro_batch_size == 3


def test_one_row_that_does_not_fit_and_a_model_that_does_not_fit_are_errors_that_say_what_to_set(tmp_path) -> None:
    with pytest.raises(OutOfMemory, match=r"least there is.*gradient_checkpointing"):
        halved(order(tmp_path, batch_size=2, num_workers=2), in_step())
    with pytest.raises(OutOfMemory, match="zero_stage=3"):
        halved(order(tmp_path), OutOfMemory("Worker 0 ran out of memory before the first step."))


def test_a_failed_allocation_is_told_from_other_errors() -> None:
    assert ran_out_of_memory(allocation_error())
    assert ran_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert ran_out_of_memory(MemoryError())
    assert not ran_out_of_memory(RuntimeError("Connection reset by peer"))


def test_a_worker_that_rays_memory_monitor_ended_counts_as_out_of_memory(tmp_path) -> None:
    text = "Task was killed due to the node running low on memory.\nMemory on the node was 15.6GB / 16.0GB."
    error = unwrap(SimpleNamespace(worker_failures={1: RuntimeError(text)}), tmp_path)  # type: ignore[arg-type]
    assert isinstance(error, OutOfMemory) and "Worker 1" in str(error)


def test_workers_without_memory_are_not_started_again_as_they_were() -> None:
    policy = NotInVain(FailureConfig(max_failures=3))
    assert policy.make_decision(WorkerGroupError("lost", {0: RuntimeError("Connection reset")})) is FailureDecision.RETRY
    assert policy.make_decision(WorkerGroupError("lost", {0: in_step()})) is FailureDecision.RAISE
