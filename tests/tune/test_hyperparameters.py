"""What a hyperparameter sweep checks before any training starts; Ray's part is in tests/integration."""

import pytest

from r1ray.cluster import Cluster, Node
from r1ray.config import load_config
from r1ray.errors import ClusterTooSmall, InvalidValue, UnknownKey
from r1ray.tune.config import HyperparameterSweepConfig
from r1ray.tune.hyperparameters import num_concurrent


def sweep(*overrides, space="{train.learning_rate: {type: loguniform, low: 1e-4, high: 1e-2}}"):
    return load_config(HyperparameterSweepConfig, None, [f"space={space}", "finetune.data.path=x.parquet", *overrides])


def cluster(*cpus):
    return Cluster(address="here", nodes=tuple(Node(id=str(i), resources={"CPU": float(num)}) for i, num in enumerate(cpus)))


def test_an_unknown_training_key_names_the_nearest():
    with pytest.raises(UnknownKey, match=r"Did you mean 'train.learning_rate'"):
        sweep(space="{train.learning_rat: {type: uniform, low: 0.1, high: 0.2}}")


def test_a_space_beyond_a_fields_limits_is_refused():
    with pytest.raises(InvalidValue, match="learning_rate"):
        sweep(space="{train.learning_rate: {type: uniform, low: 0.1, high: 20}}")


def test_a_trial_sets_the_searched_keys_and_keeps_the_rest():
    config = sweep("finetune.train.batch_size=4").trial({"train.learning_rate": 5e-3})
    assert (config.train.learning_rate, config.train.batch_size) == (5e-3, 4)


def test_as_many_trials_run_at_once_as_find_room_for_all_their_workers():
    two_workers = sweep("finetune.train.num_workers=2")
    assert num_concurrent(two_workers, cluster(9)) == 4
    assert num_concurrent(two_workers, cluster(4)) == 1  # 4 workers fill it, their drivers would find no room
    assert num_concurrent(sweep("max_concurrent=2"), cluster(16)) == 2
    with pytest.raises(ClusterTooSmall, match="one training of the sweep"):
        num_concurrent(two_workers, cluster(1))


def test_the_same_sweep_is_read_from_its_config_file():
    config = load_config(HyperparameterSweepConfig, "jobs/configs/sweep_hyperparameters.yaml")
    assert set(config.space) == {"train.learning_rate", "train.lora.rank", "train.warmup_share"}


@pytest.mark.parametrize(
    "overrides",
    [
        ["finetune.train.objective=dpo"],
        ["finetune.train.objective=distill", "finetune.train.distill={teacher: t@1, mode: texts}"],
    ],
)
def test_an_objective_without_a_loss_on_dialogues_is_refused(overrides):
    with pytest.raises(InvalidValue, match="the sweep compares losses on dialogues"):
        sweep(*overrides)


def test_trials_of_different_objectives_are_not_compared():
    with pytest.raises(InvalidValue, match=r"cannot hold train\.objective"):
        sweep(space="{train.objective: {type: choice, values: [sft]}}")
