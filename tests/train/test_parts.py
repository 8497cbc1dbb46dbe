from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1ray.config import load_config
from r1ray.errors import InvalidValue, NothingToTrain
from r1ray.train.config import FinetuneConfig
from r1ray.train.parts import parted
from r1ray.train.standing import Standing


@dataclass(frozen=True)
class Numbers:
    """A material of two columns."""

    num_rows: int
    told: str = "numbers"
    path: Path = Path("numbers")
    is_mixed: bool = False
    is_complete: bool = True

    def lengths(self) -> list[int]:
        return list(range(self.num_rows))

    def rows(self) -> tuple[list[int], list[int]]:
        return self.lengths(), [-number for number in self.lengths()]


@settings(deadline=None)
@given(num_rows=st.integers(2, 300), share=st.floats(0.001, 0.5), seed=st.integers(0, 9))
def test_every_row_is_on_one_side_and_each_worker_draws_the_same(num_rows, share, seed) -> None:
    trained, held = parted(Numbers(num_rows), share, seed)
    assert sorted(trained.lengths() + held.lengths()) == list(range(num_rows))
    assert held.num_rows == max(1, round(share * num_rows))
    assert [list(column) for column in held.rows()] == [list(held.lengths()), [-number for number in held.lengths()]]
    copy = pickle.loads(pickle.dumps(trained))
    assert [list(column) for column in copy.rows()] == [list(column) for column in trained.rows()]


def test_one_row_cannot_be_parted() -> None:
    with pytest.raises(NothingToTrain, match="eval_share"):
        parted(Numbers(1), 0.1, 0)


def test_waiting_for_a_better_loss_ends_after_so_many_worse_ones() -> None:
    standing = Standing()
    for step, loss in enumerate((3.0, 2.0, 2.5, float("nan")), 1):
        assert not standing.is_over(2)
        standing = standing.after(step, loss)
    assert standing.is_over(2) and not standing.is_over(None)
    assert (standing.best_step, standing.best_loss) == (2, 2.0)
    assert standing.after(5, 1.0).num_worse == 0


def test_the_best_checkpoints_are_kept_before_newer_ones() -> None:
    best = Standing(best_step=4)
    assert best.kept_score(4) > best.kept_score(400) > best.kept_score(8)
    assert Standing(best_step=8).kept_score(8) > best.kept_score(4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("early_stopping_patience=2", "eval_share"),
        ("num_workers=[2,1]", "empty range"),
        ("dtype=float16", "needs a GPU"),
        ("offload=parameters", "zero_stage=3"),
    ],
)
def test_settings_that_cannot_work_are_refused(override, message) -> None:
    with pytest.raises(InvalidValue, match=message):
        load_config(FinetuneConfig, None, ["data.path=x.csv", f"train.{override}"])


@pytest.mark.parametrize(
    ("objective", "own"), [("dpo", "train.dpo.eval_share"), ("reward", "train.reward.eval_share"), ("grpo", "train.grpo.num_held_out")]
)
@pytest.mark.parametrize("wanted", ["eval_share=0.1", "early_stopping_patience=2"])
def test_an_objective_that_measures_otherwise_says_by_what(objective, own, wanted) -> None:
    with pytest.raises(InvalidValue, match=own):
        load_config(FinetuneConfig, None, ["data.path=x.csv", f"train.objective={objective}", f"train.{wanted}"])


def test_a_range_of_workers_and_a_number_are_both_understood() -> None:
    counts = []
    for text in ("3", "[1, 4]", "[2, 2]"):
        train = load_config(FinetuneConfig, None, ["data.path=x.csv", f"train.num_workers={text}"]).train
        counts.append((train.min_workers, train.max_workers, train.is_elastic))
    assert counts == [(3, 3, False), (1, 4, True), (2, 2, False)]
