"""The seams of Ray Train that LeanTrainer and the controller's parts stand on: an upgrade of Ray that moves one fails here."""

from __future__ import annotations

import dataclasses
import inspect
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import _AutoscalingCoordinatorActor
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.callbacks import BackendSetupCallback, DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.context import TrainContext
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, ResizeDecision
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import WorkerGroupError

from r1ray.errors import NothingToTrain, OutOfMemory, RegistryError, VersionNotFound
from r1ray.train.controller import AskNobody, FollowCluster, NotInVain, ProcessGroupConfig, _saved_since, _share_cores, num_threads
from r1ray.train.fit import LeanTrainer


def trainer(**parts) -> LeanTrainer:
    config = ProcessGroupConfig(backend="gloo")
    return LeanTrainer(print, torch_config=config, scaling_config=ScalingConfig(num_workers=2), run_config=RunConfig(name="x"), **parts)


def kinds(made: LeanTrainer) -> set[type]:
    return {type(callback) for callback in made._create_default_callbacks()}


def test_only_the_helpers_without_work_are_left_out():
    rays_own = {type(callback) for callback in DataParallelTrainer._create_default_callbacks(trainer())}
    assert rays_own - kinds(trainer()) == {DatasetsCallback, PlacementGroupCleanerCallback}
    assert BackendSetupCallback in kinds(trainer())


def test_a_training_that_the_job_outlives_keeps_the_cleaner():
    made = trainer()
    made.outlived = True
    assert PlacementGroupCleanerCallback in kinds(made)


def test_the_controller_is_given_its_scaling_policy_by_name():
    assert "scaling_policy" in inspect.signature(TrainController).parameters
    assert "scaling_policy=" in inspect.getsource(DataParallelTrainer.fit)
    assert "**controller_init_kwargs" in str(inspect.signature(DataParallelTrainer._initialize_and_run_controller))


def test_the_policy_decides_like_rays_own_and_calls_no_actor():
    policy = AskNobody(ScalingConfig(num_workers=3))
    for name in ("after_controller_start", "_maybe_send_resource_request"):
        assert name in vars(FixedScalingPolicy) | vars(FixedScalingPolicy.__mro__[1])
    policy.after_controller_start(None)
    decision = policy.make_decision_for_non_running_worker_group()
    assert isinstance(decision, ResizeDecision)
    assert decision.num_workers == 3
    policy.before_controller_abort()  # nothing was requested, nothing is cancelled


RANGE = FollowCluster(ScalingConfig(num_workers=(1, 3)), Path("run"), waits_for_checkpoint=True)


def test_what_the_range_policy_and_the_preemption_flag_stand_on_is_still_there():
    for name in ("_latest_monitor_time", "_latest_reserved_resources", "_latest_reserved_resources_query_time"):
        assert name in vars(RANGE)
    assert "_autoscaling_coordinator" in dir(RANGE) and "_requester_id" in vars(RANGE)
    assert RANGE.GET_RESERVED_RESOURCES_INTERVAL_S > 0
    assert "recompute" in inspect.signature(_AutoscalingCoordinatorActor.get_reserved_resources).parameters
    assert callable(ray._private.state.state.get_draining_nodes)
    assert "preemption_context" in {field.name for field in dataclasses.fields(TrainContext)}


def test_workers_are_added_only_after_a_checkpoint_that_all_have_finished(tmp_path):
    asked = time.time()
    saved = tmp_path / "checkpoint_00000004_000000001000"
    saved.mkdir()
    for rank in range(2):
        assert not _saved_since(tmp_path, asked, 2)
        (saved / f"meta-rank{rank}.json").touch()
    assert not _saved_since(tmp_path, asked, 2), "Ray Train has not heard of it yet"
    for path in saved.iterdir():
        os.utime(path, (asked - 2, asked - 2))
    assert _saved_since(tmp_path, asked - 3, 2)
    assert not _saved_since(tmp_path, asked, 2), "it is older than the wish"


@pytest.mark.parametrize(
    "part",
    [ProcessGroupConfig(backend="gloo"), AskNobody(ScalingConfig(num_workers=2)), RANGE, NotInVain(FailureConfig(max_failures=1))],
)
def test_the_controller_loads_no_torch(part):
    code = f"import pickle, sys; part = pickle.loads({pickle.dumps(part)!r}); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


@pytest.mark.parametrize(
    ("error", "decision"),
    [
        (ConnectionError("reset by peer"), FailureDecision.RETRY),
        (RegistryError("No MLflow server answers."), FailureDecision.RETRY),
        (VersionNotFound("assistant@7 is not here."), FailureDecision.RAISE),
        (NothingToTrain("No row."), FailureDecision.RAISE),
        (OutOfMemory("Worker 1 ran out of memory."), FailureDecision.RAISE),
    ],
    ids=lambda value: type(value).__name__,
)
def test_workers_are_not_started_again_into_the_same_mistake(error, decision):
    policy = NotInVain(FailureConfig(max_failures=1))
    assert policy.make_decision(WorkerGroupError("1 of 2 failed", {1: error})) == decision


def test_workers_share_the_cores_of_the_node_they_are_on(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)))
    monkeypatch.setattr(os, "environ", {**os.environ, "OMP_NUM_THREADS": "1"})
    assert (num_threads(None, 8), num_threads(None, 200), num_threads(3, 8)) == (12, 1, 3)
    _share_cores(ProcessGroupConfig(backend="nccl"), 8, is_first=False)
    assert (os.environ["OMP_NUM_THREADS"], os.environ["MKL_NUM_THREADS"], os.environ["DS_ACCELERATOR"]) == ("12", "12", "cuda")
    _share_cores(ProcessGroupConfig(backend="gloo", threads=3), 8, is_first=False)
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_a_worker_knows_its_threads_before_it_loads_torch():
    code = (
        "import sys, r1ray.train.controller as controller\n"
        "controller._share_cores(controller.ProcessGroupConfig(backend='gloo', threads=1), 1, is_first=True)\n"
        "assert 'torch' not in sys.modules\n"
        "import torch; print(torch.get_num_threads())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "1"
