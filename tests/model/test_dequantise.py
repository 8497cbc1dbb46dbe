"""A version in FP8, as DeepSeek publishes R1, becomes one in bfloat16 that can be trained; nothing quantised is trained as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from r1ray.cli import app
from r1ray.config import load_config
from r1ray.errors import DiskFull, UnsupportedModel
from r1ray.model import template
from r1ray.model.checkpoint import INDEX, Stored, stored_tensors, write_tensors
from r1ray.model.dequantise import check_trainable, dequantised_version
from r1ray.model.importer import import_model
from r1ray.model.load import load_model
from r1ray.train.config import FinetuneConfig
from r1ray.train.launcher import show
from tests.fp8 import save_as_fp8


def in_two_files(directory: Path) -> Path:
    """Its factors in another file than the weights that they belong to."""
    tensors = load_file(directory / "model.safetensors")
    parts = [{name: tensor for name, tensor in tensors.items() if ("_scale_inv" in name) is is_factor} for is_factor in (False, True)]
    parts[1]["lm_head.weight"] = parts[0].pop("lm_head.weight")
    files = {f"model-0000{number}-of-00002.safetensors": part for number, part in enumerate(parts, start=1)}
    for file, part in files.items():
        save_file(part, directory / file, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (directory / INDEX).write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()
    return directory


@pytest.fixture
def published(tiny_deepseek_v3, tmp_path, registry):
    """(an FP8 version in two files, a directory of what it stands for)."""
    save_as_fp8(tiny_deepseek_v3, tmp_path / "fp8", block=(16, 24), plain=tmp_path / "plain")
    return import_model(str(in_two_files(tmp_path / "fp8")), name="r1", registry=registry), tmp_path / "plain"


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_an_fp8_version_becomes_the_numbers_that_it_stands_for(published, registry) -> None:
    source, plain = published
    artifact = dequantised_version("r1", registry)
    found, right = tensors(artifact.path), tensors(plain)
    assert found.keys() == right.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in right.items())
    assert sum(tensor.dtype == torch.bfloat16 for tensor in found.values()) > 20
    assert json.loads((artifact.path / INDEX).read_text())["weight_map"].keys() == right.keys()
    manifest = artifact.manifest
    assert (artifact.ref, manifest.parents, manifest.num_parameters) == ("r1-bf16@1", (source.ref,), sum(t.numel() for t in right.values()))
    assert template.read(artifact) == template.read(source)


def test_what_came_of_it_is_loaded_and_trained_as_any_other(published, registry) -> None:
    artifact = dequantised_version("r1", registry, name="mine")
    check_trainable(artifact)
    ids = torch.arange(20, 40)[None]
    expected = load_model(import_model(str(published[1]), name="plain", registry=registry), registry=registry, dtype="float32")(ids).logits
    assert torch.equal(load_model(artifact, registry=registry, dtype="float32")(ids).logits, expected)


def test_a_job_on_an_fp8_base_is_refused_with_the_way_out(published, settings) -> None:
    config = load_config(FinetuneConfig, None, ["base=r1", "data.path=none.jsonl", "show=1"])
    with pytest.raises(UnsupportedModel, match=r"r1@1 are stored in fp8.*r1ray dequantise r1@1, and train that version"):
        show(config, settings)


def test_a_base_that_is_quantised_otherwise_is_refused_too(tiny_qwen2, registry, tmp_path) -> None:
    directory = tmp_path / "gptq"
    shutil.copytree(tiny_qwen2, directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    artifact = import_model(str(directory), name="small", registry=registry)
    with pytest.raises(UnsupportedModel, match=r"stored in gptq.*as it was before it was quantised"):
        check_trainable(artifact)
    with pytest.raises(UnsupportedModel, match="gptq"):
        dequantised_version("small", registry)


def test_plain_weights_are_left_alone(tiny_qwen2, registry) -> None:
    check_trainable(import_model(str(tiny_qwen2), name="plain", registry=registry))
    with pytest.raises(UnsupportedModel, match="not quantised"):
        dequantised_version("plain", registry)


def test_a_full_disk_is_said_before_anything_is_written(published, registry, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(DiskFull, match="GiB"):
        dequantised_version("r1", registry)
    assert [model.name for model in registry.models()] == ["r1"]


def test_a_missing_factor_leaves_nothing_behind(tiny_deepseek_v3, registry, tmp_path) -> None:
    file = save_as_fp8(tiny_deepseek_v3, tmp_path / "fp8", block=(16, 24)) / "model.safetensors"
    kept = load_file(file)
    gone = next(name for name in sorted(kept) if name.endswith("_scale_inv"))
    save_file({name: tensor for name, tensor in kept.items() if name != gone}, file, {"format": "pt"})
    import_model(str(tmp_path / "fp8"), name="r1", registry=registry)
    with pytest.raises(UnsupportedModel, match=gone):
        dequantised_version("r1", registry)
    assert [model.name for model in registry.models()] == ["r1"]


def test_a_file_written_tensor_by_tensor_is_read_back_by_safetensors(tmp_path) -> None:
    torch.manual_seed(0)
    kept = {
        "a": torch.randn(3, 5).to(torch.bfloat16),
        "b": torch.randn(7),
        "c": torch.tensor(True),
        "d": torch.arange(4),
        "e": torch.empty(0, 3),
        "f": torch.randn(4, 6).T,
    }
    kinds = {"a": "BF16", "b": "F32", "c": "BOOL", "d": "I64", "e": "F32", "f": "F32"}
    stored = {name: Stored(kinds[name], tuple(tensor.shape)) for name, tensor in kept.items()}
    write_tensors(tmp_path / "x.safetensors", stored, kept.__getitem__)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())
    assert stored_tensors(tmp_path / "x.safetensors") == stored


def test_the_command_names_the_version_that_it_made(published, settings) -> None:
    done = CliRunner().invoke(app, ["dequantise", "r1", "--name", "plain-r1"])
    assert done.exit_code == 0
    assert done.output.startswith("plain-r1@1: ")
