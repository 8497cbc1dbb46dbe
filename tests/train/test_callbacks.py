from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from r1ray.errors import TrainingError
from r1ray.train.callbacks import Pace
from r1ray.train.config import TrainConfig
from r1ray.train.progress import curve
from r1ray.train.schedule import Schedule
from r1ray.train.trainer import Tally


class FakeTrainer:
    """What the callback asks of its trainer: ten tokens per step, a fixed rate."""

    def __init__(self, nll: float) -> None:
        self.tally = Tally()
        self.tally.add(torch.tensor(nll))
        self.feed = SimpleNamespace(num_trained=lambda _: 10, num_tokens=lambda _: 20)
        self.schedule = Schedule(100, 0.05, 0.1, max_seconds=60)
        self.learning_rate = 0.5
        self.model_wrapped = object()
        self.marks = dict
        self.num_trained_tensors = 0
        self.held_norms = dict


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


class Slow(Silent):
    """A disk on which a save takes 0.2 s."""

    def save(self, _metrics, source, _destination, publish) -> None:
        time.sleep(0.2)
        publish(source)


def saves(watching: Pace, tmp_path, num_steps: int, first: int = 1) -> list[bool]:
    """Whether each of the steps was saved, done as transformers does them."""
    arguments, found = SimpleNamespace(device="cpu", output_dir=str(tmp_path / "staged")), []
    for step in range(first, first + num_steps):
        control = SimpleNamespace(should_training_stop=False, should_save=False)
        watching.on_pre_optimizer_step(arguments, SimpleNamespace(global_step=step - 1))
        watching.on_step_end(arguments, SimpleNamespace(global_step=step), control)
        if control.should_save:
            (tmp_path / "staged" / f"checkpoint-{step}").mkdir(parents=True)
            watching.on_save(arguments, SimpleNamespace(global_step=step))
        found.append(control.should_save)
    return found


def test_a_save_that_takes_longer_than_the_interval_is_not_due_again_at_once(tmp_path, caplog) -> None:
    watching = pace(tmp_path, FakeTrainer(20.0), checkpoint_every_seconds=0.1)
    watching.reporter = Slow()
    watching._began -= 0.1
    assert saves(watching, tmp_path, 5) == [True, False, False, False, False]
    watching._began -= 1.0
    assert saves(watching, tmp_path, 3, first=6) == [False] * 3, "saving takes a tenth of the time at most"
    watching._began -= 1.0
    assert saves(watching, tmp_path, 3, first=9) == [True, False, False]
    assert caplog.text.count("the next save comes") == 1, "it is said once"
    assert watching.curve is not None and all(step.seconds < 0.2 for step in curve(tmp_path)), "a save is no part of the next step"
