"""`auto` takes a GPU that is there and that Ray has given."""

from __future__ import annotations

import pytest
import torch

from r1ray.engine import hardware
from r1ray.engine.config import EngineConfig
from r1ray.engine.hardware import choose_device, engine_device
from r1ray.errors import InvalidValue


@pytest.mark.parametrize(
    ("is_there", "given", "expected"),
    [(False, None, "cpu"), (True, None, "cuda"), (True, [], "cpu"), (True, [3], "cuda"), (False, [3], "cpu")],
)
def test_a_visible_gpu_counts_where_ray_has_given_it(is_there, given, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    monkeypatch.setattr(hardware, "_given_gpus", lambda: given)
    assert choose_device("auto") == expected
    assert choose_device("cuda:1") == "cuda:1"


def test_a_split_engine_computes_where_its_actors_have_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hardware, "_given_gpus", lambda: None)
    assert engine_device(EngineConfig(stages=2)) == "cpu"
    assert engine_device(EngineConfig(stages=2, stage_gpus=1)) == "cuda"
    assert engine_device(EngineConfig()) == "cuda"


def test_a_driver_without_a_gpu_does_not_put_its_actors_on_cpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InvalidValue, match=r"stage_gpus=1, and this process, .* has no GPU\. .* --entrypoint-num-gpus"):
        engine_device(EngineConfig(tensor_parallel=2, stage_gpus=1))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"stages": 2, "device": "cpu", "stage_gpus": 1}, "stage_gpus=1 reserves GPUs"),
        ({"tensor_parallel": 2, "device": "cuda"}, "all its processes would take the same one"),
        ({"stages": 2, "device": "cuda:1", "stage_gpus": 1}, "device=cuda:1"),
    ],
)
def test_devices_and_reservations_that_contradict_each_other_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        EngineConfig(**settings)
