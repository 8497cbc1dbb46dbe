"""A search space is checked before any trial starts."""

import pytest

from r1ray.config import load_config
from r1ray.errors import InvalidValue, UnknownKey
from r1ray.tune.config import SamplingSweepConfig
from r1ray.tune.space import Integer, LogUniform, assign, check_keys, distributions
from r1ray.types import Sampling


def sweep(*overrides):
    return load_config(SamplingSweepConfig, None, ["model=m", "data.path=x.parquet", *overrides])


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(UnknownKey, match="Did you mean 'temperature'"):
        sweep("space={temprature: {type: uniform, low: 0, high: 1}}")


def test_a_group_of_settings_cannot_be_searched():
    with pytest.raises(InvalidValue, match="'rule' in space is a group"):
        check_keys(["rule"], SamplingSweepConfig)
    check_keys(["rule.max_slowdown"], SamplingSweepConfig)


def test_a_range_must_be_ordered_and_a_log_range_positive():
    for text in ("{type: uniform, low: 2, high: 1}", "{type: loguniform, low: 0, high: 1}", "{type: normal, low: 0, high: 1}"):
        with pytest.raises(InvalidValue):
            sweep(f"space={{temperature: {text}}}")


def test_unknown_candidates_are_refused_with_the_known_ones():
    with pytest.raises(InvalidValue, match="r1-recommended, greedy"):
        sweep("candidates=[nonsense]")


def test_every_candidate_gives_valid_sampling_settings():
    from r1ray.tune.profiles import PROFILES

    assert len({p.name for p in PROFILES}) == len(PROFILES)
    for profile in PROFILES:
        Sampling.model_validate(sweep().base.model_dump() | dict(profile.fields))


def test_dotted_keys_are_set_without_touching_the_original():
    tree = {"train": {"learning_rate": 1e-3, "rank": 8}, "name": "x"}
    assert assign(tree, {"train.rank": 16, "data.seed": 1}) == {
        "train": {"learning_rate": 1e-3, "rank": 16},
        "name": "x",
        "data": {"seed": 1},
    }
    assert tree["train"]["rank"] == 8


def test_the_space_becomes_optuna_distributions():
    made = distributions(
        {**sweep().space, "rank": Integer(type="int", low=1, high=8), "lr": LogUniform(type="loguniform", low=1e-4, high=1.0)}
    )
    assert made["lr"].log
    assert made["rank"].high == 8
    assert made["top_k"].choices == (0, 20, 40)
