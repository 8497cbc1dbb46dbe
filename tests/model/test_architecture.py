"""A config.json read as plain keys says what transformers reads from it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from transformers import AutoConfig, LlamaConfig, Qwen2Config, Qwen3Config

from r1ray.engine.native.model import Shape, refusal
from r1ray.model.architecture import PlainConfig, read_architecture

SIZES = {"hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, vocab_size=99, eos_token_id=[3, 4]),
        LlamaConfig(**SIZES, head_dim=64, mlp_bias=True, rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        Qwen2Config(**SIZES, tie_word_embeddings=True),
        Qwen3Config(**SIZES, head_dim=64, rms_norm_eps=1e-5),
    ],
    ids=["llama", "wide heads", "qwen2", "qwen3"],
)
def test_a_plain_file_says_what_transformers_reads(config, tmp_path):
    config.save_pretrained(tmp_path)
    plain, right = read_architecture(tmp_path), AutoConfig.from_pretrained(tmp_path)
    assert isinstance(plain, PlainConfig)
    assert Shape.of(plain) == Shape.of(right)
    assert dict(plain.rope_parameters) == dict(right.rope_parameters)
    assert plain.eos_token_id == right.eos_token_id
    assert refusal(plain, "int8") == refusal(right, "int8")


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mistral"},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"num_key_value_heads": ...},
        {"rms_norm_eps": ...},
        {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e4},
    ],
    ids=["another family", "scaled positions", "heads by default", "eps by default", "an old file's scaled positions"],
)
def test_what_is_not_plain_is_left_to_transformers(change, tmp_path):
    content = {**LlamaConfig(**SIZES, head_dim=64).to_dict(), **change}
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))
    found = read_architecture(tmp_path)
    assert not isinstance(found, PlainConfig)
    assert found.hidden_size == 128


def test_old_files_name_the_base_of_rotary_positions_alone(tmp_path):
    content = LlamaConfig(**SIZES).to_dict()
    del content["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**content, "rope_theta": 12345.0}))
    plain = read_architecture(tmp_path)
    assert isinstance(plain, PlainConfig)
    assert dict(plain.rope_parameters) == dict(AutoConfig.from_pretrained(tmp_path).rope_parameters)


def test_an_engine_starts_without_transformers(tiny_llama, registry):
    """Its import takes longer than the rest of a start, and memory."""
    from r1ray.engine.native import build
    from r1ray.model.importer import import_model

    if why := build.why_not():
        pytest.skip(why)
    artifact = import_model(str(tiny_llama), name="tiny", registry=registry)
    script = (
        "import sys; from r1ray.engine.config import EngineConfig; from r1ray.engine.create import create_engine; "
        "from r1ray.registry import Registry; registry = Registry(); "
        f"create_engine(registry.resolve({artifact.ref!r}), EngineConfig(dtype='int8'), registry); "
        "print('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False"], done.stderr
