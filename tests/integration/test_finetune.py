"""Fine-tuning on a real Ray cluster: two workers, DeepSpeed, real tiny models; a worker and a driver are killed for real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from r1ray.config import load_config
from r1ray.errors import ClusterTooSmall, DiskFull, RunInUse
from r1ray.model.importer import import_model
from r1ray.model.load import load_model
from r1ray.registry import Registry
from r1ray.train import checkpoint, runs
from r1ray.train.config import FinetuneConfig
from r1ray.train.launcher import finetune
from r1ray.train.progress import FILE, curve

pytestmark = pytest.mark.ray
ROOT = Path(__file__).resolve().parents[2]
STEPS = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Forty dialogues in the OpenAI form."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    turns = [
        [{"role": "user", "content": f"what is {i} plus {i % 5}?"}, {"role": "assistant", "content": f"the answer is {i + i % 5}"}]
        for i in range(40)
    ]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return path


@pytest.fixture(scope="module")
def registry(ray_cluster, tiny_llama, tiny_deepseek_v3) -> Registry:
    registry = Registry(ray_cluster.settings)
    import_model(str(tiny_llama), name="tiny-llama", registry=registry)
    import_model(str(tiny_deepseek_v3), name="tiny-r1", registry=registry)
    return registry


def overrides(name: str, data: Path, *more: str) -> list[str]:
    train = {"num_workers": 2, "batch_size": 4, "micro_batch_size": 1, "max_steps": STEPS, "learning_rate": 5e-3, "dtype": "bfloat16"}
    saving = {"checkpoint_every_steps": 2, "log_every_steps": 5, "threads_per_worker": 1, "max_failures": 1}
    return [f"name={name}", "base=tiny-llama", f"data.path={data}", *(f"train.{k}={v}" for k, v in {**train, **saving}.items()), *more]


def config(name: str, data: Path, *more: str) -> FinetuneConfig:
    return load_config(FinetuneConfig, None, overrides(name, data, *more))


def run_directory(registry: Registry, name: str) -> Path | None:
    return next(iter(registry.settings.checkpoints.glob(f"{name}-*")), None)


def wait_for_step(registry: Registry, name: str, step: int, timeout_s: float = 90) -> Path:
    """Until the run has saved at least `step`; its directory."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        directory = run_directory(registry, name)
        if directory is not None and any((path / "meta-rank1.json").exists() for path in checkpoint.found(directory)):
            steps = curve(directory)
            if steps and steps[-1].step >= step:
                return directory
        time.sleep(0.02)
    raise AssertionError(f"{name} did not reach step {step}")


def worker_pids() -> list[int]:
    from ray.util.state import list_actors

    return [actor.pid for actor in list_actors(filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")])]


def losses(directory: Path) -> list[float]:
    return [step.loss for step in curve(directory)]


@pytest.fixture(scope="module")
def uninterrupted(registry, data):
    return finetune(config("calm", data), registry.settings)


def test_two_workers_register_an_adapter_with_its_lineage(registry, uninterrupted) -> None:
    manifest = uninterrupted.manifest
    assert (manifest.kind, manifest.base, manifest.parents) == ("adapter", "tiny-llama@1", ("tiny-llama@1",))
    assert manifest.base_sha256 == registry.resolve("tiny-llama").manifest.weights_sha256
    assert manifest.data_hash and manifest.config["train"]["num_workers"] == 2
    assert manifest.metrics["num_steps"] == STEPS
    directory = run_directory(registry, "calm")
    assert directory is not None
    assert losses(directory)[-1] < losses(directory)[0]
    assert len(checkpoint.found(directory)) == 2
    assert load_model(uninterrupted, registry=registry, dtype="float32").num_parameters() > 0


def test_the_finished_job_submitted_again_names_its_version(registry, uninterrupted, data, capsys) -> None:
    start = time.monotonic()
    again = finetune(config("calm", data, "train.max_failures=0"), registry.settings)
    assert again.ref == uninterrupted.ref
    assert "is finished" in capsys.readouterr().out
    assert time.monotonic() - start < 5


def test_a_job_that_another_one_trains_is_refused_before_anything_is_removed(registry, uninterrupted, data) -> None:
    directory = run_directory(registry, "calm")
    assert directory is not None
    with runs.held(directory), pytest.raises(RunInUse, match=f"pid {os.getpid()}"):
        finetune(config("calm", data, "train.restart=true"), registry.settings)
    assert checkpoint.last_good(directory) is not None


def test_a_killed_worker_resumes_with_the_same_losses_to_every_digit(registry, uninterrupted, data) -> None:
    others = set(worker_pids())

    def kill() -> None:
        while len(workers := set(worker_pids()) - others) < 2:  # known long before the third of ten short steps
            time.sleep(0.2)
        wait_for_step(registry, "struck", 3)
        os.kill(max(workers), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    finetune(config("struck", data), registry.settings)
    killer.join()
    calm, struck = run_directory(registry, "calm"), run_directory(registry, "struck")
    assert calm is not None and struck is not None
    assert len((struck / FILE).read_text().splitlines()) > STEPS, "the worker died after the last step"
    assert losses(struck) == losses(calm)


@pytest.mark.slow
def test_a_killed_driver_resumes_when_the_job_is_submitted_again(registry, uninterrupted, data, capsys) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "finetune.py"), *overrides("orphan", data)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT) as driver:
        directory = wait_for_step(registry, "orphan", 3)
        driver.kill()
    newest = checkpoint.found(directory)[0]
    shard = next(newest.glob("global_step*/*rank_0*optim_states.pt"), None)
    if shard is not None and len(checkpoint.found(directory)) > 1:
        shard.write_bytes(shard.read_bytes()[:-100])  # and its newest checkpoint is damaged, too
    artifact = finetune(config("orphan", data), registry.settings)
    calm = run_directory(registry, "calm")
    assert calm is not None
    assert losses(directory) == losses(calm)
    assert artifact.version == 1


def test_full_training_of_an_r1_model_at_zero_3(registry, data) -> None:
    more = ["base=tiny-r1", "train.method=full", "train.zero_stage=3", "train.max_steps=3", "train.checkpoint_every_steps=null"]
    artifact = finetune(config("whole", data, *more, "train.packing=true", "train.learning_rate=1e-3"), registry.settings)
    assert artifact.manifest.kind == "full"
    assert artifact.manifest.template == registry.resolve("tiny-r1").manifest.template
    base = dict(load_model(registry.resolve("tiny-r1"), registry=registry, dtype="float32").named_parameters())
    tuned = dict(load_model(artifact, registry=registry, dtype="float32").named_parameters())
    assert base.keys() == tuned.keys()
    assert all((base[name].bfloat16() != tuned[name].bfloat16()).any() for name in base if "q_b_proj" in name or "shared_experts" in name)


def test_more_workers_than_the_cluster_holds_fail_at_once(registry, data) -> None:
    start = time.monotonic()
    with pytest.raises(ClusterTooSmall, match="training"):
        finetune(config("many", data, "train.num_workers=64", "train.batch_size=64"), registry.settings)
    assert time.monotonic() - start < 2


@pytest.fixture
def small_disk(tmp_path):
    """A home whose checkpoints lie on a disk of a few MiB; `grow` makes it larger."""
    checkpoints = tmp_path / "home" / "checkpoints"
    checkpoints.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", str(checkpoints)], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting a small disk needs root")
    try:
        yield tmp_path / "home", lambda: subprocess.run(["mount", "-o", "remount,size=256m", str(checkpoints)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(checkpoints)], check=True)


def test_a_disk_that_fills_during_training_costs_no_checkpoint(ray_cluster, tiny_llama, data, small_disk):
    home, grow = small_disk
    settings = ray_cluster.settings.model_copy(update={"home": home})
    registry = Registry(settings)
    import_model(str(tiny_llama), name="tiny-llama", registry=registry)
    wanted = config("full-disk", data, "train.method=full", "train.max_failures=0")
    with pytest.raises(DiskFull, match=r"No room to save .* Earlier checkpoints are untouched"):
        finetune(wanted, settings)
    kept = checkpoint.last_good(run_directory(registry, "full-disk"))
    assert kept is not None
    grow()
    artifact = finetune(wanted, settings)
    assert registry.resolve(artifact.ref).manifest.metrics["num_steps"] == STEPS
    steps = [step.step for step in curve(run_directory(registry, "full-disk"))]
    assert steps == sorted(set(steps)), "resumed, not begun anew"
