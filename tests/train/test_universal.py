"""Several ranks without Ray: 2 -> 1 -> 2 workers learn what 2 learn, held-out rows end a training, offloaded states change nothing."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from r1ray.model.importer import import_model
from r1ray.train import checkpoint, universal
from r1ray.train.progress import curve
from r1ray.train.standing import MARK, Standing

SCRIPT = Path(__file__).with_name("worlds.py")


def launch(home: Path, world: int, *wanted: str) -> dict[str, list[float]]:
    """The losses of each run, after `world` processes have trained it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    commands = [[sys.executable, str(SCRIPT), str(home), str(rank), str(world), port, *wanted] for rank in range(world)]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for command in commands]
    outputs = [rank.communicate(timeout=240) for rank in ranks]
    assert all(rank.returncode == 0 for rank in ranks), "\n".join(errors[-3000:] for _, errors in outputs)
    return dict(json.loads(line.removeprefix("LOSSES ")) for line in outputs[0][0].splitlines() if line.startswith("LOSSES "))


@pytest.fixture
def home(tiny_llama, settings, registry) -> Path:
    """A registered base and 24 dialogues."""
    import_model(str(tiny_llama), name="tiny", registry=registry)
    turns = [[{"role": "user", "content": f"{i} plus {i % 5}?"}, {"role": "assistant", "content": f"it is {i + i % 5}"}] for i in range(24)]
    (settings.home / "rows.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    path: Path = settings.home
    return path


@pytest.mark.slow
def test_another_number_of_workers_resumes_with_equal_losses_at_every_stage(home, settings) -> None:
    stages = ("0", "1", "2", "3")
    first = launch(home, 2, *(f"{run}:{stage}:{stop}" for stage in stages for run, stop in (("steady", 6), ("changed", 2))))
    launch(home, 1, *(f"changed:{stage}:4" for stage in stages))
    last = launch(home, 2, *(f"changed:{stage}:6" for stage in stages))
    for stage in stages:
        assert len(last[f"changed-{stage}"]) == 6
        assert last[f"changed-{stage}"] == pytest.approx(first[f"steady-{stage}"], rel=1e-5), f"ZeRO-{stage}"
    kept = [path.name for path in (settings.checkpoints / "changed-2").iterdir()]
    assert ".universal" not in kept, "a converted checkpoint is removed when a newer one is there"


@pytest.mark.slow
def test_what_was_held_out_stops_a_training_that_gets_worse_and_the_best_step_is_taken(home, settings) -> None:
    measuring = "eval_share=0.25:eval_every_steps=1:early_stopping_patience=2:learning_rate=0.05:max_steps=30:num_epochs=20"
    (losses,) = launch(home, 2, f"watched:2:30:{measuring}").values()
    run = settings.checkpoints / "watched-2"
    measured = {step.step: step.marks[MARK] for step in curve(run)}
    best_step = min(measured, key=measured.__getitem__)
    assert len(losses) == len(measured) == best_step + 2 < 30
    best, last = checkpoint.best_good(run), checkpoint.last_good(run)
    assert best is not None and last is not None
    assert (best[1].step, last[1].step) == (best_step, best_step + 2)
    assert last[1].standing == Standing(loss=measured[last[1].step], best_loss=measured[best_step], best_step=best_step, num_worse=2)
    again = launch(home, 2, f"watched:2:30:{measuring}")
    assert again == {"watched-2": losses}, "a training that was stopped stays so"
    one_worker = launch(home, 1, f"alone:2:1:{measuring}")
    assert curve(settings.checkpoints / "alone-2")[0].marks[MARK] == pytest.approx(measured[1], rel=1e-5), one_worker


@pytest.mark.slow
def test_offloaded_states_train_to_the_same_losses(home) -> None:
    runs = ("kept:2:6", "moved:2:6:offload=optimizer", "kept:3:6", "moved:3:6:offload=parameters")
    losses = launch(home, 2, *runs)
    for stage in (2, 3):
        assert losses[f"moved-{stage}"] == pytest.approx(losses[f"kept-{stage}"], rel=1e-5)


def test_a_large_checkpoint_is_converted_by_as_many_processes_as_the_node_can_hold(tmp_path) -> None:
    for rank in range(4):
        with (tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").open("wb") as stream:
            stream.truncate(10 << 20)
    plenty = 1 << 40
    assert universal.num_processes(tmp_path, num_cores=16, free_bytes=plenty) == 1, "it is small"
    for shard in tmp_path.iterdir():
        with shard.open("r+b") as stream:
            stream.truncate(1 << 30)
    assert universal.num_processes(tmp_path, num_cores=16, free_bytes=plenty) == 4
    assert universal.num_processes(tmp_path, num_cores=2, free_bytes=plenty) == 2
    assert universal.num_processes(tmp_path, num_cores=16, free_bytes=6 << 30) == 3, "each holds a shard twice"
    assert universal.num_processes(tmp_path, num_cores=16, free_bytes=0) == 1


@pytest.mark.slow
def test_several_processes_convert_to_what_one_does(home, settings) -> None:
    import torch

    launch(home, 2, "parted:2:2", "parted:3:2")
    for stage in (2, 3):
        run = settings.checkpoints / f"parted-{stage}"
        source = checkpoint.found(run)[0]
        for num in (1, 2):
            (run / ".universal" / str(num)).mkdir(parents=True)
            universal._convert_aside(source, run / ".universal" / str(num), num)
        one, two = run / ".universal" / "1", run / ".universal" / "2"
        names = sorted(path.relative_to(one) for path in one.rglob("*/zero/*/*.pt"))
        assert names and names == sorted(path.relative_to(two) for path in two.rglob("*/zero/*/*.pt"))
        for name in names:
            torch.testing.assert_close(torch.load(two / name, weights_only=False), torch.load(one / name, weights_only=False))
