"""A submitted job joins the cluster that runs it, whatever other clusters the machine has."""

from __future__ import annotations

import os

import pytest

from r1ray.entry import stay_in_own_cluster


@pytest.fixture
def submitted(tmp_path, monkeypatch):
    """As Ray's job supervisor leaves a job's environment; the directory stands for /proc."""
    (tmp_path / "77").mkdir()
    arguments = ["raylet", "--python_worker_command=python --gcs-address=10.0.0.9:1 --x", "--gcs-address=10.0.0.1:6379", "--head"]
    (tmp_path / "77" / "cmdline").write_text("\0".join(arguments) + "\0")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("RAY_RAYLET_PID", "77")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6400")
    return tmp_path


def test_a_job_joins_the_cluster_of_the_raylet_that_started_it(submitted, capsys):
    stay_in_own_cluster(submitted)
    assert os.environ["RAY_ADDRESS"] == "10.0.0.1:6379"
    assert "joining 10.0.0.1:6379, which runs this job: RAY_ADDRESS=10.0.0.1:6400 is another cluster" in capsys.readouterr().out
    stay_in_own_cluster(submitted)
    assert capsys.readouterr().out == "", "said once"


@pytest.mark.parametrize("lost", ["RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_RAYLET_PID"])
def test_what_was_not_submitted_keeps_its_address(submitted, monkeypatch, lost):
    monkeypatch.delenv(lost)
    stay_in_own_cluster(submitted)
    assert os.environ["RAY_ADDRESS"] == "10.0.0.1:6400"


def test_a_raylet_that_is_gone_changes_nothing(submitted, monkeypatch):
    monkeypatch.setenv("RAY_RAYLET_PID", "78")
    stay_in_own_cluster(submitted)
    assert os.environ["RAY_ADDRESS"] == "10.0.0.1:6400"
