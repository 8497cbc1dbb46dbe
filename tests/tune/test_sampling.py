"""How a sampling sweep chooses and names itself; Ray's part is in tests/integration."""

import math

import pytest

from r1ray.cluster import Cluster, Node
from r1ray.config import load_config
from r1ray.errors import ClusterTooSmall, InvalidValue, TuningError, UnknownKey
from r1ray.tune.config import RuleConfig, SamplingSweepConfig
from r1ray.tune.report import Setting
from r1ray.tune.room import num_side_by_side
from r1ray.tune.sampling import candidates, choose, judged, sweep_name
from r1ray.types import Artifact, Manifest, Sampling, SamplingPolicy, TemplateInfo


def setting(name, quality, latency_s, at_least=0.0, **marks):
    return Setting(name=name, sampling=Sampling(), quality=quality, latency_s=latency_s, gain_at_least=at_least, **marks)


BASE = setting("base", 0.80, 1.0, is_baseline=True)


def test_the_choice_is_the_best_of_those_that_are_surely_better_and_not_too_slow():
    settings = [BASE, setting("better", 0.85, 1.15, 0.01), setting("slow", 0.95, 1.3, 0.1), setting("lucky", 0.9, 1.1, -0.02)]
    choice = choose(settings, RuleConfig(max_slowdown=0.2), num_examples=200)
    assert choice.limit_s == pytest.approx(1.2)
    assert [s.name for s in choice.settings if s.is_chosen] == [choice.chosen.name] == ["better"]
    assert [s.name for s in choice.settings if s.on_front] == ["base", "slow", "lucky"]
    assert "better than base by" in choice.why


def test_the_baseline_stays_where_no_other_is_surely_better():
    choice = choose([BASE, setting("lucky", 0.9, 0.9, -0.02)], RuleConfig(), num_examples=200)
    assert choice.chosen.name == "base"
    assert "none is surely better (95%)" in choice.why


def test_the_baseline_stays_on_few_examples_whatever_they_show():
    choice = choose([BASE, setting("better", 0.9, 0.9, 0.05)], RuleConfig(), num_examples=24)
    assert choice.chosen.name == "base"
    assert choice.why == "the baseline stays: 24 examples are fewer than rule.min_examples=100"


def test_a_setting_can_be_taken_by_its_name():
    settings = [BASE, setting("worse", 0.1, 9.0, -0.9)]
    assert choose(settings, RuleConfig(take="worse"), num_examples=3).chosen.name == "worse"
    with pytest.raises(TuningError, match=r"rule\.take is 'best'; measured were base, worse"):
        choose(settings, RuleConfig(take="best"), num_examples=300)


def test_without_its_baseline_a_sweep_cannot_choose():
    with pytest.raises(TuningError, match="baseline was not measured"):
        choose([setting("base", 0.8, math.nan, is_baseline=True), setting("greedy", 0.9, 1.0, 0.1)], RuleConfig(), num_examples=200)
    with pytest.raises(TuningError, match="baseline 'base' was not measured"):
        judged([setting("greedy", 0.9, 1.0)], [{"exact_match": [(1.0, 1.0)]}], "base", sweep())


def test_settings_are_judged_against_the_baseline_on_the_same_examples():
    right, wrong = (1.0, 1.0), (0.0, 1.0)
    shares = [{"exact_match": [right, wrong] * 60}, {"exact_match": [right] * 120}, {"exact_match": [wrong, right] * 60}]
    base, better, other = judged([setting(name, 0.5, 1.0) for name in ("base", "better", "other")], shares, "base", sweep())
    assert base.is_baseline
    assert (base.gain, base.gain_at_least) == (0.0, 0.0)
    assert better.gain == pytest.approx(0.5)
    assert better.gain_at_least > 0.3
    assert other.gain == 0.0
    assert other.gain_at_least < -0.1  # equal figures, and yet it may be much worse


def test_what_the_version_answers_with_now_is_tried_first():
    config = sweep("candidates=[greedy, dialogue]")
    assert [name for name, _ in candidates(config, None)] == ["greedy", "dialogue"]
    policy = SamplingPolicy(default=Sampling(temperature=0.4, seed=3), tasks={"faq": Sampling(temperature=0.1)})
    (name, values), *others = candidates(config, policy)
    assert (name, values["temperature"], "seed" in values) == ("current", 0.4, False)
    assert [name for name, _ in others] == ["greedy", "dialogue"]
    assert candidates(sweep("task=faq"), policy)[0][1]["temperature"] == 0.1
    assert candidates(sweep("task=report"), policy)[0][1]["temperature"] == 0.4


def test_a_quality_that_no_evaluation_reports_is_refused():
    with pytest.raises(InvalidValue, match="rouge_l"):
        sweep("quality=[rouge_L]")
    with pytest.raises(InvalidValue, match="perplexity, which no sampling setting changes"):
        sweep("quality=[rouge_l, perplexity]")


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
    assert name == sweep_name(
        sweep("rule.max_slowdown=0.5", "rule.take=greedy", "attach=false", "model=m@production"), artifact(tmp_path), "rows"
    )
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


def test_a_setting_of_ones_own_is_tried_beside_the_profiles():
    config = sweep("candidates=[greedy, {name: ours, settings: {temperature: 0.4, top_p: 0.8}}]")
    assert candidates(config, None) == [("greedy", {"temperature": 0.0}), ("ours", {"temperature": 0.4, "top_p": 0.8})]
    for own, message in (
        ("{name: ours, settings: {temprature: 0.4}}", "Did you mean 'temperature'"),
        ("{name: ours, settings: {temperature: 9}}", "less than or equal to 2"),
        ("{name: current, settings: {top_k: 5}}", "name 'current' is taken"),
        ("{name: greedy, settings: {top_k: 5}}", "name 'greedy' is taken"),
    ):
        with pytest.raises((InvalidValue, UnknownKey), match=message):
            sweep(f"candidates=[greedy, {own}]")
    with pytest.raises(InvalidValue, match="two candidates have the same name"):
        sweep("candidates=[greedy, greedy]")
