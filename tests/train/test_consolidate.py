"""Tensors that workers hold in parts are asked for one by one, everywhere in the same order, and let go where they are not written."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from r1ray.model.checkpoint import weight_files
from r1ray.train import consolidate
from r1ray.train.consolidate import take_part, write_weights


class Split:
    """A tensor in parts: notes when it is put together, and how many others are whole by then."""

    def __init__(self, name: str, tensor: torch.Tensor, asked: list[str], whole: list[weakref.ref[torch.Tensor]]) -> None:
        self._name, self._tensor, self._asked, self._whole = name, tensor, asked, whole

    def contiguous(self) -> torch.Tensor:
        assert not any(other() is not None for other in self._whole), "the one before was let go"
        made = self._tensor.clone()
        self._asked.append(self._name)
        self._whole.append(weakref.ref(made))
        return made


@pytest.fixture(params=["tiny_qwen2", "tiny_deepseek_v3"])
def model(request: pytest.FixtureRequest) -> Any:
    return AutoModelForCausalLM.from_pretrained(request.getfixturevalue(request.param))


def split(model: Any, asked: list[str]) -> dict[str, Any]:
    """Every other tensor is in parts."""
    whole: list[weakref.ref[torch.Tensor]] = []
    state = model.state_dict().items()
    return {name: Split(name, tensor, asked, whole) if number % 2 else tensor for number, (name, tensor) in enumerate(state)}


def test_who_holds_a_part_is_asked_in_the_order_of_the_one_that_writes_and_keeps_one_tensor_at_a_time(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consolidate, "_SHARD_BYTES", 100_000)
    by_writer: list[str] = []
    by_other: list[str] = []
    write_weights(model, split(model, by_writer), tmp_path)
    model.config.save_pretrained(tmp_path)
    take_part(model, split(model, by_other))
    assert by_writer == by_other and len(by_writer) > 5
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())
    assert len(weight_files(tmp_path)) > 1
