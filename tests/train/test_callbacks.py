from __future__ import annotations

from types import SimpleNamespace

import pytest

from r1ray.errors import TrainingError
from r1ray.train.callbacks import Pace
from r1ray.train.config import TrainConfig
from r1ray.train.schedule import Schedule
from r1ray.train.trainer import Tally


class FakeTrainer:
    """What the callback asks of its trainer: ten tokens per step, a fixed rate."""

    def __init__(self, nll: float) -> None:
        self.tally = Tally(nll)
        self.feed = SimpleNamespace(num_trained=lambda _: 10, num_tokens=lambda _: 20)
        self.schedule = Schedule(100, 0.05, 0.1, max_seconds=60)
        self.learning_rate = 0.5
        self.model_wrapped = object()
        self.marks = dict


class Silent:
    """A reporter that nobody listens to."""

    leaving = False

    def report(self, metrics) -> None: ...

    def save(self, *_) -> None: ...

    def is_leaving(self) -> bool:
        return self.leaving


def pace(tmp_path, trainer: FakeTrainer, **changes) -> Pace:
    place = {"run": "r", "run_directory": tmp_path, "rank": 0, "world": 1}
    made = Pace(config=TrainConfig(**changes), **place, reporter=Silent(), elapsed_before_s=30.0)
    made.trainer = trainer  # type: ignore[assignment]
    made.on_train_begin()
    return made


ARGUMENTS = SimpleNamespace(device="cpu")


def test_a_loss_that_is_no_number_ends_training_with_step_and_rate(tmp_path) -> None:
    watching = pace(tmp_path, FakeTrainer(float("nan")))
    with pytest.raises(TrainingError, match=r"became nan at step 8 with learning rate 0\.5") as caught:
        watching.on_pre_optimizer_step(ARGUMENTS, SimpleNamespace(global_step=7))
    assert getattr(caught.value, "agreed", False), "another try would end the same way"


def test_the_time_of_earlier_attempts_counts_against_the_budget(tmp_path) -> None:
    trainer = FakeTrainer(20.0)
    watching = pace(tmp_path, trainer)
    control = SimpleNamespace(should_training_stop=False, should_save=False)
    watching.on_pre_optimizer_step(ARGUMENTS, SimpleNamespace(global_step=7))
    assert 30 <= trainer.schedule.elapsed_s < 31
    trainer.schedule.elapsed_s = 60.0
    watching.on_step_end(ARGUMENTS, SimpleNamespace(global_step=8), control)
    assert control.should_training_stop and control.should_save


def test_a_node_that_will_go_is_saved_for_once(tmp_path) -> None:
    watching = pace(tmp_path, FakeTrainer(20.0), checkpoint_every_seconds=None)
    saved = []
    for step, leaving in enumerate((False, True, True, False), 1):
        control = SimpleNamespace(should_training_stop=False, should_save=False)
        watching.reporter.leaving = leaving
        watching.on_pre_optimizer_step(ARGUMENTS, SimpleNamespace(global_step=step - 1))
        watching.on_step_end(ARGUMENTS, SimpleNamespace(global_step=step), control)
        saved.append(control.should_save)
    assert saved == [False, True, False, False]
