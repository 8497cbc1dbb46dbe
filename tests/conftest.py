"""Fixtures for every test: a home of its own, a registry in it, and three tiny random models of the families that r1ray serves.

The models are real `transformers` architectures with random weights (some 0.1 M parameters), so load, forward, LoRA and
merge run the true code in milliseconds. They know nothing: only shapes, ids and equalities may be asserted about them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")


MEMORY = Path("/dev/shm")
if os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > 4 * 2**30:
    # hundreds of registries are made, and each of their commits would wait for the disk
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

VOCABULARY = 640  # rows of the embedding; the tokenizer's own ids end a little below
CONTEXT = 512
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}  # of a size that the compiled kernels take too

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
]
THINK = ["<think>", "</think>"]  # as in R1: tokens of their own, but text to the decoder

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen2's and SmolLM2's way: without a system message they insert their own
CHATML_WITH_DEFAULT = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_CORPUS = [
    "system user assistant You are a helpful assistant. I lost my credit card, please block it today.",
    "the card was stolen and the transfer of money to my account is pending; what is the exchange rate?",
    '{"intent": "card_lost", "entities": {"card_type": "credit"}} intent entities reply passage [citation:1]',
    "First I look at the question, then I think about the answer step by step. So the answer is 42.",
    "我的信用卡丢了，请帮我挂失。好的，已经为您冻结银行卡。请问还有什么可以帮助您？转账 余额 利率 手续费",
]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Settings whose home is this test's own directory, also for code that reads the environment."""
    from r1ray.settings import Settings

    for key in [key for key in os.environ if key.startswith("R1RAY_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("R1RAY_HOME", str(tmp_path / "home"))
    return Settings()


@pytest.fixture
def registry(settings: Any) -> Any:
    """An empty registry in the test's home."""
    from r1ray.registry import Registry

    return Registry(settings)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Llama with ChatML; its weights lie in several shards, as large models' do."""
    from transformers import LlamaConfig

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, **HEADS}
    config = LlamaConfig(**shape, **_common(eos="<|im_end|>"), tie_word_embeddings=False)
    return _save(tmp_path_factory.mktemp("tiny_llama"), config, CHATML, max_shard_size="150KB")


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2 (the body of R1-Distill-Qwen) with tied embeddings and a template that inserts a default system message."""
    from transformers import Qwen2Config

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, **HEADS}
    config = Qwen2Config(**shape, **_common(eos="<|im_end|>"), tie_word_embeddings=True)
    return _save(tmp_path_factory.mktemp("tiny_qwen2"), config, CHATML_WITH_DEFAULT)


@pytest.fixture(scope="session")
def wide_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On which an adapter can have tensors of more than the 100,000 numbers that ZeRO-3 leaves whole on every rank."""
    from transformers import Qwen2Config

    shape = {"hidden_size": 256, "intermediate_size": 64, "num_hidden_layers": 1, **HEADS}
    config = Qwen2Config(**shape, **_common(eos="<|im_end|>"), tie_word_embeddings=True)
    return _save(tmp_path_factory.mktemp("wide_qwen2"), config, CHATML_WITH_DEFAULT)


@pytest.fixture(scope="session")
def tiny_deepseek_v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """R1's own architecture: latent attention (MLA), one dense and one expert layer, R1's shipped chat template."""
    from transformers import DeepseekV3Config

    from r1ray.model import template

    attention = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16}
    heads = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 2, "topk_group": 1}
    layers = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_hidden_layers": 2, "first_k_dense_replace": 1}
    shape = {**layers, **attention, **heads, **experts}
    config = DeepseekV3Config(**shape, **_common(eos="<｜end▁of▁sentence｜>"), tie_word_embeddings=False)
    return _save(tmp_path_factory.mktemp("tiny_deepseek_v3"), config, template.shipped("deepseek_r1"), bos="<｜begin▁of▁sentence｜>")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """`tiny_tokenizer(template, eos=..., bos=...)` makes the tiny models' tokenizer with another chat template."""
    return _tokenizer


def _tokenizer(template: str | None, *, eos: str = "<|im_end|>", bos: str | None = None) -> Any:
    """Byte-level BPE over a few sentences; every special token of the known families is one id."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(_CORPUS, trainer)
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in THINK])
    names: dict[str, Any] = {"eos_token": eos, "pad_token": "<|endoftext|>", "bos_token": bos}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **{key: value for key, value in names.items() if value})
    tokenizer.model_max_length = CONTEXT
    tokenizer.chat_template = template
    return tokenizer


def _common(*, eos: str) -> Mapping[str, Any]:
    token_ids = {"bos_token_id": None, "eos_token_id": SPECIAL.index(eos), "pad_token_id": SPECIAL.index("<|endoftext|>")}
    return {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, **token_ids}


def _save(directory: Path, config: Any, template: str, *, bos: str | None = None, max_shard_size: str = "5GB") -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    _tokenizer(template, eos=SPECIAL[config.eos_token_id], bos=bos).save_pretrained(directory)
    return directory
