"""GGUF to safetensors: our fast way gives what transformers' own loader gives."""

from __future__ import annotations

import json

import gguf
import numpy as np
import pytest
import torch

from r1ray.errors import UnsupportedModel
from r1ray.model import convert
from r1ray.model.convert import convert_gguf

LAYERS, HEADS, KV_HEADS, HIDDEN, FFN, VOCABULARY = 2, 4, 2, 64, 96, 640


def write_gguf(path, tokenizer, *, arch="llama", tied=False, extra=()):
    """A small random file with quantised matrices, as llama.cpp's converter lays one out."""
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    _write_tokenizer(writer, tokenizer)
    for key, value in extra:
        writer.add_float32(f"{arch}.{key}", value)
    rng = np.random.default_rng(0)
    for name, shape in _shapes(arch, tied):
        values = rng.normal(0, 0.3, shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.F32 if len(shape) == 1 else gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind) if len(shape) > 1 else values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_tokenizer(writer, tokenizer):
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    tokens += [f"<unused{i}>" for i in range(VOCABULARY - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_bos_token_id(tokens.index("<|im_start|>"))
    writer.add_chat_template(tokenizer.chat_template)


def _shapes(arch, tied):
    shapes = [("token_embd.weight", (VOCABULARY, HIDDEN)), ("output_norm.weight", (HIDDEN,))]
    shapes += [] if tied else [("output.weight", (VOCABULARY, HIDDEN))]
    kv = HIDDEN // HEADS * KV_HEADS
    matrices = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN), "attn_output": (HIDDEN, HIDDEN)}
    matrices |= {"ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN), "ffn_down": (HIDDEN, FFN)}
    for layer in range(LAYERS):
        shapes += [(f"blk.{layer}.{part}.weight", shape) for part, shape in matrices.items()]
        shapes += [(f"blk.{layer}.{part}.weight", (HIDDEN,)) for part in ("attn_norm", "ffn_norm")]
        if arch == "qwen2":
            shapes += [(f"blk.{layer}.{part}.bias", (size,)) for part, size in (("attn_q", HIDDEN), ("attn_k", kv), ("attn_v", kv))]
    return shapes


@pytest.fixture
def tokenizer(tiny_tokenizer):
    from r1ray.model import template

    return tiny_tokenizer(template.shipped("chatml"))


@pytest.mark.parametrize(("arch", "tied"), [("llama", True), ("llama", False), ("qwen2", True)])
def test_the_fast_way_gives_transformers_logits(tmp_path, tokenizer, monkeypatch, arch, tied):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = write_gguf(tmp_path / "m.gguf", tokenizer, arch=arch, tied=tied)
    fast = convert_gguf(file, tmp_path / "fast")
    monkeypatch.setattr(convert, "_known_config", lambda reader: None)
    slow = convert_gguf(file, tmp_path / "slow")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(place) for place in (fast, slow))
    ids = torch.tensor([AutoTokenizer.from_pretrained(fast)("I lost my card 银行")["input_ids"]])
    assert ours.dtype == torch.bfloat16
    assert set(ours.state_dict()) == set(theirs.state_dict())
    assert torch.equal(ours(ids).logits, theirs(ids).logits)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (fast / name).read_bytes() == (slow / name).read_bytes()


def test_tokens_and_template_survive(tmp_path, tokenizer):
    from transformers import AutoTokenizer

    converted = AutoTokenizer.from_pretrained(convert_gguf(write_gguf(tmp_path / "m.gguf", tokenizer), tmp_path / "cache"))
    turns = [{"role": "user", "content": "I lost my card, 银行"}]
    assert converted.apply_chat_template(turns, tokenize=False) == tokenizer.apply_chat_template(turns, tokenize=False)
    assert converted.apply_chat_template(turns)["input_ids"] == tokenizer.apply_chat_template(turns)["input_ids"]


def test_the_same_content_is_converted_once(tmp_path, tokenizer):
    file = write_gguf(tmp_path / "m.gguf", tokenizer)
    first = convert_gguf(file, tmp_path / "cache")
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert convert_gguf(file.rename(tmp_path / "other.gguf"), tmp_path / "cache") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp


def test_large_models_are_written_in_shards(tmp_path, tokenizer, monkeypatch):
    from transformers import AutoModelForCausalLM

    file = write_gguf(tmp_path / "m.gguf", tokenizer)
    whole = AutoModelForCausalLM.from_pretrained(convert_gguf(file, tmp_path / "whole"))
    monkeypatch.setattr(convert, "_SHARD_BYTES", 100_000)
    place = convert_gguf(file, tmp_path / "sharded")
    assert len(list(place.glob("model-*-of-*.safetensors"))) > 1
    shards = AutoModelForCausalLM.from_pretrained(place).state_dict()
    assert all(torch.equal(tensor, shards[name]) for name, tensor in whole.state_dict().items())


def test_a_variation_goes_through_transformers(tmp_path, tokenizer):
    file = write_gguf(tmp_path / "m.gguf", tokenizer, extra=[("rope.scaling.factor", 4.0)])
    assert convert._known_config(convert._open(file)) is None


@pytest.mark.parametrize("keep", [0, 3, 400, -1000])
def test_a_damaged_file_is_refused_and_leaves_nothing(tmp_path, tokenizer, keep):
    file = write_gguf(tmp_path / "m.gguf", tokenizer)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UnsupportedModel, match="GGUF"):
        convert_gguf(file, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "gguf").iterdir())


def test_a_gguf_file_becomes_a_version(tmp_path, tokenizer, registry):
    from r1ray.model.importer import import_model
    from r1ray.model.load import load_model, load_tokenizer

    file = write_gguf(tmp_path / "Tiny-R1.Q8_0.gguf", tokenizer)
    artifact = import_model(str(file), registry=registry)
    assert (artifact.manifest.name, artifact.manifest.family) == ("tiny-r1.q8_0", "llama")
    assert import_model(str(file), registry=registry) == artifact
    ids = load_tokenizer(artifact)("I lost my card", return_tensors="pt")
    assert load_model(artifact, registry=registry)(**ids).logits.isfinite().all()
