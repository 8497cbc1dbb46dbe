from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from r1ray.config import load_config
from r1ray.errors import DiskFull, RunInUse, TrainingError
from r1ray.model.importer import import_model
from r1ray.train import runs
from r1ray.train.config import FinetuneConfig
from r1ray.train.failures import unwrap
from r1ray.train.objective import objective_of
from r1ray.train.runs import RunState


def config(*overrides: str) -> FinetuneConfig:
    return load_config(FinetuneConfig, None, ["data.path=x.csv", *overrides])


@pytest.fixture
def base(tiny_llama, registry):
    return import_model(str(tiny_llama), name="tiny", registry=registry)


def test_what_does_not_change_the_result_keeps_the_run(base) -> None:
    name = runs.run_name(config(), base, "rows")
    neutral = ("num_workers=2", "max_failures=9", "collective_timeout_s=99", "log_every_steps=1", "restart=true")
    for same in (*(f"train.{setting}" for setting in neutral), "data.path=moved.csv"):
        assert runs.run_name(config(same), base, "rows") == name


def test_what_changes_the_result_changes_the_run(base) -> None:
    names = [
        runs.run_name(config(*change), base, "rows")
        for change in ((), ("train.seed=1",), ("train.batch_size=9",), ("data.system_prompt=x",))
    ]
    assert len({*names, runs.run_name(config(), base, "other rows")}) == 5


PAIR = {"prompt": "How?", "chosen": "So.", "rejected": "No."}
TURNS = {"messages": [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]}


@pytest.mark.parametrize(
    ("objective", "row", "held_out"),
    [
        ("sft", TURNS, "eval_share"),
        ("dpo", PAIR, "dpo.eval_share"),
        ("reward", PAIR, "reward.eval_share"),
        ("grpo", TURNS, "grpo.num_held_out"),
    ],
)
def test_the_same_rows_with_other_ids_are_another_run_where_ids_decide_what_is_held_out(objective, row, held_out, tmp_path) -> None:
    """A row called x#masked was made from x, and is on its side."""

    def data_hash(names: tuple[str, ...], share: float) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps({"id": name, **row}) + "\n" for name in names))
        settings = (f"objective={objective}", "grpo.rewards=[{axis: right, kind: exact}]", f"{held_out}={share}")
        return objective_of(objective).read(config(f"data.path={path}", *(f"train.{setting}" for setting in settings))).data_hash

    made, apart, renamed = ("a", "a#masked", "b"), ("a", "c", "b"), ("a", "a#traps.conflict", "b")
    share = 1 if objective == "grpo" else 0.4
    assert data_hash(made, share) != data_hash(apart, share)
    assert data_hash(made, share) == data_hash(renamed, share), "prepared again, with the same origins"
    assert data_hash(made, 0) == data_hash(apart, 0)


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


def test_what_only_noticed_another_workers_end_is_never_shown_for_its_cause(tmp_path) -> None:
    echoes = (
        "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE) ran for 1800042 milliseconds "
        "before timing out.",
        "NCCL communicator was aborted on rank 0.",
        "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error, NCCL version 2.29.7",
        "Broken pipe",
    )
    for echo in echoes:
        died = Wrapped(RuntimeError("The actor died because its worker process was killed."))
        assert "Worker 1 " in str(unwrap(Failed({0: Wrapped(RuntimeError(echo)), 1: died}), tmp_path))
        own = Wrapped(KeyError("labels"))
        assert "Worker 2 " in str(unwrap(Failed({0: Wrapped(RuntimeError(echo)), 1: died, 2: own}), tmp_path))


class DistBackendError(RuntimeError):
    """By the name of torch's own."""


def test_the_reason_that_nccl_puts_last_is_shown_with_what_to_do(tmp_path) -> None:
    head = "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled system error (run with NCCL_DEBUG=INFO for details)\nLast error:\n"
    shm = DistBackendError(head + "Error while creating shared memory segment /dev/shm/nccl-x1 (size 9637888), error: No space left (28)")
    text = str(unwrap(Failed({0: Wrapped(DistBackendError("remote process exited")), 1: Wrapped(shm)}), tmp_path))
    assert "Worker 1 " in text and "last error: Error while creating shared memory segment /dev/shm/nccl-x1" in text
    assert "--shm-size" in text
    unreachable = DistBackendError(head + "socketPollConnect: connect to 10.0.0.3<5000> returned Connection refused")
    assert "NCCL_SOCKET_IFNAME" in str(unwrap(Failed({0: Wrapped(unreachable)}), tmp_path))


def test_a_run_is_held_by_one_job_that_the_others_name(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"metadata": {"job_submission_id": "raysubmit_1"}}')
    with runs.held(tmp_path / "run"):
        who = rf"host {socket.gethostname()}, pid {os.getpid()}, Ray job raysubmit_1\. Follow that one"
        with pytest.raises(RunInUse, match=who), runs.held(tmp_path / "run"):
            raise AssertionError("held twice")
        with runs.held(tmp_path / "another"):
            pass
    with runs.held(tmp_path / "run"):
        assert "raysubmit_1" in (tmp_path / "run" / ".lock").read_text()


def test_a_holders_death_frees_the_run(tmp_path) -> None:
    code = f"import sys, time; from pathlib import Path; from r1ray.train import runs\nwith runs.held(Path({str(tmp_path)!r})):"
    code += " print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(RunInUse, match=f"pid {holder.pid}"), runs.held(tmp_path):
            raise AssertionError("held twice")
        holder.kill()
    with runs.held(tmp_path):
        pass


def test_a_restart_forgets_all_but_who_holds_the_run(tmp_path) -> None:
    with runs.held(tmp_path):
        (tmp_path / "checkpoint_1").mkdir()
        (tmp_path / "run.json").touch()
        runs.forget(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        with pytest.raises(RunInUse), runs.held(tmp_path):
            raise AssertionError("held twice")
