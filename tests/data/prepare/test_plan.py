"""The plan in a prepared file draws its rows in the shares that the config asks for."""

import json

import pyarrow.parquet as pq
import pytest

from r1ray.data.demo import demo_conversations
from r1ray.data.prepare.config import MixConfig, PrepareConfig
from r1ray.data.prepare.pipeline import prepare
from r1ray.data.prepare.plan import Walk, mix_plan
from r1ray.data.write import write_parquet
from r1ray.errors import UnknownFormat


@pytest.fixture
def prepared(settings, tmp_path):
    rows = demo_conversations("train")
    parts = {"domain": rows[:300], "history": rows[300:450], "out_of_domain": rows[450:]}
    sources = [{"path": write_parquet(part, tmp_path / f"{role}.parquet"), "role": role} for role, part in parts.items()]
    stages = [[0, {"domain": 0.5, "history": 0.25, "out_of_domain": 0.25}], [5, {"domain": 1.0}]]
    tree = {"sources": sources, "out": tmp_path / "x.parquet", "mix": {"stages": stages}, "progress_s": None}
    return prepare(PrepareConfig.model_validate(tree), settings).out


def test_a_walk_draws_roles_by_stage_and_short_rows_by_share(prepared):
    table = pq.read_table(prepared, columns=["role", "chars"]).to_pylist()
    walk = Walk(prepared, batch_size=16, seed=0)
    median = sorted(r["chars"] for r in table)[len(table) // 2]
    for step in range(10):
        batch = [table[row] for row in walk.batch()]
        assert abs(sum(r["role"] == "domain" for r in batch) - (8 if step < 5 else 16)) <= 2
        assert abs(sum(r["chars"] <= median for r in batch) - 0.4 * 16) <= 2


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
    ((step, weights),) = mix_plan(MixConfig(), 100).stages
    assert (step, weights) == (0, {"domain": 0.7, "out_of_domain": 0.125, "history": pytest.approx(0.175)})
    assert mix_plan(MixConfig(), 100).short_chars == 100


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
