"""DPO's loss on tiny models: TRL's own value and gradient, whatever the passes and workers, and a reference that is computed once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import add_fused_lm_head

from r1ray.model.adapters import lora
from r1ray.model.family import family_of
from r1ray.train import heldout
from r1ray.train.logprobs import add_answer_logprobs
from r1ray.train.objective import dpo_trainer
from r1ray.train.objective.dpo_trainer import PreferenceTrainer
from r1ray.train.pair_feed import collate
from r1ray.train.reference import Reference
from r1ray.train.schedule import Schedule

LOSSES = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard"]
LOSSES += ["apo_zero", "apo_down", "discopop"]


def model(directory, *, adapter=False):
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    if adapter:
        torch.manual_seed(1)
        plain = get_peft_model(plain, lora(family_of({"model_type": "llama"}), rank=4))
    return plain.train()


def arguments(out: Path, loss: str = "sigmoid", precompute: bool = True) -> DPOConfig:
    smoothing = {"robust": 0.1, "exo_pair": 1e-3}.get(loss, 0.0)
    plain = {"use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": False, "remove_unused_columns": False}
    loss_settings = {"loss_type": [loss], "label_smoothing": smoothing, "max_length": None, "disable_dropout": False}
    return DPOConfig(output_dir=str(out), precompute_ref_log_probs=precompute, **loss_settings, **plain)


def trainer(pairs, directory, out: Path, loss: str = "sigmoid", *, adapter=False, held_out=(), stepwise=False) -> PreferenceTrainer:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    made = PreferenceTrainer(
        model(directory, adapter=adapter),
        arguments(out, loss, precompute=not adapter),
        feed=pairs.feed(batch_size=1) if stepwise else pairs.feed(),
        schedule=Schedule(1, 0.0, 1.0),
        tokenizer=tokenizer,
        callbacks=[],
    )
    made.judge_on(held_out, out)
    made.refer_to(Reference(out / "reference"), stepwise=stepwise)
    return made


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_and_its_gradient_are_trls_own(pairs, tiny_llama, tmp_path, loss) -> None:
    ours = trainer(pairs, tiny_llama, tmp_path, loss)
    theirs = DPOTrainer(
        model=(usual := model(tiny_llama)),
        ref_model=model(tiny_llama).eval(),
        args=arguments(tmp_path, loss, precompute=False),
        train_dataset=_shown(),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
    )
    pairs.nudge(ours.model), pairs.nudge(usual)
    expected = theirs.compute_loss(usual, collate(pairs.rows, 0))
    expected.backward()
    found = ours.compute_loss(ours.model, ours.feed[0], num_items_in_batch=len(pairs.rows))
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    for (name, a), b in zip(usual.named_parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=name)


def _shown():
    from datasets import Dataset

    return Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})


@pytest.mark.parametrize(("loss", "sft_weight"), [("sigmoid", 0.0), ("sigmoid", 0.5), ("ipo", 0.0), ("robust", 0.0)])
def test_any_split_over_workers_and_passes_gives_the_same_loss_and_gradient(pairs, tiny_llama, tmp_path, loss, sft_weight) -> None:
    made = trainer(pairs, tiny_llama, tmp_path, loss)
    made.sft_weight = sft_weight
    pairs.nudge(made.model)
    losses, gradients, marks = [], [], []
    for num_workers, accumulation in ((1, 1), (1, 3), (2, 1), (2, 2), (3, 2), (4, 2)):
        made.model.zero_grad()
        total = 0.0
        for rank in range(num_workers):
            one = pairs.feed(rank=rank, num_workers=num_workers, accumulation=accumulation, reference=made.feed.reference)
            for number in range(accumulation):
                part = made.compute_loss(made.model, one[number], num_items_in_batch=one.num_trained(0))
                part.backward()
                total += part.item()
        losses.append(total)
        assert made.tally.take() / len(pairs.rows) == pytest.approx(total, rel=1e-5)
        gradients.append(torch.cat([p.grad.flatten() for p in made.model.parameters()]))
        marks.append(made.marks())
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-3, atol=1e-6)
    for mark in marks[1:]:
        assert mark == pytest.approx(marks[0], rel=1e-4)


def test_only_the_answers_carry_loss(pairs, tiny_llama, tmp_path) -> None:
    made = trainer(pairs, tiny_llama, tmp_path)
    item = made.feed[0]
    answered = item["input_ids"] * item["completion_mask"]
    assert [[token for token in row if token] for row in answered.tolist()] == [
        list(answer) for answer in [row.chosen for row in _in_order(pairs, made)] + [row.rejected for row in _in_order(pairs, made)]
    ]


def _in_order(pairs, made):
    return [pairs.rows[row] for row in made.feed.plan.micro_batches(0, rank=0, num_workers=1, accumulation=1)[0]]


@pytest.mark.parametrize("adapter", [False, True])
def test_the_reference_is_the_base_and_is_computed_once(pairs, tiny_llama, tmp_path, adapter, monkeypatch, capsys) -> None:
    made = trainer(pairs, tiny_llama, tmp_path, adapter=adapter)
    loss = made.compute_loss(made.model, made.feed[0], num_items_in_batch=len(pairs.rows)).item()
    assert loss == pytest.approx(0.693147, rel=1e-5)  # nothing is preferred yet
    assert made.marks()["margin"] == pytest.approx(0.0, abs=1e-5)
    monkeypatch.setattr(PreferenceTrainer, "compute_ref_log_probs", lambda *_: pytest.fail("computed again"))
    again = trainer(pairs, tiny_llama, tmp_path, adapter=adapter)
    assert again.feed.reference == made.feed.reference
    assert capsys.readouterr().out.count("the base's log-probabilities, pairs: ") == 1, "the second one reads what the first one kept"
    if adapter:
        assert list(made.model.peft_config) == ["default"]


def test_a_timed_run_refers_to_the_base_as_its_steps_come(pairs, tiny_llama, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(dpo_trainer, "_STEPS_AT_ONCE", 1)
    made = trainer(pairs, tiny_llama, tmp_path, adapter=True, held_out=pairs.rows[:1], stepwise=True)
    made.model_wrapped = made.model
    kept, held_out, counts = Reference(tmp_path / "reference"), len(pairs.rows), []
    for step in range(made.feed.num_steps):
        made.refer_ahead(step)
        counts.append(len(made.feed.reference))
        assert {held_out, *made.feed.plan.batch(step)} <= made.feed.reference.keys()
        assert made.compute_loss(made.model, made.feed[step], num_items_in_batch=1).isfinite()
        pairs.nudge(made.model)  # the adapter moves, the base does not
    assert counts == [4, 4, 6, 6, 6], "those of three steps, then of the rest"
    assert kept.known() == made.feed.reference
    whole = trainer(pairs, tiny_llama, tmp_path / "whole", adapter=True)
    for row, expected in whole.feed.reference.items():
        assert made.feed.reference[row] == pytest.approx(expected, rel=1e-4)


def test_a_longer_run_adds_only_the_rows_that_are_missing(tmp_path) -> None:
    reference = Reference(tmp_path / "reference")
    assert reference.known() == {}
    reference.add({0: (-1.0, -2.0), 3: (-3.0, -4.0)})
    reference.add({1: (-5.0, -6.0)})
    assert reference.known() == {0: (-1.0, -2.0), 1: (-5.0, -6.0), 3: (-3.0, -4.0)}


def test_held_out_pairs_are_level_before_and_told_after(pairs, tiny_llama, tmp_path, capsys) -> None:
    made = trainer(pairs, tiny_llama, tmp_path, held_out=pairs.rows[:3])
    before = made.figures(made.before())
    assert (before["accuracy"], before["margin"]) == (0.5, 0.0)
    pairs.nudge(made.model)
    capsys.readouterr()
    after = made.figures(made.judged())
    assert "held-out pairs: 3/3 in " in capsys.readouterr().out
    assert after["margin"] != 0 and after["accuracy"] in (0.0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0)
    heldout.note(tmp_path, "before", before)
    heldout.note(tmp_path, "after", after)
    said: list[str] = []
    assert heldout.told(tmp_path, said.append)["held_out_after/margin"] == after["margin"]
    assert said[0].startswith("held out: accuracy 0.500 -> ")


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_qwen2", "tiny_deepseek_v3"])
def test_log_probabilities_and_their_gradients_are_trls_own(pairs, fixture, request) -> None:
    directory = request.getfixturevalue(fixture)
    usual, ours = model(directory), model(directory)
    for net in (usual, ours):
        add_fused_lm_head(net)
    add_answer_logprobs(ours)
    inputs = collate(pairs.rows, 0)
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    weights = torch.linspace(-1, 1, labels[:, 1:].numel()).view_as(labels[:, 1:])
    for net in (usual, ours):
        computed = net(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels, fused_lm_head=True)
        (computed.log_probs * weights).sum().backward()
        net.found = computed.log_probs.detach()
    torch.testing.assert_close(usual.found, ours.found, rtol=1e-5, atol=1e-5)
    for (name, a), b in zip(usual.named_parameters(), ours.parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=name)
