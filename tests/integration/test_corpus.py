"""Corpora by Ray Data on a real cluster: the same tokens as in memory, and nothing unfinished that looks finished."""

from __future__ import annotations

import csv
import json
import random
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from r1ray.config import load_config
from r1ray.data.demo import demo_conversations
from r1ray.data.prepare.config import PrepareConfig
from r1ray.data.prepare.pipeline import prepare
from r1ray.data.write import write_parquet
from r1ray.errors import InvalidValue, NothingToTrain, TooManyBadRows, WrongEncoding
from r1ray.model.importer import import_model
from r1ray.registry import Registry
from r1ray.train import runs, shards
from r1ray.train.config import FinetuneConfig
from r1ray.train.corpus import Recipe, read_corpus
from r1ray.train.objective import objective_of
from r1ray.train.order import plan_for
from r1ray.train.parts import parted

pytestmark = pytest.mark.ray
WORDS = ["card", "account", "transfer", "money", "lost", "today", "please", "balance", "the", "a", "of", "my", "卡", "转账"]


@pytest.fixture(scope="module")
def base(ray_cluster, tiny_llama):
    return import_model(str(tiny_llama), name="tiny-corpus", registry=Registry(ray_cluster.settings))


@pytest.fixture
def settings(ray_cluster, base, tmp_path):
    """The session's registry with an empty cache."""
    return ray_cluster.settings.model_copy(update={"home": tmp_path / "home"})


def said(rng: random.Random, most: int = 12) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Five formats, with rows that are broken, empty, too long, and an id that comes twice."""
    rng, place = random.Random(0), tmp_path / "corpus"
    place.mkdir()
    turns = [[{"role": role, "content": said(rng)} for role in ("user", "assistant") * rng.randint(1, 3)] for _ in range(120)]
    turns[7][1]["content"] = "money " * 900
    lines = [json.dumps({"id": f"m{n - n // 60}", "messages": row}, ensure_ascii=False) for n, row in enumerate(turns)]
    lines[3], lines[9] = '{"messages": ', ""
    (place / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    alpaca = [{"instruction": said(rng), "input": "", "output": said(rng) if n % 9 else ""} for n in range(40)]
    (place / "b.json").write_text(json.dumps([*alpaca, alpaca[1]], ensure_ascii=False), encoding="utf-8")
    with (place / "c.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text", "label"], *([said(rng), rng.choice("xy")] for _ in range(40))])
    write_parquet(demo_conversations("test")[:40], place / "d.parquet")
    chats = [{"conversations": [{"from": "human", "value": said(rng)}, {"from": "gpt", "value": said(rng)}]} for _ in range(40)]
    (place / "e.jsonl").write_text("\n".join(map(json.dumps, chats)))
    return place


def config(data: Path, backend: str, *more: str) -> FinetuneConfig:
    fixed = ["base=tiny-corpus", f"data.path={data}", f"data.backend={backend}", "train.batch_size=8", "train.max_length=400"]
    return load_config(FinetuneConfig, None, [*fixed, "data.max_bad_share=0.5", *more])


def material(chosen: FinetuneConfig, base, settings):
    objective = objective_of("sft")
    rows = objective.read(chosen)
    return rows.data_hash, objective.prepare(rows, base, chosen, settings)


def test_the_tokens_of_a_folder_are_those_of_the_same_rows_in_memory(folder, base, settings, tmp_path) -> None:
    chosen = [config(folder, backend, f"data.rejects={tmp_path / backend}") for backend in ("arrow", "ray")]
    data_hash, arrow = material(chosen[0], base, settings)
    corpus = read_corpus(Recipe(data=chosen[1].data, base=base, max_length=400, mix=None), settings, slice_bytes=3000)
    ids, masks = arrow.rows()
    streamed_ids, streamed_masks = corpus.tokens.rows()
    assert list(streamed_ids) == list(ids) and list(streamed_masks) == list(masks)
    assert corpus.data_hash == data_hash
    assert replace(corpus.tokens, path=arrow.path) == arrow and arrow.num_rejected > 0
    rejects = [(tmp_path / backend).read_text() for backend in ("arrow", "ray")]
    assert rejects[0] == rejects[1] and len(rejects[0].splitlines()) > 5
    assert "was already used at" in rejects[1]
    assert runs.run_name(chosen[0], base, data_hash) == runs.run_name(chosen[1], base, corpus.data_hash)
    batches = [plan_for(chosen[0].train, tokens).batch(5) for tokens in (arrow, corpus.tokens)]
    assert batches[0] == batches[1]
    assert corpus.tokens.origins().tolist() == arrow.origins().tolist()
    held = [parted(tokens, 0.2, 0)[1].chosen for tokens in (arrow, corpus.tokens)]
    assert held[0] == held[1]
    named = [objective_of("sft").read(config(folder, backend, "train.eval_share=0.2")).data_hash for backend in ("arrow", "ray")]
    assert named[0] == named[1] != data_hash


def test_a_corpus_is_tokenised_once_and_judged_each_time(folder, base, settings, caplog) -> None:
    def recipe(*more: str) -> Recipe:
        return Recipe(data=config(folder, "ray", *more).data, base=base, max_length=400, mix=None)

    with pytest.raises(TooManyBadRows, match=r"data\.max_bad_share=0 allows\. The first: .*a\.jsonl:4: no JSON"):
        read_corpus(recipe("data.max_bad_share=0"), settings)
    (made,) = (settings.cache / "tokens").iterdir()
    stamp = (made / shards.ROWS).stat().st_mtime_ns
    start = time.monotonic()
    assert read_corpus(recipe(), settings).tokens.path == made / shards.ROWS
    assert time.monotonic() - start < 2
    assert (made / shards.ROWS).stat().st_mtime_ns == stamp
    (made / "00000.arrow").write_bytes(b"half")
    read_corpus(recipe(), settings)
    assert (made / "00000.arrow").stat().st_size > 1000 and "is damaged and is made anew" in caplog.text


def test_a_prepared_file_is_drawn_from_by_its_mix_plan(base, settings, tmp_path) -> None:
    rows = demo_conversations("train")
    sources = [
        {"path": write_parquet(part, tmp_path / f"{role}.parquet"), "role": role}
        for role, part in (("domain", rows[:100]), ("history", rows[100:160]))
    ]
    mix = {"stages": [[0, {"history": 1.0}], [2, {"domain": 1.0}]], "short_share": None}
    wanted = {"sources": sources, "out": tmp_path / "x.parquet", "mix": mix, "progress_s": None}
    out = prepare(PrepareConfig.model_validate(wanted), settings).out
    assert out is not None
    pairs = [material(config(out, backend), base, settings) for backend in ("arrow", "ray")]
    assert pairs[0][0] == pairs[1][0]
    plans = [plan_for(config(out, "ray").train, tokens) for _, tokens in pairs]
    assert all(tokens.is_mixed for _, tokens in pairs)
    assert [plans[0].batch(step) for step in range(4)] == [plans[1].batch(step) for step in range(4)]
    trained = [parted(tokens, 0.2, 0)[0] for _, tokens in pairs]
    plans = [plan_for(config(out, "ray").train, part) for part in trained]
    assert [plans[0].batch(step) for step in range(4)] == [plans[1].batch(step) for step in range(4)]


def test_an_error_of_a_reader_comes_out_as_itself_and_leaves_nothing(base, settings, tmp_path) -> None:
    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}] * 100
    text = "\n".join(map(json.dumps, rows)).encode()
    (tmp_path / "x.jsonl").write_bytes(text + b'\n{"messages": [{"role": "user", "content": "\xbf\xa8"}]}')
    with pytest.raises(WrongEncoding, match="line 101"):
        read_corpus(Recipe(data=config(tmp_path / "x.jsonl", "ray").data, base=base, max_length=400, mix=None), settings)
    assert list((settings.cache / "tokens").iterdir()) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(NothingToTrain, match=r"holds no \.json"):
        read_corpus(Recipe(data=config(tmp_path / "empty", "ray").data, base=base, max_length=400, mix=None), settings)


def test_what_a_corpus_cannot_be_used_for_is_refused_with_what_to_set() -> None:
    for override, says in (("data.limit=5", "set limit=null"), ("train.objective=dpo", r"set data\.backend=arrow")):
        with pytest.raises(InvalidValue, match=says):
            config(Path("x.jsonl"), "ray", override)


SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


class Jobs:
    """`ray job submit` to the session's cluster."""

    def __init__(self, url: str, home: Path) -> None:
        from ray.job_submission import JobSubmissionClient

        self.client, self.home = JobSubmissionClient(url), home

    def submit(self, job: str, *overrides: str) -> str:
        root = Path(__file__).resolve().parents[2]
        command = shlex.join([sys.executable, str(root / "jobs" / f"{job}.py"), *overrides])
        environment = {"R1RAY_HOME": str(self.home), "RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(root)}
        end = time.monotonic() + 120
        while True:
            try:
                return str(self.client.submit_job(entrypoint=command, runtime_env={"env_vars": environment}))
            except RuntimeError as error:  # a node's agent comes up after the cluster answers
                if "No available agent" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(1)

    def finish(self, name: str) -> str:
        """Its output; it must have succeeded."""
        self.wait(name, lambda: self.client.get_job_status(name).is_terminal())
        log = self.client.get_job_logs(name)
        assert self.client.get_job_status(name) == "SUCCEEDED", log
        return log

    def wait(self, name: str, is_reached: Callable[[], bool], timeout_s: float = 240) -> None:
        end = time.monotonic() + timeout_s
        while not is_reached():
            assert time.monotonic() < end, self.client.get_job_logs(name)
            time.sleep(0.1)


@pytest.fixture
def jobs(ray_cluster) -> Jobs:
    return Jobs(ray_cluster.dashboard_url, ray_cluster.settings.home)


@pytest.mark.slow
@pytest.mark.shared
def test_a_submitted_job_prepares_a_file_and_another_trains_on_it_by_its_mix_plan(jobs, base, ray_cluster, tmp_path) -> None:
    if not SHARED.exists():
        pytest.skip("needs the data beside the checkout")
    rows = json.loads((SHARED / "alpaca_zh_demo.json").read_text(encoding="utf-8"))
    parts = {"domain": rows[:200], "history": rows[200:300]}
    for role, part in parts.items():
        numbered = [{**row, "id": str(number)} for number, row in enumerate(part)]  # both from 0
        (tmp_path / f"{role}.json").write_text(json.dumps(numbered), encoding="utf-8")
    sources = ", ".join(f"{{path: {tmp_path / role}.json, role: {role}}}" for role in parts)
    made = ["clean.languages=null", "augment.operations=[{type: syntax, share: 0.5}, {type: traps, share: 0.2}]"]
    told = jobs.finish(jobs.submit("prepare_data", f"sources=[{sources}]", f"out={tmp_path / 'x.parquet'}", *made))
    assert f"rows: {tmp_path / 'x.parquet'}" in told
    train = {"eval_share": 0.1, "eval_every_steps": 2, "early_stopping_patience": 2, "num_workers": 2, "max_steps": 4}
    train |= {"batch_size": 8, "max_length": 512, "dtype": "bfloat16", "threads_per_worker": 1}
    shape = [f"train.{key}={value}" for key, value in train.items()]
    data = [f"data.path={tmp_path / 'x.parquet'}", "data.backend=ray", "data.max_bad_share=0.9"]
    told = jobs.finish(jobs.submit("finetune", "name=from-prepared", "base=tiny-corpus", *data, *shape))
    assert "tokenising by Ray Data: done" in told and "drawn by the file's mix plan" in told and " are held out" in told
    assert "mix plan: in 4 steps " in told and "held_out" in told
    assert Registry(ray_cluster.settings).resolve("from-prepared").manifest.data_hash


@pytest.mark.slow
def test_a_job_that_is_stopped_while_it_tokenises_leaves_nothing_that_counts(jobs, base, ray_cluster, tmp_path) -> None:
    rng, cache = random.Random(1), ray_cluster.settings.cache / "tokens"
    with (tmp_path / "x.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(40_000):
            turns = [{"role": role, "content": said(rng, 60)} for role in ("user", "assistant")]
            file.write(json.dumps({"messages": turns}) + "\n")
    known = set(cache.glob("[!.]*")) if cache.exists() else set()
    asked = ["name=stopped", "base=tiny-corpus", f"data.path={tmp_path / 'x.jsonl'}", "data.backend=ray", "train.max_steps=1"]
    name = jobs.submit("finetune", *asked)
    jobs.wait(name, lambda: any(path.stat().st_size > 2**20 for path in cache.glob(".*/*.arrow")))
    jobs.client.stop_job(name)
    jobs.wait(name, lambda: jobs.client.get_job_status(name).is_terminal())
    assert set(cache.glob("[!.]*")) == known
    jobs.finish(jobs.submit("finetune", *asked))
    (made,) = set(cache.glob("[!.]*")) - known
    counted = shards.counts(made)
    assert counted is not None and counted["read"] == 40_000
