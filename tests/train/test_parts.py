from __future__ import annotations

import pickle
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from r1ray.config import load_config
from r1ray.errors import InvalidValue, NothingToTrain
from r1ray.train.config import FinetuneConfig
from r1ray.train.parts import held_out, parted
from r1ray.train.standing import Standing


@dataclass(frozen=True)
class Numbers:
    """A material of two columns."""

    num_rows: int
    told: str = "numbers"
    path: Path = Path("numbers")
    is_mixed: bool = False
    is_complete: bool = True
    per_origin: int = 1

    def origins(self) -> npt.NDArray[np.uint64]:
        """`per_origin` rows each, not side by side."""
        return np.array([row % (self.num_rows // self.per_origin or 1) for row in range(self.num_rows)], np.uint64)

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


@given(num_origins=st.integers(2, 100), per_origin=st.integers(2, 5), share=st.floats(0.001, 0.9), seed=st.integers(0, 9))
def test_rows_of_one_origin_are_never_on_both_sides(num_origins, per_origin, share, seed) -> None:
    material = Numbers(num_origins * per_origin, per_origin=per_origin)
    sides = [{number % num_origins for number in side.lengths()} for side in parted(material, share, seed)]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == num_origins
    assert len(sides[1]) == min(max(1, round(share * num_origins)), num_origins - 1)


def test_added_rows_move_hardly_any_other() -> None:
    before, after = (set(parted(Numbers(num), 0.2, 0)[1].lengths()) for num in (1000, 1100))
    assert len(before - after) < 20 and 200 <= len(after) <= 240
    assert parted(Numbers(1000), 0.2, 1)[1].lengths() != parted(Numbers(1000), 0.2, 0)[1].lengths()


def test_a_million_rows_are_parted_by_what_they_come_from_in_bounded_memory() -> None:
    origins = np.random.default_rng(0).integers(0, 2**63, 1_000_000).astype(np.uint64)
    tracemalloc.start()
    held = held_out(origins, 0.05, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held.sum() == 50_000
    assert peak < 60 * 2**20


@pytest.mark.parametrize("material", [Numbers(1), Numbers(6, per_origin=6)])
def test_rows_of_one_origin_alone_cannot_be_parted(material) -> None:
    with pytest.raises(NothingToTrain, match="eval_share"):
        parted(material, 0.1, 0)


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
