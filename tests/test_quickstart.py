"""The quickstart's own decisions; the steps themselves are jobs with tests of their own."""

from __future__ import annotations

import argparse
import importlib.util
import json
import socket
import sys
import time
from pathlib import Path

import pytest

from r1ray.settings import Settings

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def quickstart():
    sys.path.insert(0, str(ROOT / "scripts"))  # where Python looks first when it runs the script
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "scripts" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["quickstart"], sys.path[0]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "My Intents_train.csv"
    path.write_text("text,label\nwhere is my card,card_arrival\nit is gone,card_lost\n", encoding="utf-8")
    return path


def test_a_csv_takes_the_label_recipe_and_the_test_file_beside_it(quickstart, table, tmp_path):
    beside = table.with_name("My Intents_dev.csv")
    beside.write_text("text,label\nlost it,card_lost\n", encoding="utf-8")
    plan = quickstart.own_data(table, None, Settings(home=tmp_path))
    assert (plan.name, plan.train_config, plan.test, plan.collection) == ("my-intents-train", "finetune_labels", beside, None)
    assert plan.question == "lost it"


def test_a_named_test_file_wins(quickstart, table, tmp_path):
    plan = quickstart.own_data(table, table, Settings(home=tmp_path))
    assert plan.test == table


def test_dialogues_take_the_dialogue_recipe(quickstart, tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    data = tmp_path / "chats.jsonl"
    data.write_text(json.dumps({"messages": turns}), encoding="utf-8")
    assert quickstart.own_data(data, data, Settings(home=tmp_path)).train_config == "finetune_lora"


def test_a_missing_file_is_named_before_anything_starts(quickstart, tmp_path):
    with pytest.raises(quickstart.StepFailed, match=r"--data .*nothing\.csv: no such file"):
        quickstart.check_files(argparse.Namespace(data=tmp_path / "nothing.csv", test=None))


def test_a_taken_port_gives_the_next_free_one(quickstart):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert quickstart.free_port(port) > port


def test_a_service_that_ends_early_shows_its_log(quickstart, tmp_path):
    service = quickstart.Service("broken", ["sh", "-c", "echo no such device; exit 3"], tmp_path / "log", "http://127.0.0.1:9/health")
    with pytest.raises(quickstart.StepFailed, match=r"(?s)code 3.*no such device"):
        service.wait(20)
    service.stop()


def test_a_service_is_stopped_with_its_children(quickstart, tmp_path):
    service = quickstart.Service("parent", ["sh", "-c", "sleep 300 & echo $!; wait"], tmp_path / "log", "http://127.0.0.1:9/health")
    while not (child := (tmp_path / "log").read_text().strip()):
        pass
    service.stop(timeout_s=2)
    deadline = time.monotonic() + 5
    while (alive := runs(child)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive


def runs(pid: str) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] not in "ZX"


def test_a_failing_command_fails_its_step_with_its_own_words(quickstart, tmp_path, capsys):
    with pytest.raises(quickstart.StepFailed, match="`r1ray split` ended with code 1"):
        quickstart.r1ray("split", str(tmp_path / "nothing.csv"), str(tmp_path))
    shown = capsys.readouterr()
    assert "$ r1ray split" in shown.out
    assert "nothing.csv" in shown.err


def test_scores_that_do_not_rise_fail_the_tour(quickstart, tmp_path):
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"reports": [{"metrics": {"intent_accuracy": 0.0}}, {"metrics": {"intent_accuracy": 0.9}}]}))
    assert quickstart.check_scores(report) == "intent_accuracy: base 0.000 -> tuned 0.900"
    report.write_text(json.dumps({"reports": [{"metrics": {"exact_match": 0.5}}, {"metrics": {"exact_match": 0.5}}]}))
    with pytest.raises(quickstart.StepFailed, match="did not rise"):
        quickstart.check_scores(report)
