"""How a sampling sweep chooses and names itself; Ray's part is in tests/integration."""

import math

import pytest

from r1ray.cluster import Cluster, Node
from r1ray.config import load_config
from r1ray.errors import ClusterTooSmall, TuningError
from r1ray.tune.config import RuleConfig, SamplingSweepConfig
from r1ray.tune.report import Setting
from r1ray.tune.room import num_side_by_side
from r1ray.tune.sampling import choose, sweep_name
from r1ray.types import Artifact, Manifest, Sampling, TemplateInfo


def setting(name, quality, latency_s):
    return Setting(name=name, sampling=Sampling(), quality=quality, latency_s=latency_s)


def test_the_choice_is_the_best_quality_within_the_limit_and_lies_on_the_front():
    settings = [setting("base", 0.80, 1.0), setting("better", 0.85, 1.15), setting("slow", 0.95, 1.3), setting("worse", 0.7, 1.1)]
    found, limit_s = choose(settings, "base", RuleConfig(max_slowdown=0.2))
    assert limit_s == pytest.approx(1.2)
    assert [s.name for s in found if s.is_chosen] == ["better"]
    assert [s.name for s in found if s.on_front] == ["base", "better", "slow"]


def test_without_its_baseline_a_sweep_cannot_choose():
    with pytest.raises(TuningError, match="baseline 'base' was not measured"):
        choose([setting("base", 0.8, math.nan), setting("greedy", 0.9, 1.0)], "base", RuleConfig())


def sweep(*overrides):
    return load_config(SamplingSweepConfig, None, ["model=m", "data.path=x.parquet", *overrides])


def artifact(tmp_path, weights="a"):
    manifest = Manifest(
        name="m",
        kind="full",
        family="llama",
        weights_sha256=weights,
        template=TemplateInfo(sha256="t"),
        context_length=64,
        num_parameters=1,
        created_at="now",
    )
    return Artifact(path=tmp_path, manifest=manifest, version=3)


def test_a_new_rule_names_the_same_sweep_and_new_weights_or_rows_another(tmp_path):
    name = sweep_name(sweep(), artifact(tmp_path), "rows")
    assert name == sweep_name(sweep("rule.max_slowdown=0.5", "attach=false", "model=m@production"), artifact(tmp_path), "rows")
    assert name != sweep_name(sweep("limit=3"), artifact(tmp_path), "rows")
    assert name != sweep_name(sweep(), artifact(tmp_path, weights="b"), "rows")
    assert name != sweep_name(sweep(), artifact(tmp_path), "other rows")


def test_an_actor_reserves_what_its_engine_spreads_out():
    def bundles(*overrides):
        return load_config(SamplingSweepConfig, None, ["model=a@1", "data.path=x.parquet", "cpus_per_actor=2", *overrides]).trial_bundles

    assert bundles() == [{"CPU": 2}]
    assert bundles("engine.stages=3", "engine.stage_cpus=4") == [{"CPU": 2}, {"CPU": 4}, {"CPU": 4}]
    split = ["gpus_per_actor=1", "engine.stages=2", "engine.tensor_parallel=4", "engine.stage_gpus=1"]
    assert bundles(*split) == [{"CPU": 2, "GPU": 1}, {"CPU": 3, "GPU": 3}, {"CPU": 4, "GPU": 4}]
    vllm = ["engine.type=vllm", "engine.tensor_parallel=2", "engine.stage_gpus=1"]
    assert bundles(*vllm) == [{"CPU": 2}, {"CPU": 2, "GPU": 2}]
    assert bundles("engine.stages=2", "engine.stage_cpus=0") == [{"CPU": 2}]


def test_as_many_actors_run_as_find_room_with_all_their_stages():
    config = load_config(SamplingSweepConfig, None, ["model=a@1", "data.path=x.parquet", "engine.stages=2"])
    cluster = Cluster(address="here", nodes=tuple(Node(id=str(i), resources={"CPU": 3.0}) for i in range(2)))
    words = {"wanted_by": "the sweep", "wanted_by_one": "an actor", "remedy": "Set cpus_per_actor lower"}
    assert num_side_by_side(cluster, config.trial_bundles, most=8, **words) == 3
    assert num_side_by_side(cluster, config.trial_bundles, most=2, **words) == 2
    with pytest.raises(ClusterTooSmall, match="an actor wants"):
        num_side_by_side(cluster, [{"CPU": 4.0}], most=2, **words)
