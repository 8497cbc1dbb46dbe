"""Incomplete model directories are told apart before anything is loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from r1ray.errors import UnsupportedModel
from r1ray.model.checkpoint import INDEX, checkpoint_tensors, link_or_copy, num_parameters, read_json, tensor_shapes, weight_files


def test_shards_come_in_name_order(tiny_llama):
    files = weight_files(tiny_llama)
    assert files == sorted(tiny_llama.glob("*.safetensors"))
    assert len(files) > 1


def test_parameters_are_counted_without_loading(tiny_llama, tiny_qwen2):
    from transformers import AutoModelForCausalLM

    for directory in (tiny_llama, tiny_qwen2):
        model = AutoModelForCausalLM.from_pretrained(directory)
        assert num_parameters(weight_files(directory)) == sum(p.numel() for p in model.parameters())


def test_every_tensor_is_read_as_safetensors_reads_it(tiny_llama):
    from safetensors.torch import load_file

    tensors = checkpoint_tensors(tiny_llama)
    for file in weight_files(tiny_llama):
        for name, right in load_file(file).items():
            found = tensors(name)
            assert found.dtype == right.dtype
            assert torch.equal(found, right)
    assert tensors("no.such.tensor") is None


def test_a_type_that_torch_has_not_is_named(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(4, dtype=torch.int32)}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data.replace(b'"I32"', b'"X32"'))
    with pytest.raises(UnsupportedModel, match="holds a as X32"):
        checkpoint_tensors(tmp_path)("a")


def test_a_missing_shard_is_named(tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "m")
    gone = weight_files(tmp_path / "m")[1]
    gone.unlink()
    with pytest.raises(UnsupportedModel, match=gone.name):
        weight_files(tmp_path / "m")


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match="pickled"):
        weight_files(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path):
    with pytest.raises(UnsupportedModel, match="no weights"):
        weight_files(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match="neither"):
        weight_files(tmp_path)


def test_an_index_without_entries_is_refused(tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(UnsupportedModel, match="weight_map"):
        weight_files(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_noticed(tiny_qwen2, tmp_path, keep):
    data = (tiny_qwen2 / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(UnsupportedModel, match=r"cut off|no safetensors"):
        tensor_shapes([tmp_path / "model.safetensors"])


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_an_unreadable_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        read_json(tmp_path / "config.json")


def test_a_link_leaves_the_source_in_place(tmp_path):
    (tmp_path / "a").write_text("weights")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text() == "weights"
