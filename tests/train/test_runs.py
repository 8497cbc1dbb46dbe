from __future__ import annotations

import pytest

from r1ray.config import load_config
from r1ray.errors import DiskFull, TrainingError
from r1ray.model.importer import import_model
from r1ray.train import runs
from r1ray.train.config import FinetuneConfig
from r1ray.train.failures import unwrap
from r1ray.train.runs import RunState


def config(*overrides: str) -> FinetuneConfig:
    return load_config(FinetuneConfig, None, ["data.path=x.csv", *overrides])


@pytest.fixture
def base(tiny_llama, registry):
    return import_model(str(tiny_llama), name="tiny", registry=registry)


def test_what_does_not_change_the_result_keeps_the_run(base) -> None:
    name = runs.run_name(config(), base, "rows")
    for same in ("train.num_workers=2", "train.max_failures=9", "train.log_every_steps=1", "train.restart=true", "data.path=moved.csv"):
        assert runs.run_name(config(same), base, "rows") == name


def test_what_changes_the_result_changes_the_run(base) -> None:
    names = [
        runs.run_name(config(*change), base, "rows")
        for change in ((), ("train.seed=1",), ("train.batch_size=9",), ("data.system_prompt=x",))
    ]
    assert len({*names, runs.run_name(config(), base, "other rows")}) == 5


def test_a_finished_run_remembers_its_version_and_a_lost_state_is_no_error(tmp_path) -> None:
    assert runs.load(tmp_path) is None
    runs.store(tmp_path, RunState(mlflow_run_id="m", dtype="float32"), version="a@1")
    assert runs.load(tmp_path) == RunState(mlflow_run_id="m", dtype="float32", version="a@1")
    (tmp_path / "run.json").write_text("{")
    assert runs.load(tmp_path) is None


class Wrapped(Exception):
    """As Ray wraps what a worker raised."""

    def __init__(self, cause: Exception) -> None:
        self._base_exc, self._traceback_str = cause, 'Traceback\n  File "worker.py", line 7, in step\nboom'


class Failed(Exception):
    def __init__(self, failures: dict[int, Exception]) -> None:
        self.worker_failures = failures


def test_an_error_of_ours_comes_out_of_rays_wrapping_unchanged(tmp_path) -> None:
    ours = DiskFull("No room.")
    assert unwrap(Failed({0: Wrapped(RuntimeError("Connection reset by peer")), 1: Wrapped(ours)}), tmp_path) is ours


def test_the_worker_that_failed_is_named_and_not_the_one_that_noticed(tmp_path) -> None:
    error = unwrap(Failed({0: Wrapped(RuntimeError("gloo: Connection closed by peer")), 1: Wrapped(ValueError("bad shape"))}), tmp_path)
    assert isinstance(error, TrainingError)
    assert (
        "Worker 1" in str(error)
        and "ValueError: bad shape" in str(error)
        and "worker.py" in str(error)
        and "before the first step" in str(error)
    )
