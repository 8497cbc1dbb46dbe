"""Artifacts into memory: adapters on the right base, merged into the same answers."""

from __future__ import annotations

import pytest
import torch

from r1ray.errors import AdapterMismatch, ArtifactInvalid
from r1ray.model.adapters import lora
from r1ray.model.family import family_of
from r1ray.model.importer import import_model
from r1ray.model.load import base_of, choose_dtype, end_token_id, load_model, load_tokenizer, merge_adapter
from r1ray.model.merging import merged_version

FAMILIES = ["tiny_llama", "tiny_qwen2", "tiny_deepseek_v3"]
IDS = torch.tensor([[5, 17, 301, 42, 99, 300, 12, 7]])


def add_adapter(base_dir, out, registry, *, scale=0.05, use_dora=False):
    """Import `base_dir` as `base` and a random adapter on it as `a`."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    import_model(str(base_dir), name="base", registry=registry)
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    adapted = get_peft_model(model, lora(family_of(model.config.to_dict()), rank=4, alpha=8, use_dora=use_dora))
    torch.manual_seed(1)
    for name, tensor in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=scale)
    adapted.save_pretrained(out)
    return import_model(str(out), name="a", registry=registry, base="base")


def test_the_end_token_is_read_as_the_tokenizer_says_it(tiny_llama, registry):
    artifact = import_model(str(tiny_llama), name="m", registry=registry)
    right = load_tokenizer(artifact).eos_token_id
    assert right is not None
    assert end_token_id(artifact) == right
    (artifact.path / "tokenizer_config.json").write_text('{"eos_token": "no such word"}')
    assert end_token_id(artifact) == load_tokenizer(artifact).eos_token_id


@pytest.mark.parametrize("family", FAMILIES)
def test_an_imported_model_gives_the_originals_logits(family, request, registry):
    from transformers import AutoModelForCausalLM

    directory = request.getfixturevalue(family)
    artifact = import_model(str(directory), name="m", registry=registry)
    model = load_model(artifact, registry=registry, dtype="float32")
    assert not model.training
    assert torch.equal(model(IDS).logits, AutoModelForCausalLM.from_pretrained(directory)(IDS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_gives_the_adapters_logits(family, request, registry, tmp_path):
    artifact = add_adapter(request.getfixturevalue(family), tmp_path / "a", registry)
    plain = load_model(base_of(artifact, registry), registry=registry, dtype="float32")(IDS).logits
    apart = load_model(artifact, registry=registry, dtype="float32", merge=False)(IDS).logits
    merged = load_model(artifact, registry=registry, dtype="float32")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(merged(IDS).logits, apart, rtol=1e-4, atol=1e-5)
    assert (apart - plain).norm() / plain.norm() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_directory_can_be_imported(family, request, registry, tmp_path):
    artifact = add_adapter(request.getfixturevalue(family), tmp_path / "a", registry)
    merge_adapter(artifact, tmp_path / "merged", registry)
    full = import_model(str(tmp_path / "merged"), registry=registry)
    assert full.manifest.kind == "full"
    assert full.manifest.template == artifact.manifest.template
    assert full.manifest.num_parameters == base_of(artifact, registry).manifest.num_parameters
    expected = load_model(artifact, registry=registry, dtype="float32")(IDS).logits
    torch.testing.assert_close(load_model(full, registry=registry, dtype="float32")(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_dora_merges_too(tiny_qwen2, registry, tmp_path):
    artifact = add_adapter(tiny_qwen2, tmp_path / "a", registry, use_dora=True)
    apart = load_model(artifact, registry=registry, dtype="float32", merge=False)(IDS).logits
    torch.testing.assert_close(load_model(artifact, registry=registry, dtype="float32")(IDS).logits, apart, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merge_is_rounded_once_and_leaves_the_frequencies_alone(family, request, registry, tmp_path):
    artifact = add_adapter(request.getfixturevalue(family), tmp_path / "a", registry)
    merge_adapter(artifact, tmp_path / "merged", registry)
    written = load_model(import_model(str(tmp_path / "merged"), registry=registry), registry=registry, dtype="bfloat16")
    merged = load_model(artifact, registry=registry, dtype="bfloat16")
    assert merged.dtype == torch.bfloat16
    for theirs, ours in (
        (dict(written.named_parameters()), dict(merged.named_parameters())),
        (dict(written.named_buffers()), dict(merged.named_buffers())),
    ):
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(tensor, ours[name]) and tensor.dtype == ours[name].dtype for name, tensor in theirs.items())


def test_a_diverged_adapter_is_not_merged(tiny_qwen2, registry, tmp_path):
    artifact = add_adapter(tiny_qwen2, tmp_path / "a", registry, scale=float("inf"))
    with pytest.raises((AdapterMismatch, ValueError)):
        merge_adapter(artifact, tmp_path / "merged", registry)
    assert not (tmp_path / "merged").exists()


def test_a_base_with_other_weights_is_refused(tiny_qwen2, registry, tmp_path):
    artifact = add_adapter(tiny_qwen2, tmp_path / "a", registry)
    manifest = artifact.manifest.model_copy(update={"base_sha256": "0" * 64})
    stranger = type(artifact)(path=artifact.path, manifest=manifest, version=1)
    with pytest.raises(AdapterMismatch, match="000000000000"):
        load_model(stranger, registry=registry)


def test_full_weights_stand_on_no_base(tiny_qwen2, registry):
    with pytest.raises(AdapterMismatch, match="stands on no base"):
        base_of(import_model(str(tiny_qwen2), name="m", registry=registry), registry)


def test_a_tensor_that_is_missing_is_noticed(tiny_qwen2, registry, tmp_path):
    from safetensors.torch import load_file, save_file

    artifact = import_model(str(tiny_qwen2), name="m", registry=registry)
    tensors = load_file(artifact.path / "model.safetensors")
    gone = sorted(name for name in tensors if "o_proj" in name)[0]
    del tensors[gone]
    (artifact.path / "model.safetensors").unlink()  # a hard link: the fixture's own file must not change
    save_file(tensors, artifact.path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactInvalid, match=gone):
        load_model(artifact, registry=registry)


def test_auto_takes_bfloat16_only_where_it_is_fast(tiny_qwen2, registry):
    dtype, reason = choose_dtype("cpu")
    assert dtype in (torch.bfloat16, torch.float32)
    assert "CPU" in reason
    artifact = import_model(str(tiny_qwen2), name="m", registry=registry)
    assert load_model(artifact, registry=registry).dtype == dtype


def test_a_tokenizer_can_pad(tiny_qwen2, registry):
    assert load_tokenizer(import_model(str(tiny_qwen2), name="m", registry=registry)).pad_token is not None


def test_a_merged_version_stands_on_its_own_and_names_its_parent(tiny_qwen2, registry, tmp_path):
    artifact = add_adapter(tiny_qwen2, tmp_path / "a", registry)
    merged = merged_version(artifact.ref, registry)
    assert merged == registry.resolve(f"{artifact.manifest.name}-merged@1")
    shape = merged.manifest
    assert (shape.kind, shape.base, shape.parents) == ("full", None, (artifact.ref,))
    assert shape.num_parameters == base_of(artifact, registry).manifest.num_parameters
    assert not list(merged.path.glob("adapter_*"))
    expected = load_model(artifact, registry=registry, dtype="float32")(IDS).logits
    torch.testing.assert_close(load_model(merged, registry=registry, dtype="float32")(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_whole_weights_are_not_merged_again(tiny_qwen2, registry, tmp_path):
    base = base_of(add_adapter(tiny_qwen2, tmp_path / "a", registry), registry)
    with pytest.raises(AdapterMismatch, match="whole already"):
        merged_version(base.ref, registry)
    assert [model.name for model in registry.models() if model.name.endswith("-merged")] == []


def test_weights_go_straight_to_the_device_that_is_named(tiny_llama, registry):
    """torch's device without memory stands for a GPU."""
    model = load_model(import_model(str(tiny_llama), name="m", registry=registry), registry=registry, dtype="float16", device="meta")
    assert {(parameter.device.type, parameter.dtype) for parameter in model.parameters()} == {("meta", torch.float16)}
