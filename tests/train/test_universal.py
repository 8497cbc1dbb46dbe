"""A run that changes its number of workers, 2 -> 1 -> 2, learns what a run that never changed learns."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from r1ray.model.importer import import_model

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


@pytest.mark.slow
def test_another_number_of_workers_resumes_with_equal_losses_at_every_stage(tiny_llama, settings, registry) -> None:
    import_model(str(tiny_llama), name="tiny", registry=registry)
    turns = [[{"role": "user", "content": f"{i} plus {i % 5}?"}, {"role": "assistant", "content": f"it is {i + i % 5}"}] for i in range(24)]
    (settings.home / "rows.jsonl").write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    stages = ("0", "1", "2", "3")
    first = launch(settings.home, 2, *(f"{run}:{stage}:{stop}" for stage in stages for run, stop in (("steady", 6), ("changed", 2))))
    launch(settings.home, 1, *(f"changed:{stage}:4" for stage in stages))
    last = launch(settings.home, 2, *(f"changed:{stage}:6" for stage in stages))
    for stage in stages:
        assert len(last[f"changed-{stage}"]) == 6
        assert last[f"changed-{stage}"] == pytest.approx(first[f"steady-{stage}"], rel=1e-5), f"ZeRO-{stage}"
    kept = [path.name for path in (settings.checkpoints / "changed-2").iterdir()]
    assert ".universal" not in kept, "a converted checkpoint is removed when a newer one is there"
