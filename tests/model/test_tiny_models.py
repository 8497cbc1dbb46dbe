"""The fixtures themselves: what every other test builds on."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen2", "tiny_deepseek_v3"])
def test_a_tiny_model_generates_from_its_own_chat_prompt(family, request):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = request.getfixturevalue(family)
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "你好 card"}], add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert out.shape[1] == prompt["input_ids"].shape[1] + 3


def test_the_sharded_model_has_an_index(tiny_llama):
    assert (tiny_llama / "model.safetensors.index.json").exists()
    assert len(list(tiny_llama.glob("*.safetensors"))) > 1


def test_think_tags_are_single_tokens_that_survive_decoding(tiny_deepseek_v3):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_deepseek_v3)
    ids = tokenizer("<think>\n好</think>", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_tokens_to_ids("<think>") == ids[0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<think>\n好</think>"
