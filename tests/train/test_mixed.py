"""A file of jobs/prepare_data.py is trained on as its mix plan says, by every worker alike."""

from __future__ import annotations

import json
from collections import Counter

import pyarrow.parquet as pq
import pytest

from r1ray.config import load_config
from r1ray.data.demo import demo_conversations
from r1ray.data.prepare.config import PrepareConfig
from r1ray.data.prepare.pipeline import prepare
from r1ray.data.prepare.plan import Walk
from r1ray.data.write import write_parquet
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


@pytest.mark.parametrize(("short_share", "most"), [(0.4, 0.9), (None, 0.5)], ids=["short rows in each batch", "lengths as they come"])
def test_batches_of_a_window_are_alike_in_length_and_have_of_each_kind_what_the_plan_gave(
    settings, base, tmp_path, short_share, most
) -> None:
    rows = demo_conversations("train")
    parts = {"domain": rows[:300], "history": rows[300:400]}
    sources = [{"path": write_parquet(part, tmp_path / f"{role}.parquet"), "role": role} for role, part in parts.items()]
    tree = {"sources": sources, "out": tmp_path / "x.parquet", "mix": {"short_share": short_share}, "progress_s": None}
    chosen = config(prepare(PrepareConfig.model_validate(tree), settings).out, "train.num_epochs=2")
    _, tokens = material(chosen, base, settings)
    apart, grouped = (plan_for(chosen.train.model_copy(update={"group_window": window}), tokens) for window in (1, 8))
    walk = Walk(tokens.path, batch_size=8, seed=chosen.train.seed)
    steps = range(2 * apart.steps_per_epoch)
    for step in steps:
        drawn, changed = apart.batch(step), grouped.batch(step)
        assert sorted(drawn) == sorted(walk.batch()), "a window of one batch is the plan's own"
        assert Counter(walk.kinds[list(drawn)]) == Counter(walk.kinds[list(changed)])
    for epoch in range(2):
        of_epoch = steps[epoch * apart.steps_per_epoch : (epoch + 1) * apart.steps_per_epoch]
        for window in (of_epoch[start : start + 8] for start in range(0, len(of_epoch), 8)):
            first, second = (sorted(row for step in window for row in plan.batch(step)) for plan in (apart, grouped))
            assert first == second
    assert grouped.padding_share(1, 2) < most * apart.padding_share(1, 2)


def test_without_the_mix_the_same_file_is_another_run_in_plain_order(prepared, base, settings) -> None:
    mixed, plain = (material(config(prepared, f"train.mix={on}"), base, settings) for on in ("true", "false"))
    assert mixed[0].data_hash != plain[0].data_hash
    assert not plain[1].is_mixed
    plan = plan_for(config(prepared).train, plain[1])
    assert sorted(row for step in range(plan.steps_per_epoch) for row in plan.batch(step)) == list(range(plain[1].num_rows))


def test_rows_lie_end_to_end_where_the_plan_mixes_lengths_and_not_where_batches_are_of_one_length(base, settings, tmp_path) -> None:
    sources = [{"path": write_parquet(demo_conversations("train")[:300], tmp_path / "rows.parquet")}]
    tree = {"sources": sources, "out": tmp_path / "x.parquet", "mix": {"short_share": 0.4}, "progress_s": None}
    prepared = prepare(PrepareConfig.model_validate(tree), settings).out
    packed = {}
    for mix, attention in (("true", "auto"), ("false", "auto"), ("true", "eager")):
        chosen, said = config(prepared, f"train.mix={mix}", f"train.attention={attention}"), []
        order = resolve_order(chosen.train, base, material(chosen, base, settings)[1], tmp_path, settings, said.append)
        assert any("no padding" in line for line in said) is order.config.packing
        packed[mix, attention] = order.config.packing
    assert packed == {("true", "auto"): True, ("false", "auto"): False, ("true", "eager"): False}


def test_rows_are_held_out_before_the_mix_draws_and_with_all_that_were_made_from_them(settings, base, tmp_path) -> None:
    rows = demo_conversations("train")
    parts = {"domain": rows[:150], "history": rows[300:400]}
    sources = [{"path": write_parquet(part, tmp_path / f"{role}.parquet"), "role": role} for role, part in parts.items()]
    augment = {"operations": [{"type": name, "share": 1.0} for name in ("synonyms", "traps")], "max_share": 0.5}
    tree = {"sources": sources, "out": tmp_path / "x.parquet", "augment": augment, "clean": {"quality": None}, "progress_s": None}
    out = prepare(PrepareConfig.model_validate(tree), settings).out
    chosen = config(out, "train.eval_share=0.2", "train.num_epochs=2")
    read, tokens = material(chosen, base, settings)
    said: list[str] = []
    order = resolve_order(chosen.train, base, tokens, tmp_path, settings, said.append)
    table = pq.read_table(out, columns=["origin", "role", "operations"]).to_pylist()
    assert len(table) == tokens.num_rows, "the file's order is that of the tokens"
    trained, held = [[table[row] for row in part.chosen] for part in (order.material, order.held_out)]
    assert any(row["operations"] != "[]" for row in held)
    assert not {row["origin"] for row in trained} & {row["origin"] for row in held}
    assert order.material.is_mixed and not order.held_out.is_mixed
    plan = plan_for(chosen.train, order.material)
    drawn = Counter(row for step in range(order.num_steps) for row in plan.batch(step))
    assert set(drawn) <= set(range(order.material.num_rows))
    roles = Counter(trained[row]["role"] for row in plan.batch(0))
    assert abs(roles["domain"] - 8 * 0.8) <= 1, "0.7 of the weights that have rows"
    missed, again = order.material.num_rows - len(drawn), sum(times > 1 for times in drawn.values())
    told = f"mix plan: in {order.num_steps} steps {missed} of {order.material.num_rows} rows will not be drawn, {again} more than once"
    assert any(line.startswith(told) for line in said)
    resumed = resolve_order(chosen.train, base, material(chosen, base, settings)[1], tmp_path, settings, said.append)
    assert (resumed.material.chosen, resumed.held_out.chosen) == (order.material.chosen, order.held_out.chosen)
    assert read.data_hash != material(config(out), base, settings)[0].data_hash, "what is held out is part of the run's identity"


def test_by_default_an_epoch_of_one_role_trains_on_every_row_and_says_so(settings, base, tmp_path) -> None:
    path = write_parquet(demo_conversations("train")[:120], tmp_path / "rows.parquet")
    tree = {
        "sources": [{"path": path}],
        "out": tmp_path / "x.parquet",
        "clean": {"near_duplicates": None, "quality": None},
        "progress_s": None,
    }
    chosen = config(prepare(PrepareConfig.model_validate(tree), settings).out)
    _, tokens = material(chosen, base, settings)
    said: list[str] = []
    resolve_order(chosen.train, base, tokens, tmp_path, settings, said.append)
    assert tokens.num_rows % 8 == 0
    assert f"mix plan: in {tokens.num_rows // 8} steps 0 of {tokens.num_rows} rows will not be drawn, 0 more than once" in said


def test_the_same_rows_with_other_ids_are_tokenised_anew_and_another_run_where_they_are_held_out(settings, base, tmp_path) -> None:
    answered = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, mark in zip(paths, ("#masked", "other"), strict=True):
        path.write_text("".join(json.dumps({"id": f"{n}{end}", "messages": answered}) + "\n" for n in range(4) for end in ("", mark)))
    made = [[material(config(path, f"train.eval_share={share}"), base, settings) for path in paths] for share in (0.0, 0.3)]
    assert made[0][0][0].data_hash == made[0][1][0].data_hash
    assert made[1][0][0].data_hash != made[1][1][0].data_hash
    assert [len(set(tokens.origins().tolist())) for _, tokens in made[0]] == [4, 8]


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
