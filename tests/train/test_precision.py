"""GPUs without bfloat16 are refused with the key to set; the GPUs are named by a fake, since there are none here."""

from __future__ import annotations

from pathlib import Path

import pytest

from r1ray.errors import InvalidValue
from r1ray.train.config import TrainConfig
from r1ray.train.order import WorkOrder, _dtype
from r1ray.train.peers import Peers
from r1ray.train.precision import check_dtype
from tests.train.ranked import ranks

T4 = "the Tesla T4 (compute capability 7.5)"
ALONE = Peers(0, 1, None)


def order(**changes) -> WorkOrder:
    config = TrainConfig(use_gpu=True, **changes)
    rest = {"base": None, "material": None, "num_steps": 1, "attention": "sdpa", "settings": None}
    return WorkOrder(config=config, dtype=_dtype(config)[0], run="r", run_directory=Path(), **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "said"), [("auto", "train.dtype=auto, which is bfloat16 on GPUs"), ("bfloat16", "train.dtype=bfloat16")])
def test_a_gpu_without_bfloat16_is_named_with_the_key_to_set(dtype, said) -> None:
    with pytest.raises(InvalidValue) as caught:
        check_dtype(order(dtype=dtype), ALONE, lambda: T4)
    assert str(caught.value).startswith(f"{said}: {T4} of worker 0 has no bfloat16. Set train.dtype=float16")


@pytest.mark.parametrize("changes", [{"dtype": "float16"}, {"dtype": "float32"}, {"zero_stage": 0}])
def test_other_number_types_run_there(changes) -> None:
    check_dtype(order(**changes), ALONE, lambda: T4)


def test_a_gpu_that_has_it_is_not_refused() -> None:
    check_dtype(order(), ALONE, lambda: None)
    assert order().dtype == "bfloat16"


def test_one_old_gpu_among_many_ends_every_rank_with_the_same_words_and_no_collective() -> None:
    told = ranks(3, lambda peers: check_dtype(order(), peers, lambda: T4 if peers.rank == 2 else None))
    assert {type(error) for error in told} == {InvalidValue}
    assert {str(error).partition(" has no")[0] for error in told} == {f"train.dtype=auto, which is bfloat16 on GPUs: {T4} of worker 2"}
