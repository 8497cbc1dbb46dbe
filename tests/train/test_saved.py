from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from r1ray.errors import CheckpointCorrupt
from r1ray.train.saved import check_saved


def saved(directory: Path, *, up: float = 0.1, state: float = 1.0, num_layers: int = 2) -> Path:
    """What a rank leaves of a LoRA training: the adapter and its shard of the optimizer."""
    layers = {f"layers.{n}.lora_{part}.weight": torch.full((2, 2), up if part == "B" else 0.5) for n in range(num_layers) for part in "AB"}
    (directory / "global_step4").mkdir(parents=True)
    save_file(layers, directory / "adapter_model.safetensors")
    moments = {"state": {0: {"step": torch.tensor(4.0), "exp_avg": torch.full((8,), state)}}, "names": ["a"]}
    torch.save({"optimizer_state_dict": moments}, directory / "global_step4" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    return directory


def test_a_whole_save_is_counted(tmp_path) -> None:
    assert check_saved(saved(tmp_path / "good"), num_trained=4) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"up": float("nan")}, r"layers\.0\.lora_B\.weight has norm nan"),
        ({"state": float("inf")}, r"optim_states\.pt: .*exp_avg has norm inf"),
        ({"num_layers": 1}, "2 tensors where 4 are trained"),
    ],
)
def test_a_save_that_could_not_be_trained_on_is_no_checkpoint(tmp_path, changes, message) -> None:
    with pytest.raises(CheckpointCorrupt, match=message):
        check_saved(saved(tmp_path / "bad", **changes), num_trained=4)


def test_an_adapter_that_no_step_has_moved_is_a_checkpoint(tmp_path) -> None:
    held = {"layers.0.lora_A.weight": 1.0, "layers.0.lora_B.weight": 0.0}
    assert check_saved(saved(tmp_path / "unmoved", up=0.0), num_trained=4, held=held) == 6


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"layers.0.lora_B.weight": 0.2}, r"layers\.0\.lora_B\.weight was saved with norm 0, in memory it has 0\.2"),
        ({"layers.7.lora_A.weight": 0.0}, r"layers\.7\.lora_A\.weight was saved with norm 0"),
    ],
)
def test_what_is_in_memory_and_not_in_the_file_makes_it_no_checkpoint(tmp_path, held, message) -> None:
    with pytest.raises(CheckpointCorrupt, match=message):
        check_saved(saved(tmp_path / "empty", up=0.0), num_trained=4, held=held)


def test_a_part_of_a_tensor_is_less_than_the_whole(tmp_path) -> None:
    """Under ZeRO-3 a rank holds half of it."""
    assert check_saved(saved(tmp_path / "good", up=0.1), num_trained=4, held={"layers.0.lora_B.weight": 0.2 / 2**0.5}) == 6


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_a_file_that_was_cut_off_is_no_checkpoint(tmp_path, name) -> None:
    cut = saved(tmp_path / "cut") / name
    cut.write_bytes(cut.read_bytes()[:-150])
    with pytest.raises(CheckpointCorrupt, match="cannot be read again"):
        check_saved(tmp_path / "cut", num_trained=4)
