"""Reinforcement learning on tiny models: who is asked, who answers, and that what is rewarded becomes likelier."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from r1ray.config import load_config
from r1ray.engine.native import build
from r1ray.errors import InvalidValue, UnsupportedModel
from r1ray.model.importer import import_model
from r1ray.train.batches import BatchPlan
from r1ray.train.config import FinetuneConfig
from r1ray.train.objective import objective_of
from r1ray.train.objective.base import Bench
from r1ray.train.objective.grpo_feed import PromptFeed
from r1ray.train.order import resolve_order
from r1ray.train.parallel.layout import Layout
from r1ray.train.prompts import Prompt
from r1ray.train.rewards.base import advantages
from r1ray.train.saved import check_saved
from r1ray.train.schedule import Schedule
from r1ray.types import Message

NATIVE = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
REWARDS = "[{axis: helpful, kind: overlap}, {axis: short, kind: length, high: 5, unit: characters, weight: 0.5}]"


class Plain(Bench):
    """Without DeepSpeed, which wants a process group."""

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"deepspeed": None}


@pytest.fixture
def bench(tiny_llama, settings, registry, tmp_path):
    """`bench(*overrides)` makes a worker's bench for the lively tiny model in float32."""
    from tests.engine.conftest import lively

    weights = tmp_path / "lively"
    lively(tiny_llama).save_pretrained(weights)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(weights)
    import_model(str(weights), name="tiny", registry=registry)
    rows = [[{"role": "user", "content": f"{i} plus {i % 5}?"}, {"role": "assistant", "content": f"it is {i + i % 5}"}] for i in range(20)]
    (settings.home / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))

    def make(*overrides: str) -> Bench:
        shape = [
            "zero_stage=0",
            "dtype=float32",
            "batch_size=2",
            "micro_batch_size=3",
            "max_steps=1",
            "max_length=64",
            "learning_rate=1e-2",
        ]
        grpo = ["objective=grpo", "grpo.num_generations=4", "grpo.max_new_tokens=8", f"grpo.rewards={REWARDS}", "warmup_share=0"]
        base = ["base=tiny", f"data.path={settings.home / 'rows.jsonl'}", *(f"train.{item}" for item in shape + grpo)]
        config = load_config(FinetuneConfig, None, [*base, *overrides])
        objective = objective_of("grpo")
        artifact = registry.resolve("tiny")
        material = objective.prepare(objective.read(config), artifact, config, settings)
        directory = settings.checkpoints / "run"
        directory.mkdir(parents=True, exist_ok=True)
        order = resolve_order(config.train, artifact, material, directory, settings, lambda _: None)
        staging = tmp_path / "staging"
        schedule = Schedule(order.num_steps, 0.0, 1.0)
        place = {"rank": 0, "num_workers": 1, "accumulation": 3, "layout": Layout(world=1), "global_rank": 0}
        return Plain(order=order, staging=staging, schedule=schedule, callbacks=[], **place)

    return make


def trained(bench: Bench) -> tuple[Any, dict[str, Any]]:
    """The trainer after its steps, and its last batch of answers."""
    trainer = objective_of("grpo").trainer(bench)
    kept: dict[str, Any] = {}
    answer = trainer._generate_and_score_completions

    def keep(inputs: Any) -> Any:
        kept.update(answer(inputs))
        return dict(kept)

    trainer._generate_and_score_completions = keep
    trainer.train()
    return trainer, kept


def logprobs(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    width = batch["completion_ids"].shape[1]
    return logits.gather(-1, ids[:, 1:, None])[:, -width:, 0] * batch["completion_mask"]


@pytest.mark.parametrize("writer", [pytest.param("engine", marks=NATIVE), "transformers"])
@pytest.mark.parametrize("loss", ["dapo", "grpo"])
def test_a_step_makes_the_better_answers_of_a_group_likelier(bench, writer, loss) -> None:
    trainer, batch = trained(bench(f"train.grpo.rollouts={writer}", f"train.grpo.loss={loss}"))
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    after = logprobs(model, batch)
    with model.disable_adapter():
        before = logprobs(model, batch)
    gained = ((after - before) * batch["advantages"][:, None]).sum()
    assert gained > 1e-3
    assert trainer.marks()["reward/helpful"] >= 0
    assert {"reward/helpful", "reward/short", "answer_tokens"} <= trainer.marks().keys()


@NATIVE
def test_the_engine_draws_with_the_very_probabilities_that_training_computes(bench) -> None:
    trainer, batch = trained(bench("train.grpo.rollouts=engine", "train.lora.rank=4"))
    assert trainer.marks()["rollout_log_ratio"] < 1e-4
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    with model.disable_adapter():
        computed = logprobs(model, batch)
    torch.testing.assert_close(batch["old_per_token_logps"] * batch["completion_mask"], computed, atol=1e-3, rtol=1e-4)


def test_the_advantages_are_those_of_the_formula(bench) -> None:
    trainer = objective_of("grpo").trainer(bench("train.grpo.rollouts=transformers", "train.grpo.num_held_out=0"))
    seen: dict[str, torch.Tensor] = {}
    judge, write = trainer._calculate_rewards, trainer._generate_and_score_completions

    def judged(*parts: Any) -> torch.Tensor:
        seen["rewards"] = judge(*parts)
        return seen["rewards"]

    trainer._calculate_rewards = judged
    batch = write(trainer.feed[0])
    expected = torch.tensor(advantages(seen["rewards"].tolist(), [1.0, 0.5], 4))
    assert expected.abs().sum() > 0
    torch.testing.assert_close(batch["advantages"], expected, atol=1e-3, rtol=1e-3)


@NATIVE
def test_held_out_prompts_are_judged_before_and_after_and_never_asked(bench) -> None:
    made = bench("train.grpo.num_held_out=3")
    trainer, _ = trained(made)
    said: list[str] = []
    metrics = objective_of("grpo").closing(made.order.run_directory, said.append)
    assert {f"held_out_{when}/{name}" for when in ("before", "after") for name in ("helpful", "short", "answer_tokens")} == metrics.keys()
    assert any(line.startswith("held out: short 0.") for line in said)
    asked = {row["asked"].prompt.messages for index in range(len(trainer.feed)) for row in trainer.feed[index]}
    assert len(made.order.material.held_out()) == 3
    assert not asked & {prompt.messages for prompt in made.order.material.held_out()}


def test_the_base_stays_near_when_divergence_is_charged(bench) -> None:
    trainer, _ = trained(bench("train.grpo.beta=0.1", "train.grpo.rollouts=transformers", "train.grpo.num_held_out=0"))
    assert trainer.marks()["kl"] == pytest.approx(0, abs=1e-6), "the adapter begins as nothing"


def feed(num_workers: int = 1, rank: int = 0) -> PromptFeed:
    prompts = [Prompt(ids=[i], messages=(Message(role="user", content=str(i)),), reference="") for i in range(7)]
    plan = BatchPlan([1] * 7, batch_size=4, num_epochs=2, seed=3, group_window=1)
    return PromptFeed(prompts=prompts, plan=plan, num_steps=4, rank=rank, num_workers=num_workers, accumulation=2, num_generations=3)


def test_workers_share_the_same_groups_whole() -> None:
    for step in range(4):
        alone = feed().asked(step)
        shared = [asked for rank in range(2) for asked in feed(2, rank).asked(step)]
        assert sorted(alone, key=repr) == sorted(shared, key=repr)
        assert len(alone) == feed().num_trained(step) == 12
        for rank in range(2):
            places = [asked.place for asked in feed(2, rank).asked(step)]
            assert places == sorted(places) and all(places.count(place) == 3 for place in places)


def test_every_prompt_is_asked_in_each_epoch() -> None:
    for epoch in (0, 1):
        asked = {one.prompt.reference + one.prompt.messages[0].content for step in (0, 1) for one in feed().asked(2 * epoch + step)}
        assert asked == set("0123456")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.grpo.rewards=[]", "nobody to judge"),
        ("train.grpo.rewards=[{axis: a, kind: format, weight: 0}]", "weight 0"),
        ("train.grpo.rewards=[{axis: a, kind: length, low: 9, high: 3}]", "low 9 exceeds high 3"),
        ("train.grpo.rewards=[{axis: a, kind: regex, pattern: '('}]", "no regular expression"),
        ("train.grpo.max_new_tokens=64", "leaves no room"),
        ("train.num_workers=3", "no multiple of 3"),
        ("train.method=prompt", "lora or full"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_the_way_out(override, says) -> None:
    base = ["data.path=x", "train.objective=grpo", f"train.grpo.rewards={REWARDS}", "train.max_length=64", "train.grpo.max_new_tokens=8"]
    with pytest.raises(InvalidValue, match=says):
        load_config(FinetuneConfig, None, [*base, "train.batch_size=4", override])


def test_an_engine_that_cannot_write_the_answers_says_why(bench) -> None:
    made = bench("train.grpo.rollouts=engine", "train.lora.dora=true")
    with pytest.raises(UnsupportedModel, match="DoRA"):
        objective_of("grpo").trainer(made)


@pytest.mark.parametrize(
    ("objective", "packing", "told"), [("sft", "false", r"\d% padding$"), ("sft", "true", r"no padding \(end"), ("grpo", "null", None)]
)
def test_padding_is_told_where_the_rows_are_all_that_is_computed(bench, objective, packing, told) -> None:
    order, said = bench().order, []
    changes = [f"data.path={order.settings.home / 'rows.jsonl'}", "train.batch_size=8", f"train.packing={packing}"]
    config = load_config(FinetuneConfig, None, ["base=tiny", *changes])
    material = order.material
    if objective == "sft":
        learner = objective_of("sft")
        material = learner.prepare(learner.read(config), order.base, config, order.settings)
    resolve_order(config.train, order.base, material, order.run_directory, order.settings, said.append)
    lines = [line for line in said if "padding" in line]
    assert len(lines) == (told is not None)
    assert told is None or re.search(told, lines[0])


def test_a_step_in_which_every_group_agrees_is_told_and_what_it_leaves_can_be_saved(bench, caplog, tmp_path) -> None:
    agreed = "[{axis: short, kind: length, high: 100000, unit: characters}]"
    trainer, batch = trained(bench("train.grpo.rollouts=transformers", f"train.grpo.rewards={agreed}"))
    assert not batch["advantages"].any()
    assert "step 1 taught nothing: the answers of each group got equal rewards" in caplog.text
    trainer.save_model(str(tmp_path / "saved"))
    held = trainer.held_norms()
    assert not any(norm for name, norm in held.items() if ".lora_B" in name)
    assert check_saved(tmp_path / "saved", trainer.num_trained_tensors, held) == len(held)
