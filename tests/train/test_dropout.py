from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from r1ray.errors import UnsupportedModel
from r1ray.train.dropout import set_dropout

IDS = torch.arange(1, 9)[None]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen2", "tiny_deepseek_v3"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_dropout_disturbs_training_and_nothing_else(family, attention, request) -> None:
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(family), attn_implementation=attention)
    model.train()
    torch.testing.assert_close(logits(model), logits(model))
    assert set_dropout(model, 0.5) == 2
    assert (logits(model) != logits(model)).any()
    model.eval()
    torch.testing.assert_close(logits(model), logits(model))


def test_hidden_states_are_dropped_where_the_architecture_has_a_place_for_it() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=16, n_embd=8, n_layer=1, n_head=2))
    assert set_dropout(model, 0.25) > 2
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.25}


def test_a_model_without_dropout_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"train\.lora\.dropout"):
        set_dropout(torch.nn.Linear(2, 2), 0.1)  # type: ignore[arg-type]
