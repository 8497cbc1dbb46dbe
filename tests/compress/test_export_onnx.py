"""A registered version -> a version of kind onnx that answers alike, or nothing."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
import torch

from r1ray.compress.config import ExportOnnxConfig, ParityConfig
from r1ray.compress.onnx import export_onnx
from r1ray.compress.parity import Parity, check_parity
from r1ray.engine.config import EngineConfig
from r1ray.engine.create import create_engine
from r1ray.engine.offline import generate_all
from r1ray.engine.protocol import GenerationRequest
from r1ray.errors import CompressionError, InvalidValue, UnsupportedModel
from r1ray.model.importer import import_model
from r1ray.model.load import load_model
from r1ray.types import Message, Sampling, SamplingPolicy

SMALL = {"num_tokens": 600, "num_prompts": 3, "num_new": 8}


def louder(directory: Path, out: Path) -> Path:
    """The tiny model with larger weights: as initialised it likes all tokens alike and no rounding would show."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(directory, out)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.mul_(6)
    for file in out.glob("*.safetensors*"):
        file.unlink()
    model.save_pretrained(out)
    return out


def exported(registry, settings, source: str, **given):
    parity = ParityConfig(**{**SMALL, **given.pop("parity", {})})
    return export_onnx(ExportOnnxConfig(model=source, parity=parity, **given), settings)


def answers(artifact, registry, config: EngineConfig) -> list[tuple[int, ...]]:

    engine = create_engine(artifact, config, registry)
    sampling = Sampling(temperature=0, max_tokens=10)
    requests = [GenerationRequest(id=str(i), prompt_ids=(5 + i, 6, 7), sampling=sampling, ignore_eos=True) for i in range(4)]
    try:
        return [done.token_ids for done in generate_all(engine, requests)]
    finally:
        asyncio.run(engine.stop())


def test_a_float32_export_is_a_version_that_answers_like_its_parent(tiny_qwen2, tmp_path, registry, settings):
    parent = import_model(str(louder(tiny_qwen2, tmp_path / "loud")), name="loud", registry=registry)
    artifact = exported(registry, settings, "loud", precision="float32")
    manifest = registry.verify(artifact.ref).manifest
    assert (artifact.ref, manifest.kind, manifest.parents, manifest.family) == ("loud@2", "onnx", ("loud@1",), "qwen2")
    assert manifest.template.sha256 == parent.manifest.template.sha256
    assert manifest.num_parameters == parent.manifest.num_parameters
    assert manifest.metrics["parity_greedy_equal"] == 1
    assert abs(manifest.metrics["parity_perplexity_loss"]) < 1e-4
    assert {"engine.onnx", "model.onnx", "model.onnx.data", "genai_config.json", "tokenizer.json"} <= set(manifest.files)
    assert not any(name.endswith(".safetensors") for name in manifest.files)
    torch_config = EngineConfig(backend="transformers", dtype="float32", num_threads=1)
    assert answers(artifact, registry, EngineConfig(type="onnx", num_threads=1)) == answers(parent, registry, torch_config)


def test_an_adapter_is_merged_before_it_is_exported(tiny_llama, tmp_path, registry, settings):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    import_model(str(tiny_llama), name="base", registry=registry)
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama), lora).save_pretrained(tmp_path / "adapter")
    tuned = import_model(str(tmp_path / "adapter"), name="tuned", registry=registry, base="base@1")
    artifact = exported(registry, settings, tuned.ref, precision="float32", name="edge")
    assert (artifact.ref, artifact.manifest.parents) == ("edge@1", ("tuned@1",))
    assert artifact.manifest.num_parameters == sum(p.numel() for p in load_model(tuned, registry=registry).parameters())
    assert not any((settings.home / "cache").glob("merged-*"))
    torch_config = EngineConfig(backend="transformers", dtype="float32", num_threads=1)
    assert answers(artifact, registry, EngineConfig(type="onnx", num_threads=1)) == answers(tuned, registry, torch_config)


def test_an_int8_export_keeps_what_the_gate_asks_for(tiny_llama, tmp_path, registry, settings):
    import_model(str(louder(tiny_llama, tmp_path / "loud")), name="loud", registry=registry)
    artifact = exported(registry, settings, "loud", precision="int8", parity={"max_perplexity_loss": 0.05})
    assert 0.9 < artifact.manifest.metrics["parity_first_choices"] < 1
    assert artifact.manifest.config["precision"] == "int8"


def test_an_export_that_answers_too_differently_is_refused_and_leaves_nothing(tiny_llama, tmp_path, registry, settings):
    import_model(str(louder(tiny_llama, tmp_path / "loud")), name="loud", registry=registry)
    with pytest.raises(CompressionError, match=r"first choices are the same \(parity.min_first_choices is 80.0%\).* higher precision"):
        exported(registry, settings, "loud", precision="int4", int4_method="rtn", int4_mixed=False)
    assert [info.version for info in registry.versions("loud")] == [1]
    assert len(list((settings.artifacts / "loud").iterdir())) == 1


def test_the_sampling_policy_of_the_parent_goes_along(tiny_llama, registry, settings):
    parent = import_model(str(tiny_llama), name="plain", registry=registry)
    policy = SamplingPolicy(default=Sampling(temperature=0.3))
    registry.attach_policy(parent.ref, policy)
    assert exported(registry, settings, "plain", precision="float32").policy == policy


def test_an_architecture_that_the_builder_lacks_is_refused(tiny_deepseek_v3, registry, settings):
    import_model(str(tiny_deepseek_v3), name="r1", registry=registry)
    with pytest.raises(UnsupportedModel, match=r"cannot export .* engine.type=torch"):
        exported(registry, settings, "r1", precision="float32")
    assert len(registry.versions("r1")) == 1


def test_kinds_and_engines_that_do_not_fit_say_what_to_do(tiny_llama, registry, settings):
    parent = import_model(str(tiny_llama), name="plain", registry=registry)
    artifact = exported(registry, settings, "plain", precision="float32")
    with pytest.raises(UnsupportedModel, match=r"plain@2 is an ONNX export already.*plain@1"):
        exported(registry, settings, "plain@2")
    with pytest.raises(UnsupportedModel, match=r"Set engine.type=onnx"):
        create_engine(artifact, EngineConfig(), registry)
    with pytest.raises(UnsupportedModel, match=r"plain@1 is of kind full.*export_onnx"):
        create_engine(parent, EngineConfig(type="onnx"), registry)


@pytest.mark.parametrize("loss", [0.02, float("nan")])
def test_the_gate_holds_for_every_figure(loss):
    figures = {"num_tokens": 10, "reference_perplexity": 10.0, "logit_error": 0.2, "first_choices": 0.9, "greedy_equal": 0.5}
    with pytest.raises(CompressionError, match=r"perplexity grew by .* higher precision"):
        check_parity(Parity(perplexity=10 * (1 + loss), **figures), ParityConfig(), exact=False)
    check_parity(Parity(perplexity=10.1, **figures), ParityConfig(), exact=False)
    with pytest.raises(CompressionError, match=r"a logit differs by 0.2.*50% of the greedy answers"):
        check_parity(Parity(perplexity=10.0, **figures), ParityConfig(), exact=True)


def test_too_little_text_and_float16_on_a_cpu_are_refused(tiny_llama, tmp_path, registry, settings):
    import_model(str(tiny_llama), name="plain", registry=registry)
    (tmp_path / "short.txt").write_text("few words")
    with pytest.raises(CompressionError, match=r"Give a longer parity.text"):
        exported(registry, settings, "plain", precision="float32", parity={"text": tmp_path / "short.txt"})
    with pytest.raises(InvalidValue, match=r"parity.text=.*missing.txt"):
        exported(registry, settings, "plain", precision="float32", parity={"text": tmp_path / "missing.txt"})
    with pytest.raises(ValueError, match="device=cuda"):
        ExportOnnxConfig(model="plain", precision="float16")


def test_an_export_answers_in_a_replica_and_a_wrong_engine_is_refused_before_deployment(tiny_llama, registry, settings):
    from r1ray.serve.catalog import look_up
    from r1ray.serve.config import ModelArgs
    from r1ray.serve.host import registry_host
    from r1ray.serve.protocol import Done, TextRequest

    import_model(str(tiny_llama), name="plain", registry=registry)
    exported(registry, settings, "plain", precision="float32")
    edge = ModelArgs(id="edge", ref="plain@2", engine=EngineConfig(type="onnx", num_threads=1))

    async def chat():
        host = registry_host(edge)
        await host.start()
        request = TextRequest(id="a", messages=(Message(role="user", content="hi"),), overrides={"max_tokens": 4}, ignore_eos=True)
        events = [event async for event in host.stream(request)]
        await host.stop()
        return events[-1]

    last = asyncio.run(chat())
    assert isinstance(last, Done)
    assert (last.ref, last.num_completion_tokens) == ("plain@2", 4)
    assert look_up([edge], settings)["edge"].card.root == "plain@2"
    with pytest.raises(UnsupportedModel, match=r"Set engine.type=onnx"):
        look_up([ModelArgs(id="wrong", ref="plain@2")], settings)
    with pytest.raises(UnsupportedModel, match="export_onnx"):
        look_up([ModelArgs(id="wrong", ref="plain@1", engine=EngineConfig(type="onnx"))], settings)


def test_an_export_is_evaluated_like_its_parent(tiny_llama, tmp_path, registry, settings):
    import json

    from r1ray.evaluate.config import EvaluateConfig
    from r1ray.evaluate.job import evaluate_models

    import_model(str(tiny_llama), name="plain", registry=registry)
    exported(registry, settings, "plain", precision="float32")
    rows = [{"messages": [{"role": "user", "content": f"card {i}?"}, {"role": "assistant", "content": "blocked"}]} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    common = {"data": {"path": tmp_path / "rows.jsonl"}, "sampling": {"temperature": 0, "max_tokens": 8}, "num_bootstrap": 0}
    torch_engine = {"backend": "transformers", "dtype": "float32", "num_threads": 1}
    (parent,) = evaluate_models(EvaluateConfig(models=["plain@1"], engine=torch_engine, **common), settings)
    (edge,) = evaluate_models(EvaluateConfig(models=["plain@2"], engine={"type": "onnx", "num_threads": 1}, **common), settings)
    assert [row["answer"] for row in edge.examples] == [row["answer"] for row in parent.examples]
    assert edge.metrics["perplexity"] == pytest.approx(parent.metrics["perplexity"], rel=1e-4)
