"""A reward model on tiny models: its loss in any split, its export, its use, and who refuses it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from r1ray.config import load_config
from r1ray.engine.config import EngineConfig
from r1ray.engine.create import create_engine
from r1ray.errors import PromptTooLong, TrainingError, UnsupportedModel
from r1ray.model.importer import import_model
from r1ray.model.load import load_model, load_tokenizer, merge_adapter
from r1ray.model.reward import load_reward_model
from r1ray.model.template import answer_ids
from r1ray.serve.catalog import look_up
from r1ray.serve.config import ModelArgs
from r1ray.train.build import trained_model
from r1ray.train.config import FinetuneConfig
from r1ray.train.export import Result, export
from r1ray.train.objective.reward_trainer import ScoreTrainer
from r1ray.train.order import WorkOrder
from r1ray.train.pair_feed import PairFeed
from r1ray.train.schedule import Schedule
from r1ray.types import Message

ASKED = [
    ((Message(role="user", content="1 + 1?"),), Message(role="assistant", content="2")),
    ((Message(role="user", content="I lost my card."),), Message(role="assistant", content="Please block it today, in the app.")),
    ((Message(role="user", content="1 + 1?"),), Message(role="assistant", content="3")),
]


@pytest.fixture
def base(tiny_llama, registry):
    return import_model(str(tiny_llama), name="tiny", registry=registry)


def config(*changes: str) -> FinetuneConfig:
    return load_config(FinetuneConfig, None, ["name=judge", "data.path=x", "data.system_prompt=Help.", "train.objective=reward", *changes])


def built(base, settings, *changes: str):
    order = WorkOrder(
        config=config(*changes).train, base=base, material=None, run="r", run_directory=settings.home, num_steps=1, dtype="float32",
        attention="eager", settings=settings,
    )  # fmt: skip
    return trained_model(order)


def saved(model, base, out, *changes: str) -> Result:
    model.save_pretrained(out)
    return Result(checkpoint=out, dtype="float32", config=config(*changes), base=base, data_hash="d", metrics={}, run_id="run")


def judge(pairs, base, registry, settings, out, *changes: str):
    """(trained model, its registered version)."""
    model = built(base, settings, *changes)
    pairs.nudge(model)
    return model.eval(), export(saved(model, base, out, *changes), registry)


def test_any_split_over_workers_and_passes_gives_the_same_loss_and_gradient(pairs, base, settings, tmp_path) -> None:
    from trl import RewardConfig

    arguments = RewardConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False, remove_unused_columns=False,
        center_rewards_coefficient=0.01, disable_dropout=False, max_length=None,
    )  # fmt: skip
    model = built(base, settings, "train.method=full")
    made = ScoreTrainer(model, arguments, feed=pairs.feed(), schedule=Schedule(1, 0.0, 1.0), tokenizer=load_tokenizer(base), callbacks=[])
    losses, gradients = [], []
    for num_workers, accumulation in ((1, 1), (1, 3), (2, 2), (4, 2)):
        made.model.zero_grad()
        total = 0.0
        for rank in range(num_workers):
            one: PairFeed = pairs.feed(rank=rank, num_workers=num_workers, accumulation=accumulation)
            for number in range(accumulation):
                part = made.compute_loss(made.model, one[number], num_items_in_batch=one.num_trained(0))
                part.backward()
                total += part.item()
        losses.append(total)
        gradients.append(torch.cat([p.grad.flatten() for p in made.model.parameters()]))
        assert 0 <= made.marks()["accuracy"] <= 1
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-3, atol=1e-6)
    made.judge_on(pairs.rows, tmp_path)
    scores = made.before()
    assert len(scores) == len(pairs.rows) and set(made.figures(scores)) == {"accuracy", "margin"}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_reward_model_is_registered_as_one_and_scores_as_it_was_trained(pairs, base, registry, settings, tmp_path, method) -> None:
    model, version = judge(pairs, base, registry, settings, tmp_path / "out", f"train.method={method}")
    manifest = version.manifest
    assert (manifest.kind, manifest.base) == ("reward", base.ref if method == "lora" else None)
    loaded = load_reward_model(registry.resolve("judge"), registry=registry, dtype="float32")
    prompts, answers = zip(*ASKED, strict=True)
    scores = loaded.score(prompts, answers, batch_size=2)
    assert loaded.score(prompts, [answer.content for answer in answers]) == pytest.approx(scores, rel=1e-4, abs=1e-5)
    for (prompt, answer), score in zip(ASKED, scores, strict=True):
        asked, said = answer_ids(loaded._tokenizer, prompt, answer, system_prompt="Help.")
        expected = model(input_ids=torch.tensor([asked + said])).logits[0, 0].item()
        assert score == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len(set(scores)) == 3


def test_nobody_takes_a_reward_model_for_a_chat_model(pairs, base, registry, settings, tmp_path) -> None:
    _, version = judge(pairs, base, registry, settings, tmp_path / "out")
    refusals = [
        lambda: create_engine(version, EngineConfig(), registry),
        lambda: load_model(version, registry=registry),
        lambda: merge_adapter(version, tmp_path / "merged", registry),
        lambda: look_up([ModelArgs(id="m", ref=version.ref)], settings),
    ]
    for refusal in refusals:
        with pytest.raises(UnsupportedModel, match="judge@1 is a reward model"):
            refusal()
    with pytest.raises(UnsupportedModel, match="tiny@1 is of kind full, no reward model"):
        load_reward_model(base, registry=registry)


def test_a_lost_or_empty_head_is_not_registered(pairs, base, registry, settings, tmp_path) -> None:
    model = built(base, settings)
    pairs.nudge(model)
    result = saved(model, base, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    head = next(name for name in tensors if name.endswith("score.weight"))
    save_file({**tensors, head: torch.zeros_like(tensors[head])}, file)
    with pytest.raises(TrainingError, match=r"score\.weight has norm 0"):
        export(result, registry)
    del tensors[head]
    save_file(tensors, file)
    with pytest.raises(TrainingError, match=r"holds no score\.weight"):
        export(result, registry)


def test_what_exceeds_the_context_is_refused(pairs, base, registry, settings, tmp_path) -> None:
    _, version = judge(pairs, base, registry, settings, tmp_path / "out")
    with pytest.raises(PromptTooLong, match="takes 512"):
        load_reward_model(version, registry=registry, dtype="float32").score([ASKED[0][0]], ["no " * 600])


def test_a_head_is_random_by_the_seed(base, settings) -> None:
    heads = [built(base, settings, f"train.seed={seed}", "train.method=full").score.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_transformers_own_head_gives_the_same_numbers(base, settings) -> None:
    ours = built(base, settings, "train.method=full").eval()
    theirs = AutoModelForSequenceClassification.from_pretrained(base.path, num_labels=1, dtype=torch.float32).eval()
    theirs.load_state_dict(ours.state_dict())
    theirs.config.pad_token_id = ours.config.pad_token_id
    ids = torch.arange(20, 44)[None]
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)
