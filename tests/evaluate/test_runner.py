"""A whole evaluation: by a fake engine that answers what the test says, and by real tiny models."""

import json
import math

import pytest

from r1ray.data.config import DataConfig
from r1ray.engine.config import EngineConfig
from r1ray.engine.fake import FakeEngine
from r1ray.errors import EvaluationError, ModelNotFound
from r1ray.evaluate.config import EvaluateConfig
from r1ray.evaluate.job import evaluate_models
from r1ray.evaluate.runner import evaluate
from r1ray.evaluate.table import comparison
from r1ray.model.importer import import_model
from r1ray.model.load import load_tokenizer
from r1ray.types import Annotations, Conversation, Message, Sampling


def structured(intent, reply="Block it in the app.", **entities):
    return json.dumps({"intent": intent, "entities": entities}, ensure_ascii=False) + "\n" + reply


def dialogues(num=6):
    def one(i):
        question = f"我的卡丢了 {i}" if i % 2 else f"I lost my card {i}"
        gold = Message(role="assistant", content=structured("lost", card=i), annotations=Annotations(intent="lost", entities={"card": i}))
        return Conversation(id=f"d{i}", messages=(Message(role="user", content=question), gold))

    return [one(i) for i in range(num)]


def config(**settings):
    settings.setdefault("engine", EngineConfig(num_slots=4, num_threads=1, dtype="float32"))
    return EvaluateConfig(data=DataConfig(path="held_out.jsonl"), progress_s=None, num_bootstrap=50, **settings)


@pytest.fixture
def artifact(tiny_qwen2, registry):
    return import_model(str(tiny_qwen2), name="tiny", registry=registry)


def answering(artifact, texts):
    """A fake engine that answers the i-th example with texts[i]."""
    tokenizer = load_tokenizer(artifact)
    answers = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return FakeEngine(EngineConfig(type="fake", num_slots=3), answer=lambda r: answers[int(r.id.split(":")[0])], context_length=512)


def test_every_metric_of_a_whole_set(artifact, registry):
    texts = [structured("lost", card=i) for i in range(3)] + [structured("stolen", card=3), "no idea", structured("lost", card=99)]
    report = evaluate(artifact, dialogues(), config(), registry=registry, engine=answering(artifact, texts))
    figures = report.metrics
    assert (report.model, report.num_examples, len(report.examples)) == ("tiny@1", 6, 6)
    assert figures["intent_accuracy"] == pytest.approx(4 / 6)
    assert figures["entity_f1"] == pytest.approx(2 * 4 / (5 + 6))
    assert figures["format_ok"] == pytest.approx(5 / 6)
    assert figures["intent_accuracy_low"] <= figures["intent_accuracy"] <= figures["intent_accuracy_high"]
    assert figures["intent_accuracy/en"] == pytest.approx(2 / 3)
    assert figures["intent_accuracy/zh"] == pytest.approx(2 / 3)
    assert figures["tokens_per_second"] > 0
    assert "perplexity" not in figures
    row = report.examples[4]
    assert (row["answer"], row["finish_reason"], row["language"], row["intent"]) == ("no idea", "stop", "en", "lost")


def test_metrics_can_be_chosen(artifact, registry):
    texts = [structured("lost", card=i) for i in range(6)]
    report = evaluate(artifact, dialogues(), config(metrics=("intent_accuracy",)), registry=registry, engine=answering(artifact, texts))
    assert {n.split("/")[0] for n in report.metrics} & {"entity_f1", "rouge_l", "format_ok"} == set()
    assert report.metrics["intent_accuracy"] == 1


def test_perplexity_alone_writes_no_answers(artifact, registry):
    both = evaluate(artifact, dialogues(), config(metrics=("perplexity", "intent_accuracy")), registry=registry)
    alone = evaluate(artifact, dialogues(), config(metrics=("perplexity",)), registry=registry)
    assert "tokens_per_second" in both.metrics and "answer" in both.examples[0]
    assert {name.split("/")[0].removesuffix("_low").removesuffix("_high") for name in alone.metrics} == {"perplexity"}
    assert alone.metrics["perplexity"] == pytest.approx(both.metrics["perplexity"], rel=1e-4)
    assert "answer" not in alone.examples[0] and alone.examples[0]["gold"] == both.examples[0]["gold"]


def test_perplexity_alone_is_refused_where_the_engine_scores_no_text(artifact, registry):
    with pytest.raises(EvaluationError, match=r"engine\.type=fake gives no probabilities of a given text for tiny@1"):
        evaluate(artifact, dialogues(), config(metrics=("perplexity",), engine=EngineConfig(type="fake")), registry=registry)


def test_a_rambling_answer_is_cut_and_a_stop_text_ends_it(artifact, registry):
    engine = answering(artifact, ["blah " * 400] * 6)
    cut = evaluate(artifact, dialogues(), config(), registry=registry, engine=engine)
    assert cut.metrics["truncated_share"] == 1
    assert cut.metrics["mean_answer_tokens"] < 150
    stopped = evaluate(artifact, dialogues(), config(), registry=registry, engine=engine, sampling=Sampling(temperature=0, stop=("ah b",)))
    assert stopped.examples[0]["answer"] == "bl"


def test_reasoning_is_kept_apart_from_the_answer(tiny_deepseek_v3, registry):
    artifact = import_model(str(tiny_deepseek_v3), name="r1", registry=registry)
    texts = [f"I think\n</think>\n\n{structured('lost', card=i)}" for i in range(6)]
    report = evaluate(artifact, dialogues(), config(length_margin=None), registry=registry, engine=answering(artifact, texts))
    assert report.metrics["intent_accuracy"] == 1
    assert report.examples[0]["reasoning"].strip() == "I think"


def test_perplexity_equals_one_by_one_scoring(artifact, registry):
    import torch

    from r1ray.model.load import load_model, training_tokenizer
    from r1ray.model.template import training_ids

    report = evaluate(artifact, dialogues(), config(sampling=Sampling(temperature=0, max_tokens=4)), registry=registry)
    model, tokenizer = load_model(artifact, registry=registry, dtype="float32"), training_tokenizer(artifact)
    total, count = 0.0, 0
    for conversation in dialogues():
        ids, mask = training_ids(tokenizer, conversation.messages)
        with torch.no_grad():
            likelihood = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        wanted = [i for i, is_answer in enumerate(mask) if is_answer]
        total -= sum(float(likelihood[i - 1, ids[i]]) for i in wanted)
        count += len(wanted)
    assert report.metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_the_model_gives_the_same_answers_with_and_without_perplexity(artifact, registry):
    settings = {"sampling": Sampling(temperature=0, max_tokens=6)}
    both = [evaluate(artifact, dialogues(4), config(metrics=m, **settings), registry=registry) for m in (None, ("rouge_l",))]
    assert [r["answer"] for r in both[0].examples] == [r["answer"] for r in both[1].examples]


def test_the_job_writes_report_runs_and_tags(artifact, registry, settings, tmp_path, capsys):
    from r1ray.data.write import write_parquet

    write_parquet(dialogues(), tmp_path / "test.parquet")
    given = EvaluateConfig(
        models=("tiny", "tiny@1"),
        data=DataConfig(path=tmp_path / "test.parquet"),
        limit=4,
        sampling=Sampling(temperature=0, max_tokens=3),
        engine=EngineConfig(num_slots=4, num_threads=1, dtype="float32"),
        num_bootstrap=20,
    )
    reports = evaluate_models(given, settings)
    assert [r.num_examples for r in reports] == [4, 4]
    written = list((settings.home / "reports").glob("*.json"))
    content = json.loads(written[0].read_text(encoding="utf-8"))
    assert len(written) == 1
    assert [r["model"] for r in content["reports"]] == ["tiny@1", "tiny@1"]
    assert content["reports"][0]["by_intent"]["lost"]["num_examples"] == 4
    assert registry.versions("tiny")[0].metrics["intent_accuracy"] == reports[0].metrics["intent_accuracy"]
    printed = capsys.readouterr().out
    assert "intent_accuracy" in printed
    assert "perplexity: 4/4" in printed


def test_a_job_without_models_or_with_an_unknown_one_says_so(settings, tmp_path):
    given = config()
    with pytest.raises(EvaluationError, match="No model"):
        evaluate_models(given, settings)
    with pytest.raises(ModelNotFound):
        evaluate_models(given.model_copy(update={"models": ("nothing",)}), settings)


def test_the_table_shows_differences_in_the_right_colour(artifact, registry):
    worse = evaluate(artifact, dialogues(), config(), registry=registry, engine=answering(artifact, ["x"] * 6))
    better = evaluate(
        artifact, dialogues(), config(), registry=registry, engine=answering(artifact, [structured("lost", card=i) for i in range(6)])
    )
    table = comparison([worse, better])
    cells = list(table.columns[2].cells)
    assert any("[green]+1.000" in cell for cell in cells)
