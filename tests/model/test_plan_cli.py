"""`r1ray plan` as a user calls it."""

from __future__ import annotations

import inspect
import json

import pytest
from typer.testing import CliRunner

from r1ray.cli import app
from r1ray.cli.plan import check_serving, check_training, serve, train
from r1ray.cluster import Cluster, Node
from r1ray.errors import ClusterTooSmall
from r1ray.model.plan.catalog import find
from r1ray.model.plan.hardware import load_hardware
from r1ray.model.plan.serving import ServingWish, choose
from r1ray.model.plan.training import TrainingWish, plan_training
from r1ray.settings import Settings


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("R1RAY_HOME", str(tmp_path))

    def call(*arguments):
        return CliRunner().invoke(app, ["plan", *arguments])

    return call


def test_models_lists_r1_and_its_distills(run):
    output = run("models").output
    assert "r1-distill-qwen-32b" in output
    assert "671.03 B" in output


@pytest.mark.parametrize(("asked", "wish", "fixed"), [(train, TrainingWish, {"targets"}), (serve, ServingWish, {"memory_share"})])
def test_what_can_be_wished_for_has_an_option_of_its_name(asked, wish, fixed):
    """Options reach the plan by their names alone."""
    assert wish.model_fields.keys() - inspect.signature(asked).parameters.keys() == fixed


def test_training_that_fits_exits_with_0_and_names_its_assumption(run):
    done = run("train", "--model", "r1-distill-qwen-7b", "--gpus", "1xh100", "--micro-batch-size", "1")
    assert done.exit_code == 0
    assert "1 x h100, lora, ZeRO-2: fits" in done.output
    assert "MFU" in done.output
    assert "main memory of a node with 1 GPU workers" in done.output
    assert "FP8" not in done.output


def test_a_model_that_is_published_in_fp8_must_be_dequantised_first(run):
    done = run("train", "--model", "r1", "--gpus", "32xh100", "--zero-stage", "3", "--gradient-checkpointing", "--micro-batch-size", "1")
    assert "r1ray dequantise r1; that takes 1,275 GiB of disk" in done.output


def test_training_that_does_not_fit_exits_with_1_and_shows_what_would(run):
    done = run("train", "--model", "r1-distill-qwen-7b", "--method", "full", "--gpus", "2xh100")
    assert done.exit_code == 1
    assert "does not fit" in done.output
    assert "ZeRO-3" in done.output


def test_json_has_the_peak_the_hours_and_the_money(run):
    options = (
        "--model",
        "r1",
        "--zero-stage",
        "3",
        "--gradient-checkpointing",
        "--gpus",
        "32xh100",
        "--micro-batch-size",
        "1",
        "--tokens",
        "1B",
        "--json",
    )
    done = json.loads(run("train", *options).output)
    wanted = done["wanted"]
    assert wanted["fits"] is True
    assert wanted["total_parameters"] > 671e9
    assert wanted["node_memory_bytes"]["num_workers"] == 8
    assert done["quantisation"] == "fp8"
    assert wanted["money"] == pytest.approx(wanted["hours"] * 32 * 2.9)
    assert {plan["gpus"].split("x", 1)[1] for plan in done["fewest"]} >= {"h100", "h20", "a800-80gb"}


def test_serving_prints_the_layout_the_bundles_and_the_lines_for_serve_config(run):
    output = run("serve", "--model", "r1", "--gpus", "16xh100", "--tensor-parallel", "8").output
    assert "2 stages of 32+29 layers" in output
    assert "2 bundles of {GPU: 8}, STRICT_SPREAD" in " ".join(output.split())
    assert "stages: 2 # layers 32, 29" in output
    assert "tensor_parallel: 8 # GPUs of one node" in output


def test_serving_simulates_when_asked(run):
    options = ("--model", "r1-distill-qwen-32b", "--gpus", "4xl20", "--simulate", "--rate", "0.5", "--requests", "200", "--json")
    outcome = json.loads(run("serve", *options).output)["simulation"]
    assert outcome["num_finished"] == 200
    assert 0 < outcome["ttft"]["p50"] <= outcome["ttft"]["p90"] <= outcome["ttft"]["p99"]


def test_more_load_means_longer_waits(run):
    def wait(rate):
        options = ("--model", "r1-distill-qwen-32b", "--gpus", "4xl20", "--simulate", "--rate", rate, "--requests", "1000", "--json")
        return json.loads(run("serve", *options).output)["simulation"]["ttft"]["p90"]

    assert wait("0.2") < wait("2") < wait("20")


def test_the_gpu_file_can_be_copied_once_and_is_then_in_force(run, tmp_path):
    own = tmp_path / "gpus.yaml"
    assert run("gpus", "--write", str(own)).exit_code == 0
    own.write_text(own.read_text(encoding="utf-8").replace("price_per_hour: 2.90", "price_per_hour: 4.25"), encoding="utf-8")
    assert "4.25" in run("gpus").output
    assert run("gpus", "--write", str(own)).exit_code == 1


def cluster_of(num_nodes, gpus):
    return Cluster(address="here", nodes=tuple(Node(id=str(n), resources={"CPU": 32.0, "GPU": float(gpus)}) for n in range(num_nodes)))


def test_a_plan_is_held_against_the_cluster(tmp_path):
    hardware = load_hardware(settings=Settings(home=tmp_path))
    shape, pool = find("r1-distill-qwen-7b").shape, hardware.pool("8xh100")
    plan = plan_training(shape, TrainingWish(), pool, hardware.assumptions)
    assert "can hold 8 workers" in check_training(cluster_of(2, 4), plan)
    with pytest.raises(ClusterTooSmall, match=r"can ever hold 4.*--gpus 4xh100"):
        check_training(cluster_of(1, 4), plan)
    with pytest.raises(ClusterTooSmall, match="No GPU type"):
        check_training(cluster_of(1, 4), None)


def test_a_replica_is_held_against_the_cluster(tmp_path):
    hardware = load_hardware(settings=Settings(home=tmp_path))
    replica = choose(find("r1").shape, hardware.pool("16xh100"), ServingWish(tensor_parallel=8), hardware.assumptions)
    assert "16 bundles of one GPU" in check_serving(cluster_of(2, 8), "r1", replica)
    with pytest.raises(ClusterTooSmall, match="serving r1"):
        check_serving(cluster_of(1, 8), "r1", replica)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "--model", "r2"), "No model 'r2'"),
        (("train", "--model", "r1", "--gpus", "8xh1000"), "Did you mean"),
        (("train", "--model", "r1", "--method", "magic"), "method"),
        (("train", "--model", "r1", "--tokens", "many"), "500k"),
        (("serve", "--model", "r1", "--gpus", "1xh100"), "do not fit"),
        (("serve", "--model", "r1", "--gpus", "16xh100", "--prompt", "long"), "~512"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_1(run, arguments, said):
    done = run(*arguments)
    assert done.exit_code == 1
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
