"""A soft prompt before every stream gives the tokens of PEFT's own model, on both backends and whatever shares the batch."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from r1ray.engine.backend import BLOCK_SIZE
from r1ray.engine.soft import SoftPrompted, check_soft_prompt
from r1ray.errors import AdapterMismatch, UnsupportedModel
from r1ray.model.adapters import POSITIONS_BLOCK
from r1ray.model.soft import read_soft_prompt, soft_kind
from tests.engine import conftest as kit


def adapted(directory: Path, kind: str, out: Path, num: int = BLOCK_SIZE):
    """A PEFT model with a lively soft prompt of `kind`, saved in `out`."""
    import torch
    from peft import get_peft_model

    from r1ray.model.adapters import prefix_tuning, prompt_tuning

    torch.manual_seed(1)
    settings = prompt_tuning(num, None, directory) if kind == "prompt" else prefix_tuning(num)
    model = get_peft_model(kit.lively(directory), settings, autocast_adapter_dtype=False)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.normal_(0, 0.5)
    model.save_pretrained(out)
    return model.eval()


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@pytest.mark.parametrize("backend", ["transformers", kit.native()])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen2"])
def test_the_tokens_are_those_of_the_peft_model(family, backend, kind, request, tmp_path) -> None:
    import torch

    directory = request.getfixturevalue(family)
    model = adapted(directory, kind, tmp_path)
    soft = read_soft_prompt(tmp_path)
    assert (soft.kind, soft.num_tokens) == (kind, BLOCK_SIZE)
    asked = kit.prompts(5)
    expected = []
    for prompt in asked:
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(8):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        expected.append(ids[len(prompt) :])

    async def scenario():
        async with kit.running(kit.lively(directory), backend=backend, soft=soft, num_slots=3, prefill_chunk=7) as engine:
            return await asyncio.gather(*(kit.tokens(engine, kit.wanted(str(i), p, max_tokens=8)) for i, p in enumerate(asked)))

    assert asyncio.run(scenario()) == expected


def test_latent_attention_takes_a_prompt_but_no_prefix(tiny_deepseek_v3, tmp_path) -> None:
    from r1ray.engine.paged import TransformersBackend
    from r1ray.model.soft import SoftPrompt

    soft = read_soft_prompt(_saved(tiny_deepseek_v3, tmp_path))
    SoftPrompted(TransformersBackend(kit.lively(tiny_deepseek_v3), num_blocks=8), soft)
    with pytest.raises(UnsupportedModel, match="caches latents"):
        SoftPrompted(TransformersBackend(kit.lively(tiny_deepseek_v3), num_blocks=8), SoftPrompt("prefix", soft.values))


def _saved(directory: Path, out: Path) -> Path:
    adapted(directory, "prompt", out)
    return out


def test_a_soft_prompt_that_does_not_fit_is_refused_by_name(tiny_llama, tmp_path) -> None:
    adapted(tiny_llama, "prompt", tmp_path, num=20)
    soft = read_soft_prompt(tmp_path)
    with pytest.raises(AdapterMismatch, match=r"20 virtual tokens.*multiple of 32"):
        check_soft_prompt(soft, 64)
    adapted(tiny_llama, "prompt", tmp_path)
    with pytest.raises(AdapterMismatch, match="have 64 numbers, the model's 128"):
        check_soft_prompt(read_soft_prompt(tmp_path), 128)
    assert soft_kind(tiny_llama) is None
    with pytest.raises(AdapterMismatch, match="holds no soft prompt"):
        read_soft_prompt(tiny_llama)


def test_what_is_trained_and_planned_has_whole_blocks() -> None:
    assert POSITIONS_BLOCK % BLOCK_SIZE == 0
