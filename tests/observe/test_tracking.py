"""Runs in a real MLflow on SQLite."""

from __future__ import annotations

import json

import pytest

from r1ray.errors import RegistryError
from r1ray.observe.client import client
from r1ray.observe.tracking import Run
from r1ray.settings import Settings


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("home"))


def recorded(settings, run_id):
    return client(settings.registry_uri).get_run(run_id)


def test_a_run_records_parameters_metrics_and_files(home, tmp_path):
    (tmp_path / "note.txt").write_text("hello")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "row.txt").write_text("1")
    with Run("things", "one", settings=home) as run:
        run.log_params({"train": {"learning_rate": 2e-5, "betas": [0.9, 0.95]}, "name": "m", "long": "x" * 9999, "empty": {}})
        for step, loss in enumerate([3.0, 2.0]):
            run.log_metrics({"loss": loss}, step=step)
        run.log_dict({"银行": [1]}, "report.json")
        run.log_artifact(tmp_path / "note.txt")
        run.log_artifact(tmp_path / "folder")
    found = recorded(home, run.id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "one"
    assert found.data.params["train.learning_rate"] == "2e-05"
    assert found.data.params["train.betas"] == "[0.9, 0.95]"
    assert len(found.data.params["long"]) == 500
    assert [(point.step, point.value) for point in client(home.registry_uri).get_metric_history(run.id, "loss")] == [(0, 3.0), (1, 2.0)]
    artifacts = home.home / "mlruns" / "things" / run.id / "artifacts"
    assert json.loads((artifacts / "report.json").read_text(encoding="utf-8")) == {"银行": [1]}
    assert (artifacts / "note.txt").exists()
    assert (artifacts / "folder" / "row.txt").exists()


@pytest.mark.parametrize(("error", "status"), [(ValueError("bad row"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_an_exception_ends_the_run_with_its_reason_and_goes_on(home, error, status):
    run = Run("things", "failing", settings=home)
    with pytest.raises(type(error)), run:
        raise error
    found = recorded(home, run.id)
    assert found.info.status == status
    assert found.data.tags["r1ray.error"].startswith(type(error).__name__)


def test_a_child_run_names_its_parent(home):
    with Run("sweeps", "sweep", settings=home) as parent, Run("sweeps", "trial", settings=home, parent_run_id=parent.id) as child:
        pass
    assert recorded(home, child.id).data.tags["mlflow.parentRunId"] == parent.id


def test_a_resumed_run_goes_on_where_it_stopped(home, caplog):
    with pytest.raises(RuntimeError), Run("things", "cut", settings=home) as first:
        first.log_params({"lr": 1, "seed": 0})
        first.log_metrics({"loss": 3.0}, step=1)
        raise RuntimeError("killed")
    with Run("things", "cut", settings=home, resume_run_id=first.id) as second:
        assert recorded(home, second.id).info.status == "RUNNING"
        second.log_params({"lr": 2, "seed": 0, "new": True})
        second.log_metrics({"loss": 2.0}, step=2)
    assert second.id == first.id
    found = recorded(home, first.id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"lr": "1", "seed": "0", "new": "True"}
    assert "keeps its first values of lr" in caplog.text
    assert len(client(home.registry_uri).get_metric_history(first.id, "loss")) == 2


def test_a_lost_run_starts_anew_with_a_warning(home, caplog):
    with Run("things", "lost", settings=home, resume_run_id="0" * 32) as run:
        pass
    assert run.id != "0" * 32
    assert "cannot be resumed" in caplog.text


def test_a_metric_that_cannot_be_written_warns_once_and_does_not_stop_the_work(home, caplog):
    with Run("things", "odd", settings=home) as run:
        run.log_metrics({"not/allowed/!": 1.0})
        run.log_metrics({"not/allowed/!": 2.0})
        run.log_metrics({"loss": float("nan")})
    assert caplog.text.count("are not recorded") == 1
    assert recorded(home, run.id).info.status == "FINISHED"


def test_a_missing_server_is_a_registry_error(tmp_path):
    with (
        pytest.raises(RegistryError, match="No MLflow server"),
        Run("x", "y", settings=Settings(home=tmp_path, registry="http://127.0.0.1:9")),
    ):
        pass
