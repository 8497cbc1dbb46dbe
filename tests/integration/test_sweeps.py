"""Both sweeps on a real Ray Tune, with tiny models: measured, chosen, recorded, resumed, and nothing left reserved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from r1ray.config import load_config
from r1ray.data.demo import write_demo
from r1ray.model.importer import import_model
from r1ray.observe.client import client
from r1ray.registry import Registry
from r1ray.train.config import FinetuneConfig
from r1ray.tune.config import HyperparameterSweepConfig, SamplingSweepConfig
from r1ray.tune.hyperparameters import sweep_hyperparameters
from r1ray.tune.sampling import sweep_sampling
from r1ray.types import Sampling, SamplingPolicy

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return write_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def model(ray_cluster, tiny_llama):
    return import_model(str(tiny_llama), name="tiny-sweep", registry=Registry(ray_cluster.settings)).ref


@pytest.fixture(scope="module")
def untouched(ray_cluster, tiny_llama):
    """No test attaches a policy to it."""
    return import_model(str(tiny_llama), name="tiny-untouched", registry=Registry(ray_cluster.settings)).ref


def arguments(demo, model, *overrides):
    fixed = [f"model={model}", f"data.path={demo.test}", "limit=3", "base.max_tokens=8", "quality=[rouge_l]", "engine.num_slots=2"]
    space = "space={temperature: {type: uniform, low: 0, high: 1}, max_tokens: {type: choice, values: [4, 8]}}"
    return [*fixed, space, *overrides]


def config(demo, model, *overrides):
    return load_config(SamplingSweepConfig, None, arguments(demo, model, *overrides))


def test_a_sampling_sweep_measures_chooses_records_and_attaches(ray_cluster, demo, model, capsys):
    settings = ray_cluster.settings
    found = sweep_sampling(config(demo, model, "num_samples=4", "candidates=[r1-recommended, greedy]"), settings)
    assert [s.name for s in found] == ["r1-recommended", "greedy", "search-1", "search-2"]
    assert sum(s.is_chosen for s in found) == 1
    chosen = next(s for s in found if s.is_chosen)
    assert chosen.name == "r1-recommended", "three examples prove nothing against the baseline"
    policy = Registry(settings).resolve(model).policy
    assert policy.default == chosen.sampling
    assert policy.provenance["default"]["setting"] == chosen.name
    parent = policy.provenance["default"]["run_id"]
    mlflow = client(settings.registry_uri)
    experiment = mlflow.get_run(parent).info.experiment_id
    assert len(mlflow.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent}'")) == 4
    assert {file.path for file in mlflow.list_artifacts(parent)} == {"settings.csv", "settings.json", "front.png"}
    out = capsys.readouterr().out
    assert "* chosen" in out
    assert "[4/4] search-2: quality" in out


@pytest.mark.parametrize("split", ["stages", "tensor_parallel"])
def test_the_parts_of_a_split_model_find_room_beside_their_trial(ray_cluster, demo, untouched, split):
    """A trial holds all of its own bundle, and what it starts cannot leave its placement group."""
    import ray

    num_cpus = ray.available_resources()["CPU"]
    parts = [f"engine.{split}=2", "engine.num_threads=1", "engine.stage_cpus=0.5", "cpus_per_actor=0.5", "attach=false"]
    found = sweep_sampling(config(demo, untouched, "num_samples=2", "candidates=[greedy]", *parts), ray_cluster.settings)
    assert [s.name for s in found] == ["greedy", "search-1"]
    assert all(s.latency_s > 0 for s in found)
    deadline = time.monotonic() + 20
    while ray.available_resources().get("CPU") != num_cpus and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == num_cpus, "the parts went with their trial"


KILLED_SWEEP = """
import sys
from r1ray.config import load_config
from r1ray.settings import Settings
from r1ray.tune.config import SamplingSweepConfig
from r1ray.tune.sampling import sweep_sampling
sweep_sampling(load_config(SamplingSweepConfig, None, sys.argv[1:]), Settings())
"""


def test_a_killed_sampling_sweep_goes_on_where_it_was(ray_cluster, demo, untouched, capsys):
    settings = ray_cluster.settings
    slow = ["engine.type=fake", "engine.fake.token_delay_s=0.15", "limit=4"]  # two rounds of eight tokens: 2.4 s a setting
    overrides = arguments(demo, untouched, "num_samples=3", "candidates=[r1-recommended, greedy]", "attach=false", *slow)
    environment = {**os.environ, "R1RAY_HOME": str(settings.home), "TUNE_GLOBAL_CHECKPOINT_S": "1"}
    killed = subprocess.Popen([sys.executable, "-u", "-c", KILLED_SWEEP, *overrides], env=environment, stdout=subprocess.PIPE, text=True)
    for line in killed.stdout:
        if line.startswith("[1/3]"):
            break
    time.sleep(1.5)  # a snapshot of the sweep is taken each second
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    found = sweep_sampling(load_config(SamplingSweepConfig, None, overrides), settings)
    out = capsys.readouterr().out
    assert "resuming" in out
    assert "r1-recommended started" not in out
    assert [s.name for s in found] == ["r1-recommended", "greedy", "search-1"]


def test_a_finished_sweep_is_chosen_from_anew_without_measuring(ray_cluster, demo, model, capsys):
    overrides = ["num_samples=4", "candidates=[r1-recommended, greedy]"]
    found = sweep_sampling(config(demo, model, *overrides, "rule.take=search-2", "task=faq"), ray_cluster.settings)
    out = capsys.readouterr().out
    assert "started" not in out
    chosen = next(s for s in found if s.is_chosen)
    assert chosen.name == "search-2"
    policy = Registry(ray_cluster.settings).resolve(model).policy
    assert policy.tasks["faq"] == chosen.sampling
    assert set(policy.provenance) == {"default", "faq"}


def test_what_a_version_answers_with_is_the_baseline_of_its_next_sweep(ray_cluster, demo, model):
    settings = ray_cluster.settings
    registry = Registry(settings)
    registry.attach_policy(model, SamplingPolicy(default=Sampling(temperature=0.3, max_tokens=8)))
    found = sweep_sampling(config(demo, model, "num_samples=1", "candidates=[greedy]", "seed=5"), settings)
    assert [(s.name, s.is_baseline, s.is_chosen) for s in found] == [("current", True, True), ("greedy", False, False)]
    assert registry.resolve(model).policy.default == Sampling(temperature=0.3, max_tokens=8)


@pytest.mark.slow
def test_a_hyperparameter_sweep_stops_the_hopeless_and_frees_what_they_held(ray_cluster, demo, model, capsys):
    import ray

    settings = ray_cluster.settings
    train = "{learning_rate: 1e-2, max_steps: 8, batch_size: 4, micro_batch_size: 4, max_length: 512, log_every_steps: 2, warmup_share: 0}"
    arguments = [
        f"finetune={{name: tuned-tiny, base: {model}, data: {{path: {demo.train}, limit: 60}}, train: {train}}}",
        "space={train.learning_rate: {type: choice, values: [1e-7]}}",
        "num_samples=2",
        "max_concurrent=1",
        "eval_share=0.2",
        "eval_limit=4",
        "asha={grace_steps: 2, reduction_factor: 2}",
    ]
    num_cpus = ray.available_resources()["CPU"]
    best = sweep_hyperparameters(load_config(HyperparameterSweepConfig, None, arguments), settings)
    assert best.train.learning_rate == 1e-2
    out = capsys.readouterr().out
    assert "[1/2] base: eval loss" in out
    assert "[2/2] search-1: stopped early" in out
    path = out.rsplit("--config ", 1)[1].split()[0]
    assert load_config(FinetuneConfig, path) == best
    assert "tuned-tiny" not in {registered.name for registered in Registry(settings).models()}
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != num_cpus and time.monotonic() < deadline:
        time.sleep(0.5)
    assert ray.available_resources()["CPU"] == num_cpus
