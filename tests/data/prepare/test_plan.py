"""The plan in a prepared file draws its rows in the shares that the config asks for."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r1ray.data.demo import demo_conversations
from r1ray.data.prepare.config import MixConfig, PrepareConfig
from r1ray.data.prepare.pipeline import prepare
from r1ray.data.prepare.plan import Walk, coverage, mix_plan, stored_mix
from r1ray.data.write import write_parquet
from r1ray.errors import InvalidValue, UnknownFormat


@pytest.fixture
def prepared(settings, tmp_path):
    rows = demo_conversations("train")
    parts = {"domain": rows[:300], "history": rows[300:450], "out_of_domain": rows[450:]}
    sources = [{"path": write_parquet(part, tmp_path / f"{role}.parquet"), "role": role} for role, part in parts.items()]
    stages = [[0, {"domain": 0.5, "history": 0.25, "out_of_domain": 0.25}], [5, {"domain": 1.0}]]
    tree = {"sources": sources, "out": tmp_path / "x.parquet", "mix": {"stages": stages}, "progress_s": None}
    return prepare(PrepareConfig.model_validate(tree), settings).out


def shortest(table, share):
    """Row numbers of the shortest rows of each role."""
    found = set()
    for role in {r["role"] for r in table}:
        rows = sorted((r["chars"], number) for number, r in enumerate(table) if r["role"] == role)
        found |= {number for _, number in rows[: round(share * len(rows))]}
    return found


def test_a_walk_draws_roles_by_stage_and_short_rows_by_share(prepared):
    table = pq.read_table(prepared, columns=["role", "chars"]).to_pylist()
    walk, short = Walk(prepared, batch_size=16, seed=0), shortest(table, 0.4)
    for step in range(10):
        batch = walk.batch()
        assert abs(sum(table[row]["role"] == "domain" for row in batch) - (8 if step < 5 else 16)) <= 1
        assert abs(sum(row in short for row in batch) - 0.4 * 16) <= 1


@pytest.fixture
def plain(settings, tmp_path):
    """One role, the default mix."""
    path = write_parquet(demo_conversations("train")[:500], tmp_path / "rows.parquet")
    return lambda **mix: prepare(
        PrepareConfig.model_validate({"sources": [{"path": path}], "out": tmp_path / "x.parquet", "mix": mix, "progress_s": None}), settings
    )


def test_by_default_an_epoch_draws_every_row_once(plain):
    result = plain()
    num_rows = result.report["rows_out"]
    drawn = Walk(result.out, batch_size=16, seed=5).take(num_rows)
    assert sorted(drawn) == list(range(num_rows))
    assert result.report["epoch"] == {"rows_not_drawn": 0, "rows_drawn_again": 0}
    assert 0 < result.report["short_chars"]["domain"] < result.report["median_chars"]


def test_what_an_epoch_leaves_out_is_in_the_report_with_what_to_do(plain, caplog):
    chars = sorted(pq.read_table(plain().out, columns=["chars"])["chars"].to_pylist())
    report = plain(short_chars=chars[len(chars) // 5]).report
    missed, again = report["epoch"].values()
    assert 0 < missed < report["rows_out"] and again > 0
    assert f"{missed} of {report['rows_out']} rows will not be drawn, {again} more than once. mix.short_share=null" in caplog.text
    assert plain(short_share=None).report["epoch"] == {"rows_not_drawn": 0, "rows_drawn_again": 0}


def test_coverage_counts_rows_that_never_come_and_rows_that_come_again():
    found = coverage(np.array([0, 0, 2, 2, 2, 3]), 6)
    assert (found.num_missed, found.num_repeated) == (3, 2)
    assert found.told.startswith("3 of 6 rows will not be drawn, 2 more than once. ")
    assert coverage(np.array([1, 0]), 2).told == "0 of 2 rows will not be drawn, 0 more than once"


def test_a_walk_over_some_rows_draws_no_other(prepared):
    roles = pq.read_table(prepared, columns=["role"])["role"].to_pylist()
    chosen = list(range(0, len(roles), 3))
    batch = Walk(prepared, batch_size=16, seed=0, rows=chosen).batch()
    assert all(0 <= row < len(chosen) for row in batch)
    assert abs(sum(roles[chosen[row]] == "domain" for row in batch) - 8) <= 1


def test_a_plan_that_wants_only_roles_without_rows_says_so(prepared):
    roles = pq.read_table(prepared, columns=["role"])["role"].to_pylist()
    history = [row for row, role in enumerate(roles) if role == "history"]
    walk = Walk(prepared, batch_size=4, seed=0, rows=history)
    with pytest.raises(InvalidValue, match=r"at step 5 no source with rows has a weight.*Set train\.mix=false"):
        walk.take(24)


def test_the_same_rows_in_other_roles_are_another_plan(settings, tmp_path):
    path = write_parquet(demo_conversations("train")[:40], tmp_path / "rows.parquet")
    stored = []
    for role in ("domain", "history"):
        tree = {
            "sources": [{"path": path, "role": role}],
            "out": tmp_path / f"{role}.parquet",
            "mix": {"history_share": 1.0},
            "progress_s": None,
        }
        stored.append(stored_mix(prepare(PrepareConfig.model_validate(tree), settings).out))
    assert stored[0] != stored[1]


def of_before(path, short_chars):
    """Ten rows of one role, whose median length is 5, prepared when plans did not name what they are drawn from."""
    table = pa.table({"role": ["domain"] * 10, "chars": list(range(1, 11))})
    old = {"stages": [[0, {"domain": 1.0}]], "short_share": 0.4, "short_chars": short_chars}
    pq.write_table(table.replace_schema_metadata({"r1ray.mix": json.dumps(old)}), path)
    return path


def test_a_file_of_before_keeps_the_limit_that_somebody_has_set(tmp_path):
    drawn = Walk(of_before(tmp_path / "x.parquet", 1), batch_size=4, seed=0).take(40).tolist()
    assert abs(drawn.count(0) - 16) <= 1


def test_a_median_that_nobody_has_set_is_left_out_of_a_file_of_before_and_an_epoch_draws_every_row_once(tmp_path):
    path = of_before(tmp_path / "x.parquet", 5)
    assert sorted(Walk(path, batch_size=5, seed=0).take(10)) == list(range(10))
    assert json.loads(stored_mix(path))["short_chars"] is None, "so that training makes its tokens anew, by the same plan"


def test_a_resumed_walk_goes_on(prepared):
    walk = Walk(prepared, batch_size=7, seed=3)
    for _ in range(6):
        walk.batch()
    saved = json.loads(json.dumps(walk.position()))
    assert [Walk(prepared, batch_size=7, seed=3).resume(saved).batch()] == [walk.batch()]


def test_a_file_that_was_not_prepared_has_no_plan(tmp_path):
    path = write_parquet(demo_conversations("test")[:2], tmp_path / "x.parquet")
    with pytest.raises(UnknownFormat, match="has no mix plan"):
        Walk(path, batch_size=1, seed=0)


def test_without_stages_the_seeds_shares_hold():
    ((step, weights),) = mix_plan(MixConfig()).stages
    assert (step, weights) == (0, {"domain": 0.7, "out_of_domain": 0.125, "history": pytest.approx(0.175)})
    assert mix_plan(MixConfig()).short_chars is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"stages": [[3, {"domain": 1}]]}, "begin at step 0"),
        ({"domain_share": 0.95}, "are more than 1"),
        ({"out_of_domain_share": 1.5}, "less than"),
    ],
)
def test_a_mix_that_makes_no_sense_is_refused(more, message):
    with pytest.raises(ValueError, match=message):
        MixConfig(**more)
