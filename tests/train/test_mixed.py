"""A file of jobs/prepare_data.py is trained on as its mix plan says, by every worker alike."""

from __future__ import annotations

from collections import Counter

import pyarrow.parquet as pq
import pytest

from r1ray.config import load_config
from r1ray.data.demo import demo_conversations
from r1ray.data.prepare.config import PrepareConfig
from r1ray.data.prepare.pipeline import prepare
from r1ray.data.write import write_parquet
from r1ray.errors import InvalidValue
from r1ray.model.importer import import_model
from r1ray.train.config import FinetuneConfig
from r1ray.train.launcher import show
from r1ray.train.objective import objective_of
from r1ray.train.order import plan_for, resolve_order


@pytest.fixture
def prepared(settings, tmp_path):
    """200 dialogues of the domain and 100 older ones; older ones only in the first two steps."""
    rows = demo_conversations("train")
    parts = {"domain": rows[:200], "history": rows[200:300]}
    sources = [{"path": write_parquet(part, tmp_path / f"{role}.parquet"), "role": role} for role, part in parts.items()]
    mix = {"stages": [[0, {"history": 1.0}], [2, {"domain": 1.0}]], "short_share": None}
    return prepare(
        PrepareConfig.model_validate({"sources": sources, "out": tmp_path / "x.parquet", "mix": mix, "progress_s": None}), settings
    ).out


@pytest.fixture
def base(tiny_llama, registry):
    return import_model(str(tiny_llama), name="tiny", registry=registry)


def config(path, *more):
    return load_config(FinetuneConfig, None, ["base=tiny", f"data.path={path}", "train.batch_size=8", "data.max_bad_share=1", *more])


def material(chosen, base, settings):
    objective = objective_of("sft")
    rows = objective.read(chosen)
    return rows, objective.prepare(rows, base, chosen, settings)


def test_batches_follow_the_stages_of_the_plan(prepared, base, settings) -> None:
    chosen = config(prepared)
    _, tokens = material(chosen, base, settings)
    roles = pq.read_table(tokens.path, columns=["role"])["role"].to_pylist()
    plan = plan_for(chosen.train, tokens)
    drawn = [Counter(roles[row] for row in plan.batch(step)) for step in range(4)]
    assert drawn == [Counter(history=8), Counter(history=8), Counter(domain=8), Counter(domain=8)]
    other = plan_for(chosen.train, tokens)
    assert other.batch(3) == plan.batch(3), "a resumed run, or another worker, draws the same"
    shares = [plan.micro_batches(3, rank=rank, num_workers=2, accumulation=2) for rank in (0, 1)]
    assert sorted(row for rank in shares for rows in rank for row in rows) == sorted(plan.batch(3))
    assert 0 <= plan.padding_share(2, 2) < 1


def test_without_the_mix_the_same_file_is_another_run_in_plain_order(prepared, base, settings) -> None:
    mixed, plain = (material(config(prepared, f"train.mix={on}"), base, settings) for on in ("true", "false"))
    assert mixed[0].data_hash != plain[0].data_hash
    assert not plain[1].is_mixed
    plan = plan_for(config(prepared).train, plain[1])
    assert sorted(row for step in range(plan.steps_per_epoch) for row in plan.batch(step)) == list(range(plain[1].num_rows))


def test_holding_rows_out_of_a_mix_is_refused(prepared, base, settings, tmp_path) -> None:
    chosen = config(prepared, "train.eval_share=0.1")
    _, tokens = material(chosen, base, settings)
    with pytest.raises(InvalidValue, match=r"train\.mix=false"):
        resolve_order(chosen.train, base, tokens, tmp_path, settings, lambda _: None)


def test_show_prints_what_carries_loss_and_nothing_else_between_marks(prepared, base, settings, capsys) -> None:
    text = show(config(prepared, "show=2"), settings)
    assert text.count("--- dialogue") == 2
    assert "⟦" in text
    for marked in text.split("⟦")[1:]:
        inside = marked.partition("⟧")[0]
        assert "<|im_start|>user" not in inside
        assert inside.rstrip().endswith("<|im_end|>")
    assert "dialogues" in capsys.readouterr().out
    assert not settings.checkpoints.exists()
