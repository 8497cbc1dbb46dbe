"""What a driver and its workers find in their environment, and that the user's own values stay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1ray.environment import malloc_environment, prepare_environment, ray_environment, serve_environment, worker_environment
from r1ray.errors import InvalidValue


@pytest.fixture
def bare(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("MALLOC_", "LD_PRELOAD", "RAY_", "HF_", "R1RAY_", "TRANSFORMERS_", "MLFLOW_", "TOKENIZERS_", "DO_NOT_")):
            monkeypatch.delenv(name)
    saved = dict(os.environ)
    yield monkeypatch
    os.environ.clear()
    os.environ.update(saved)


def test_the_environment_is_set_once_and_the_users_own_values_stay(bare):
    bare.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    prepare_environment()
    assert os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "1"
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert os.environ["RAY_worker_niceness"] == "0"  # noqa: SIM112 (Ray spells it so)


def test_a_token_turns_authentication_on_and_the_hub_must_be_allowed(bare):
    bare.setenv("RAY_AUTH_TOKEN_PATH", "/somewhere")
    bare.setenv("R1RAY_ALLOW_HUB", "1")
    found = ray_environment()
    assert found["RAY_AUTH_MODE"] == "token"
    assert "HF_HUB_OFFLINE" not in found


def test_a_worker_gets_its_threads_device_and_home(bare):
    bare.setenv("R1RAY_HOME", "/somewhere")
    prepare_environment()
    found = worker_environment(threads=2, use_gpu=False)
    assert found["MALLOC_ARENA_MAX"] == "1", "a training thread's own arena costs a tenth of a step"
    assert (found["OMP_NUM_THREADS"], found["DS_ACCELERATOR"], found["R1RAY_HOME"]) == ("2", "cpu", "/somewhere")
    assert found["TOKENIZERS_PARALLELISM"] == "false"
    assert worker_environment(threads=1, use_gpu=True)["DS_ACCELERATOR"] == "cuda"
    with pytest.raises(InvalidValue, match="threads is 0"):
        worker_environment(threads=0, use_gpu=False)


def test_what_keeps_freed_memory_is_rays_jemalloc_unless_the_user_preloads_another(bare):
    library = worker_environment(threads=1, use_gpu=False, keeps_freed=True)["LD_PRELOAD"]
    asks = "import ctypes; ctypes.CDLL(None).mallctl"  # an AttributeError where jemalloc is not there
    told = subprocess.run(
        [sys.executable, "-c", asks], env=os.environ | malloc_environment(keeps_freed=True), capture_output=True, text=True, check=True
    )
    assert Path(library).is_file()
    assert "jemalloc" not in told.stderr, "jemalloc names an option that it does not know"
    assert "LD_PRELOAD" not in malloc_environment(keeps_freed=False)
    bare.setenv("LD_PRELOAD", "libmine.so")
    assert malloc_environment(keeps_freed=True) == {"MALLOC_ARENA_MAX": "1"}


def test_haproxy_is_opt_in_and_can_be_declined():
    assert serve_environment(haproxy=False) == {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    assert serve_environment()["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert not any(name.startswith("RAY_SERVE") for name in ray_environment())
