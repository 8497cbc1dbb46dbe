"""Where things live follows the environment."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from r1ray.settings import Settings


def test_every_place_is_below_home(monkeypatch, tmp_path):
    monkeypatch.setenv("R1RAY_HOME", str(tmp_path))
    settings = Settings()
    assert {path.parent for path in (settings.artifacts, settings.checkpoints, settings.indexes, settings.cache)} == {tmp_path}
    assert settings.registry_uri == f"sqlite:///{tmp_path}/mlflow.db"


def test_home_is_absolute_whatever_was_given(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("R1RAY_HOME", "relative")
    assert Settings().home == tmp_path / "relative"
    assert Settings(home=Path("~/x")).home == Path.home() / "x"


def test_the_environment_wins_over_defaults_and_arguments_over_both(monkeypatch):
    monkeypatch.setenv("R1RAY_REGISTRY", "http://mlflow:5000")
    monkeypatch.setenv("R1RAY_RAY_ADDRESS", "head:6379")
    assert (Settings().registry_uri, Settings().ray_address) == ("http://mlflow:5000", "head:6379")
    assert Settings(ray_address="other:1").ray_address == "other:1"


def test_settings_are_immutable_and_read_anew_each_time(monkeypatch, tmp_path):
    before = Settings()
    monkeypatch.setenv("R1RAY_HOME", str(tmp_path))
    assert before.home != Settings().home
    with pytest.raises(ValidationError):
        before.home = tmp_path


def test_a_relative_path_counts_from_home_where_the_working_directory_has_none(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    settings = Settings(home=tmp_path / "home")
    (tmp_path / "home" / "demo").mkdir(parents=True)
    assert settings.locate(Path("demo")) == tmp_path / "home" / "demo"
    (tmp_path / "demo").mkdir()
    assert settings.locate(Path("demo")) == Path("demo")
    assert settings.locate(Path("nowhere")) == Path("nowhere")


def test_what_a_job_writes_under_a_relative_name_stays_when_its_directory_goes(monkeypatch, tmp_path):
    monkeypatch.setenv("R1RAY_HOME", str(tmp_path))
    assert Settings().place(Path("reports/x.json")) == tmp_path / "reports" / "x.json"
    assert Settings().place(Path("/data/x.json")) == Path("/data/x.json")
    assert Settings().place(Path("~/x.json")) == Path.home() / "x.json"
