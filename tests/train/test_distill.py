"""Distillation: the divergences are the textbook's, passes do not change them, a student comes nearer, texts are a teacher's own."""

from __future__ import annotations

import json
from shutil import copytree
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from peft import get_peft_model
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer

from r1ray.config import load_config
from r1ray.errors import InvalidValue, UnsupportedModel
from r1ray.model.adapters import lora
from r1ray.model.family import family_of
from r1ray.model.importer import import_model
from r1ray.model.load import load_model
from r1ray.train.blocks import DistillSettings
from r1ray.train.config import FinetuneConfig
from r1ray.train.distillation import add_distillation_loss, summed_divergence, supervised_logits
from r1ray.train.loss import add_supervised_loss
from r1ray.train.objective import objective_of
from r1ray.train.objective.base import Bench
from r1ray.train.order import resolve_order
from r1ray.train.parallel.layout import Layout
from r1ray.train.schedule import Schedule


class Plain(Bench):
    """Without DeepSpeed, which wants a process group."""

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"deepspeed": None}


def by_torch(student, teacher, kind, temperature):
    q, p = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
    if kind == "forward":
        value = kl_div(q, p, log_target=True, reduction="sum")
    elif kind == "reverse":
        value = kl_div(p, q, log_target=True, reduction="sum")
    else:
        m = ((p.exp() + q.exp()) / 2).log()
        value = (kl_div(m, p, log_target=True, reduction="sum") + kl_div(m, q, log_target=True, reduction="sum")) / 2
    return value * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 0.7, 4.0])
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_each_divergence_and_its_gradient_are_torchs(kind, temperature) -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(70, 33) * 3, (torch.randn(70, 33) * 3).requires_grad_()
    twin = student.detach().clone().requires_grad_()
    ours, expected = summed_divergence(student, teacher, kind, temperature), by_torch(twin, teacher, kind, temperature)
    ours.backward()
    expected.backward()
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(student.grad, twin.grad, rtol=1e-4, atol=1e-5)
    assert summed_divergence(teacher, teacher, kind, temperature).abs() < 1e-4
    assert summed_divergence(student[:0], teacher[:0], kind, temperature) == 0


def test_a_larger_vocabularys_padding_counts_nothing() -> None:
    student, teacher = torch.randn(3, 8), torch.randn(3, 12)
    assert summed_divergence(student, teacher, "forward", 1.0) == summed_divergence(student, teacher[:, :8], "forward", 1.0)


def model(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def pair(directory, **settings):
    """A student, and a teacher that differs."""
    student, teacher = model(directory), model(directory).requires_grad_(False)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    add_supervised_loss(student)
    add_distillation_loss(student, DistillSettings(teacher="t", **settings))
    return student, teacher


def adapted(directory):
    """The same model under an adapter that changes what it says."""
    teacher = get_peft_model(model(directory), lora(family_of({"model_type": "llama"}), rank=4))
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    return teacher


def batch(rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 600, (4, 9), generator=torch.Generator().manual_seed(2))
    labels = torch.where(torch.arange(9) > torch.tensor([[3], [5], [1], [7]]), ids, -100)
    return {"input_ids": ids[rows], "labels": labels[rows]}


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_deepseek_v3"])
def test_the_summed_loss_does_not_depend_on_the_passes(fixture, request) -> None:
    student, teacher = pair(request.getfixturevalue(fixture), divergence="jsd", temperature=2.0, alpha=0.6)
    gradients = []
    for parts in ([slice(None)], [slice(0, 1), slice(1, 4)], [slice(i, i + 1) for i in range(4)]):
        student.zero_grad()
        total = sum(student(**batch(part), taught=supervised_logits(teacher, batch(part))) for part in parts)
        total.backward()
        gradients.append((total.item(), torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])))
    for value, gradient in gradients[1:]:
        assert value == pytest.approx(gradients[0][0], rel=1e-5)
        torch.testing.assert_close(gradient, gradients[0][1], rtol=1e-4, atol=1e-5)


def test_hard_labels_alone_are_supervised_fine_tuning(tiny_llama) -> None:
    student, teacher = pair(tiny_llama, alpha=0.0)
    taught = student(**batch(), taught=supervised_logits(teacher, batch()))
    assert taught.item() == pytest.approx(student(**batch(), supervised=True).item(), rel=1e-6)


def test_a_student_comes_nearer_to_its_teacher(tiny_llama) -> None:
    student, teacher = pair(tiny_llama)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = student(**batch(), taught=supervised_logits(teacher, batch()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.fixture
def config(tiny_llama, registry, settings):
    import_model(str(tiny_llama), name="tiny", registry=registry)
    turns = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"it is {i}"}] for i in range(6)]
    (settings.home / "rows.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))

    def make(*more: str) -> FinetuneConfig:
        base = ["base=tiny", f"data.path={settings.home / 'rows.jsonl'}", "train.objective=distill", "train.distill.teacher=tiny"]
        return load_config(FinetuneConfig, None, [*base, *more])

    return make


def test_a_teachers_texts_are_written_once_with_their_provenance(config, registry, settings, tiny_llama, tmp_path) -> None:
    from tests.engine.conftest import lively

    lively(tiny_llama).save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "teacher")
    import_model(str(tmp_path / "teacher"), name="sage", registry=registry)
    texts = [
        "train.distill.mode=texts",
        "train.distill.teacher=sage",
        "train.distill.sample_temperature=1",
        "train.distill.max_new_tokens=400",
    ]
    made = config(*texts, "data.max_bad_share=1")
    objective, base = objective_of("distill"), registry.resolve("tiny")
    tokens = objective.prepare(objective.read(made), base, made, settings)
    (path,) = (settings.cache / "answers").glob("*.parquet")
    written = pq.read_table(path)
    provenance = json.loads(written.schema.metadata[b"r1ray"])
    assert written.num_rows == 6
    assert (provenance["teacher"], provenance["sampling"]["temperature"]) == ("sage@1", 1)
    assert tokens.num_rows == sum(reason == "stop" for reason in written["finish_reason"].to_pylist()) > 0
    before = path.stat().st_mtime_ns
    objective.prepare(objective.read(made), base, made, settings)
    assert path.stat().st_mtime_ns == before
    rows = written.to_pylist()
    rows[1] |= {"answer": "kept, not asked again", "finish_reason": "stop"}
    left = path.with_suffix(".jsonl")  # of a job that was killed in its third answer
    left.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]) + json.dumps(rows[2])[:9])
    path.unlink()
    other = objective.prepare(objective.read(made), base, made, settings)
    assert pq.read_table(path).to_pylist() == rows, "the same answers, whoever else is asked"
    assert other.path != tokens.path, "other answers are other tokens"
    assert not left.exists()
    data = settings.home / "rows.jsonl"
    named = [{**json.loads(line), "id": f"row {number}"} for number, line in enumerate(data.read_text().splitlines())]
    data.write_text("".join(json.dumps(row) + "\n" for row in named))
    written_at = path.stat().st_mtime_ns
    renamed = objective.prepare(objective.read(made), base, made, settings)
    assert renamed.num_rows == other.num_rows
    assert path.stat().st_mtime_ns == written_at, "the same questions under other names are not asked again"


def test_another_teacher_is_another_run(config, registry, tiny_qwen2) -> None:
    import_model(str(tiny_qwen2), name="other", registry=registry)
    objective = objective_of("distill")
    assert objective.read(config()).data_hash != objective.read(config("train.distill.teacher=other")).data_hash


def test_a_teacher_with_another_vocabulary_can_only_teach_by_texts(config, registry, settings, tiny_llama, tmp_path) -> None:
    model(tiny_llama).save_pretrained(tmp_path / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "teacher")
    import_model(str(tmp_path / "teacher"), name="foreign", registry=registry)
    made, objective = config("train.distill.teacher=foreign"), objective_of("distill")
    with pytest.raises(UnsupportedModel, match=r"foreign@1 cannot teach tiny@1.*mode=texts"):
        objective.prepare(objective.read(made), registry.resolve("tiny"), made, settings)


@pytest.mark.parametrize(("kind", "says"), [("adapter", r"sage@1 is a prompt adapter.*mode=texts"), ("reward", "sage@1 is a reward model")])
def test_what_cannot_teach_is_refused_before_workers_start(kind, says, config, registry, settings) -> None:
    made, objective, base = config("train.distill.teacher=sage"), objective_of("distill"), registry.resolve("tiny")
    with registry.staging("sage") as staged:
        copytree(base.path, staged, dirs_exist_ok=True)
        (staged / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
        registry.register(staged, base.manifest.model_copy(update={"name": "sage", "kind": kind}))
    with pytest.raises(UnsupportedModel, match=says):
        objective.prepare(objective.read(made), base, made, settings)


def test_distillation_wants_a_teacher_that_stays_whole() -> None:
    for more, says in ((["train.distill.teacher=null"], "needs a model to learn from"), (["train.zero_stage=3"], "split the teacher")):
        with pytest.raises(InvalidValue, match=says):
            load_config(FinetuneConfig, None, ["data.path=x", "train.objective=distill", "train.distill.teacher=t", *more])


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_the_divergence_of_held_out_rows_is_measured_and_trains_nothing(kind, config, registry, settings, tiny_llama, tmp_path) -> None:
    taught = pair(tiny_llama)[1] if kind == "full" else adapted(tiny_llama)
    taught.save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "teacher")
    under = {} if kind == "full" else {"base": "tiny"}
    teacher = load_model(
        import_model(str(tmp_path / "teacher"), name="sage", registry=registry, **under), registry=registry, dtype="float32"
    )
    shape = ("method=full", "zero_stage=0", "dtype=float32", "attention=eager", "batch_size=2", "micro_batch_size=2", "eval_share=0.5")
    made = config("train.distill.teacher=sage", *(f"train.{item}" for item in shape))
    objective, base = objective_of("distill"), registry.resolve("tiny")
    material = objective.prepare(objective.read(made), base, made, settings)
    order = resolve_order(made.train, base, material, settings.checkpoints / "run", settings, lambda _: None)
    place = {"rank": 0, "num_workers": 1, "accumulation": 1, "layout": Layout(world=1), "global_rank": 0}
    bench = Plain(order=order, staging=tmp_path / "staging", schedule=Schedule(order.num_steps, 0.0, 1.0), callbacks=[], **place)
    trainer = objective.trainer(bench)
    trainer.model_wrapped = trainer.model
    summed, num_tokens = trainer.held_out_loss()
    student = model(tiny_llama)
    add_supervised_loss(student)
    add_distillation_loss(student, made.train.distill)
    rows = [trainer.held_out[number] for number in range(trainer.num_held_out)]
    expected = sum(student(**row, taught=supervised_logits(teacher, row)).item() for row in rows)
    assert summed == pytest.approx(expected, rel=1e-4) and expected > 0
    assert num_tokens == sum(int((row["labels"][:, 1:] != -100).sum()) for row in rows)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
