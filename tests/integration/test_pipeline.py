"""A model over several raylets generates what one process generates, and a dead stage is an error for every stream at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray


def three_layers(directory: Path, out: Path) -> Path:
    """The same model with a third layer, so that it can have three stages."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(directory, out)
    config = AutoConfig.from_pretrained(directory)
    config.num_hidden_layers = 3
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * 3
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(out)
    return out


def test_stages_on_nodes_of_their_own_generate_what_one_process_does(tiny_qwen2: Path, tiny_deepseek_v3: Path, tmp_path: Path) -> None:
    environment = os.environ | {"R1RAY_HOME": str(tmp_path / "home"), "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    models = [three_layers(model, tmp_path / model.name) for model in (tiny_qwen2, tiny_deepseek_v3)]
    command = [sys.executable, str(Path(__file__).with_name("pipeline.py")), *map(str, models)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert done.returncode == 0 and lines, done.stdout[-2000:] + done.stderr[-4000:]
    found = json.loads(lines[0].removeprefix("FOUND "))
    assert found.pop("placed") == {"r1-distill-qwen-32b": 1, "r1-distill-qwen-32b-vllm": 1, "r1": 2}
    given = found.pop("given")
    assert (given["driver"], given["0"], len(given["1"])) == (None, [], 1)
    *seen, state = found.pop("killed")
    assert len(seen) == 5
    assert all("EngineStopped" in outcome and "stage of the pipeline is gone" in outcome for outcome in seen), seen
    assert state == "failed"
    tensor = found.pop("tensor")
    of_last, first, again = tensor["nodes"]
    assert first == again != of_last, "the tensor ranks of a stage lie in its node"
    assert tensor["tokens"] == found["deepseek/1/auto"]["tokens"]
    for key, run in found.items():
        name, stages, _ = key.split("/")
        assert run["nodes"] == int(stages) - 1, key
        assert run["tokens"] == found[f"{name}/1/auto"]["tokens"], key
    assert all(len(tokens) == 12 for run in found.values() for tokens in run["tokens"])
