"""Blockwise attention: transformers' eager losses and gradients, whatever lies end to end, and what it leaves to others."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from r1ray.config import load_config
from r1ray.errors import InvalidValue
from r1ray.train import attention
from r1ray.train.attention import row_lengths, set_attention
from r1ray.train.config import FinetuneConfig
from r1ray.train.loss import add_supervised_loss
from r1ray.train.order import attention_of

FAMILIES = ["tiny_llama", "tiny_qwen2", "tiny_deepseek_v3"]


def model(directory, name, dtype=torch.float32):
    net = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).train()
    set_attention(net, name)
    add_supervised_loss(net)
    return net


def batch(*lengths, seed=0):
    """Rows on the right of which padding carries no loss."""
    ids = torch.randint(1, 60, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    for row, length in enumerate(lengths):
        labels[row, length:] = -100
    return {"input_ids": ids, "labels": labels}


def packed(inputs, *lengths):
    def flat(key, fill=None):
        parts = [inputs[key][row, :length].clone() for row, length in enumerate(lengths)]
        if fill is not None:
            for part in parts:
                part[0] = fill
        return torch.cat(parts)[None]

    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return {
        "input_ids": flat("input_ids"),
        "labels": flat("labels", -100),
        "position_ids": positions,
        "attention_mask": row_lengths(lengths),
    }


def loss_and_gradients(net, inputs):
    loss = net(**inputs, supervised=True)
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [(3, 3), (9, 4, 12, 1), (17,)])
@pytest.mark.parametrize("is_packed", [False, True])
def test_losses_and_gradients_are_those_of_eager_attention(family, lengths, is_packed, request, monkeypatch) -> None:
    monkeypatch.setattr(attention, "_QUERIES", 4)  # spans of one block, of full ones, and of one with a rest
    directory, inputs = request.getfixturevalue(family), batch(*lengths)
    expected, usual = loss_and_gradients(model(directory, "eager"), inputs)
    loss, gradients = loss_and_gradients(model(directory, "blockwise"), packed(inputs, *lengths) if is_packed else inputs)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == usual.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, usual[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_packed_row_is_not_computed_without_its_lengths_by_accident(tiny_llama) -> None:
    lengths = (9, 4, 12)
    net, inputs = model(tiny_llama, "blockwise"), packed(batch(*lengths), *lengths)
    apart = net(**inputs, supervised=True).item()
    together = net(**{**inputs, "attention_mask": row_lengths([sum(lengths)])}, supervised=True).item()
    assert together != pytest.approx(apart, rel=1e-4), "the rows of this test would not notice"
    net.gradient_checkpointing_enable({"use_reentrant": False})
    assert net(**inputs, supervised=True).item() == pytest.approx(apart, rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_near_to_float32_as_eager_is(family, request) -> None:
    directory, inputs = request.getfixturevalue(family), batch(140, 133)
    _, exact = loss_and_gradients(model(directory, "eager"), inputs)

    def error(name):
        _, gradients = loss_and_gradients(model(directory, name, torch.bfloat16), inputs)
        return sum((gradients[key].float() - exact[key]).square().sum().item() for key in exact) ** 0.5

    assert error("blockwise") < 1.1 * error("eager")


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_left_and_generation_are_eager_attentions(family, request) -> None:
    directory = request.getfixturevalue(family)
    ids, real = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    usual, ours = (model(directory, name).eval() for name in ("eager", "blockwise"))
    with torch.no_grad():
        a, b = (net(input_ids=ids, attention_mask=real).logits[:, -1] for net in (usual, ours))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    said = [net.generate(ids, attention_mask=real, max_new_tokens=6, do_sample=False, pad_token_id=0).tolist() for net in (usual, ours)]
    assert said[0] == said[1]


LLAMA, SLIDING, OTHER = {"model_type": "llama"}, {"model_type": "qwen2", "use_sliding_window": True}, {"model_type": "gemma2"}


@pytest.mark.parametrize(
    ("changes", "described", "expected"),
    [
        ([], LLAMA, "blockwise"),
        ([], SLIDING, "eager"),
        ([], OTHER, "eager"),
        (["dropout=0.1"], LLAMA, "eager"),
        (["method=prefix"], LLAMA, "eager"),
        (["method=prompt"], LLAMA, "blockwise"),
        (["method=full"], LLAMA, "eager"),
        (["packing=true"], LLAMA, "blockwise"),
        (["packing=true", "objective=distill", "distill.teacher=t"], LLAMA, "eager"),
        (["objective=distill", "distill.teacher=t"], LLAMA, "blockwise"),
        (["use_gpu=true"], LLAMA, "sdpa"),
        (["num_workers=2", "parallelism.sequence=2"], LLAMA, "sdpa"),
        (["num_workers=2", "parallelism.tensor=2"], LLAMA, "blockwise"),
        (["attention=sdpa"], LLAMA, "sdpa"),
    ],
)
def test_auto_takes_it_where_tests_hold_that_it_is_right(changes, described, expected) -> None:
    assert attention_of(config(*changes), described, "base", longest=512) == expected


def test_all_weights_attend_in_blocks_where_rows_are_long() -> None:
    assert attention_of(config("method=full"), LLAMA, "base", longest=513) == "blockwise"


def test_a_model_that_it_does_not_know_is_refused() -> None:
    with pytest.raises(InvalidValue, match=r"blockwise is for models of type .* base is of type gemma2"):
        attention_of(config("attention=blockwise"), OTHER, "base", longest=9)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["use_gpu=true"], "written for CPUs"),
        (["dropout=0.1"], "does not know dropout 0.1"),
        (["method=prefix"], "does not know method prefix"),
        (["packing=true", "objective=distill", "distill.teacher=t"], "set packing=false"),
    ],
)
def test_what_it_cannot_do_is_refused_in_the_config(changes, words) -> None:
    with pytest.raises(InvalidValue, match=words):
        config("attention=blockwise", *changes)


def config(*changes: str):
    return load_config(FinetuneConfig, None, ["name=t", "data.path=x", *(f"train.{change}" for change in changes)]).train
