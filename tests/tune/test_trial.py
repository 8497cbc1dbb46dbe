"""One setting after the other on one loaded model, without Ray: what a trial reports, and that no setting profits from the one before."""

import json

import pytest

from r1ray.config import load_config
from r1ray.model.importer import import_model
from r1ray.tune.config import SamplingSweepConfig
from r1ray.tune.trial import Bench
from r1ray.types import Sampling


@pytest.fixture
def bench(tiny_qwen2, registry, tmp_path):
    path = tmp_path / "held_out.jsonl"
    question = "what does the account with the long name cost in the first year and in the years after it? "
    turns = [[{"role": "user", "content": f"{question * 2}{i}"}, {"role": "assistant", "content": f"it is {i}"}] for i in range(3)]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    artifact = import_model(str(tiny_qwen2), name="tiny", registry=registry)
    engine = ["engine.num_slots=1", "engine.num_threads=1", "engine.dtype=float32", "quality=[rouge_l, exact_match]"]
    bench = Bench(load_config(SamplingSweepConfig, None, ["model=tiny", f"data.path={path}", *engine]), artifact, registry)
    yield bench
    bench.close()


def test_a_trial_reports_what_each_example_adds_to_each_metric_of_its_quality(bench):
    found = bench.measure(Sampling(temperature=0, max_tokens=4))
    shares = json.loads(found["shares"])
    assert {name: len(rows) for name, rows in shares.items()} == {"rouge_l": 3}, "exact_match is of labels only"
    assert found["quality"] == pytest.approx(sum(above for above, _ in shares["rouge_l"]) / 3)
    assert found["num_examples"] == 3
    assert found["latency_s"] > 0


def test_a_setting_computes_the_prompts_that_the_one_before_has_computed(bench):
    """Else every setting after the baseline would seem faster."""
    cached = []
    for _ in range(3):
        bench.measure(Sampling(temperature=0, max_tokens=4))
        cached.append(bench._engine.stats().num_cached_tokens - sum(cached))
    assert cached[0] > 0, "the examples begin alike: that is what serving shares"
    assert cached[1] == cached[2] == cached[0]
