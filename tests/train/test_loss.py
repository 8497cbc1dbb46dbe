from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from r1ray.train.batches import BatchPlan
from r1ray.train.feed import Feed
from r1ray.train.loss import _is_frozen, add_supervised_loss, has_plain_head, summed_nll

ROWS = [[5, 9, 11, 40, 41, 42], [7, 8, 30, 31], [3, 4, 5, 6, 7, 8, 50, 51], [90, 91, 92]]
MASKS = [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1, 1, 0, 1, 1], [0, 1, 1]]


def feed(*, rank=0, num_workers=1, accumulation=1, packing=False) -> Feed:
    plan = BatchPlan([len(row) for row in ROWS], batch_size=4, num_epochs=1, seed=0, group_window=1)
    shape = {"num_steps": 1, "rank": rank, "num_workers": num_workers, "accumulation": accumulation}
    return Feed(input_ids=ROWS, masks=MASKS, plan=plan, pad_id=0, packing=packing, **shape)


def model(directory, attention="eager"):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=attention).train()


def summed(net, inputs) -> torch.Tensor:
    return net(**inputs, supervised=True)


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_qwen2", "tiny_deepseek_v3"])
def test_the_supervised_loss_and_its_gradients_are_transformers_own(fixture, request) -> None:
    directory = request.getfixturevalue(fixture)
    inputs = feed()[0]
    usual, ours = model(directory), model(directory)
    assert has_plain_head(ours)
    add_supervised_loss(ours)
    count = int((inputs["labels"][:, 1:] != -100).sum())
    expected = usual(**inputs).loss
    expected.backward()
    loss = summed(ours, inputs) / count
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, a), b in zip(usual.named_parameters(), ours.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_deepseek_v3"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_dialogues_do_not_see_each_other(fixture, attention, request) -> None:
    net = model(request.getfixturevalue(fixture), attention)
    add_supervised_loss(net)
    apart = sum(summed(net, feed(accumulation=4)[number]).item() for number in range(4))
    assert summed(net, feed(packing=True)[0]).item() == pytest.approx(apart, rel=1e-5)


def test_any_split_over_workers_and_passes_gives_the_same_loss_and_gradient(tiny_llama) -> None:
    gradients, losses = [], []
    for num_workers, accumulation in ((1, 1), (1, 3), (2, 1), (2, 2), (3, 2), (4, 2)):
        net = model(tiny_llama)
        add_supervised_loss(net)
        feeds = [feed(rank=rank, num_workers=num_workers, accumulation=accumulation) for rank in range(num_workers)]
        total = sum(summed(net, one[number]) for one in feeds for number in range(accumulation)) / feeds[0].num_trained(0)
        total.backward()
        losses.append(total.item())
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-6)


def test_a_pass_without_rows_has_no_loss_and_no_gradient(tiny_llama) -> None:
    net = model(tiny_llama)
    add_supervised_loss(net)
    empty = feed(rank=3, num_workers=4, accumulation=2)[1]
    loss = summed(net, empty)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())


def test_a_smoothed_loss_and_its_gradient_are_torchs_own() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(70, 90, requires_grad=True), torch.randint(0, 90, (70,))
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=0.1)
    (wanted,) = torch.autograd.grad(expected, logits)
    found = summed_nll(logits, labels, 0.1)
    (gradient,) = torch.autograd.grad(found, logits)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def frozen(directory):
    """An adapter's situation: the body learns, the output matrix does not."""
    net = model(directory)
    head = net.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # also where it is tied to the embedding
    return net


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_deepseek_v3"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_frozen_head_gives_the_same_loss_and_gradients_piece_by_piece(fixture, smoothing, request, monkeypatch) -> None:
    monkeypatch.setattr("r1ray.train.loss._ROWS_OF_MATRIX", 3)  # two full pieces and a rest
    whole, pieces = frozen(request.getfixturevalue(fixture)), frozen(request.getfixturevalue(fixture))
    for net in (whole, pieces):
        add_supervised_loss(net, smoothing)
    whole.get_output_embeddings().register_parameter("bias", torch.nn.Parameter(torch.zeros(whole.config.vocab_size), requires_grad=False))
    losses = [summed(net, feed()[0]) for net in (whole, pieces)]
    for loss in losses:
        (0.25 * loss).backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    found = dict(pieces.named_parameters())
    learnt = {name: parameter.grad for name, parameter in whole.named_parameters() if parameter.grad is not None}
    assert len(learnt) > 10
    for name, gradient in learnt.items():
        torch.testing.assert_close(found[name].grad, gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_frozen_head_measures_without_a_gradient_and_leaves_float16_to_the_module(tiny_llama) -> None:
    net = frozen(tiny_llama)
    add_supervised_loss(net)
    expected = summed(net, feed()[0]).item()
    with torch.no_grad():
        assert summed(net, feed()[0]).item() == pytest.approx(expected, rel=1e-6)
    assert _is_frozen(net.get_output_embeddings())
    assert not _is_frozen(net.half().get_output_embeddings())
    assert not _is_frozen(model(tiny_llama).get_output_embeddings())
