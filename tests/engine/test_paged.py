"""The paged cache gives what one forward pass over the whole text gives, however its rows are gathered and its latents expanded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig

from r1ray.engine.attention import _by_group, _causal
from r1ray.engine.backend import BLOCK_SIZE, Piece
from r1ray.engine.memory import CacheWish
from r1ray.engine.paged import TransformersBackend
from r1ray.engine.pages import _slices
from tests.engine.conftest import adapter, lively

TEXTS = [[5 + (7 * i + 3 * n) % 480 for i in range(length)] for n, length in enumerate((70, 33, 40))]


def logits_in_pieces(backend: TransformersBackend, name: str | None = None) -> list[torch.Tensor]:
    """Of the last tokens of each text: a first piece, a second one with what is cached behind it, the last token among all texts'."""
    tables = [[3, 0, 7], [5, 1, 8], [2, 6, 4]]
    for text, table in zip(TEXTS, tables, strict=True):
        backend.forward([Piece(ids=text[:20], start=0, table=table, num_logits=0, adapter=name)])
        backend.forward([Piece(ids=text[20:-1], start=20, table=table, num_logits=0, adapter=name)])
    last = [
        Piece(ids=text[-1:], start=len(text) - 1, table=table, num_logits=1, adapter=name)
        for text, table in zip(TEXTS, tables, strict=True)
    ]
    return list(backend.forward(last))


def whole(model: Any) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [model(torch.tensor([text])).logits[0, -1] for text in TEXTS]


def apart(found: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Largest difference, by the largest logit."""
    return float((torch.stack(found) - torch.stack(right)).abs().max() / torch.stack(right).abs().max())


@pytest.mark.parametrize("gather_bytes", [1, 20_000, 2**28])
def test_pieces_and_rows_give_the_logits_of_the_whole_text(family: Path, gather_bytes: int) -> None:
    """One byte: a row and a head at a time. The latents' attention is absorbed in rows and expanded in pieces."""
    right = whole(lively(family))
    assert apart(logits_in_pieces(TransformersBackend(lively(family), num_blocks=9, gather_bytes=gather_bytes)), right) < 1e-5


def test_a_window_ends_what_is_looked_at(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MistralConfig(**sizes, vocab_size=640, sliding_window=25), dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    right = whole(AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager"))
    assert apart(logits_in_pieces(TransformersBackend(model, num_blocks=9, gather_bytes=20_000)), right) < 1e-5


def test_an_adapter_of_the_latents_projection_is_absorbed_too(tiny_deepseek_v3: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    path = adapter(tiny_deepseek_v3, tmp_path / "adapter", seed=1)
    assert "kv_b_proj" in (path / "adapter_config.json").read_text()
    backend = TransformersBackend(lively(tiny_deepseek_v3), num_blocks=9)
    backend.load_adapter("a", path)
    right = whole(PeftModel.from_pretrained(lively(tiny_deepseek_v3), path).eval())
    assert apart(logits_in_pieces(backend, "a"), right) < 1e-5
    assert apart(logits_in_pieces(backend), whole(lively(tiny_deepseek_v3))) < 1e-5


def test_rows_are_gathered_as_far_as_there_is_room() -> None:
    rows = [Piece(ids=[1], start=blocks * BLOCK_SIZE - 1, table=[0] * blocks, num_logits=1) for blocks in (1, 1, 3, 1, 1, 1)]
    assert list(_slices(rows, 10**6)) == [(0, 6)]
    assert list(_slices(rows, 3 * BLOCK_SIZE)) == [(0, 2), (2, 3), (3, 6)]
    assert list(_slices(rows, 1)) == [(i, i + 1) for i in range(6)]
    assert list(_slices([], 1)) == []


def test_the_cache_is_there_before_the_first_pass(family: Path) -> None:
    backend = TransformersBackend(lively(family))
    room = backend.room(wish := CacheWish(num_slots=4, context=512))
    config = AutoConfig.from_pretrained(family)
    heads = 2 * config.num_key_value_heads * getattr(config, "head_dim", 0)
    numbers = config.kv_lora_rank + config.qk_rope_head_dim if "deepseek" in config.model_type else heads
    assert room.bytes_per_block == BLOCK_SIZE * config.num_hidden_layers * numbers * 4
    assert backend._workspace_bytes(wish) > backend._workspace_bytes(CacheWish(num_slots=2, context=512)) > 0
    backend.allocate(wish.num_blocks)
    assert {tensor.shape[0] for tensor in (*backend._cache.keys.values(), *backend._cache.values.values())} == {wish.num_blocks}


def test_grouped_heads_under_a_mask_are_taken_one_group_after_the_other() -> None:
    """What GPUs compute: one call for each query of a key head."""
    torch.manual_seed(0)
    query, keys, values = torch.randn(1, 6, 5, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    mask = torch.arange(9)[None] <= torch.arange(4, 9)[:, None]
    torch.testing.assert_close(_by_group(query, keys, values, mask, 0.3), _causal(query, keys, values, mask, 0.3))
