"""Step time and memory of training on Ray + DeepSpeed against plain torch DDP and DeepSpeed's bare loop, in one run.

    scripts/bench train [--json FILE] [--rows lora,full,scaling] [--steps 8] [--rounds 3]

SmolLM2-135M in bfloat16 on the bank demo's dialogues, 2 workers of one compute thread each, the same batches and the same loss for all.
`ours` is what jobs/finetune.py runs: Ray Train, TRL's trainer, DeepSpeed ZeRO-2, float32 masters, progress and reports. `ddp` has no
masters and does less; it is plain: PEFT's LoRA layers, transformers' attention, padded rows, glibc's malloc. `ddp-fused` has all that as
we have it. `deepspeed` is our configuration, layers and malloc in a bare loop, so ours / deepspeed is the share of Ray and TRL.
`scaling` is one worker against two, one thread each, for us and for `ddp-fused`, and against `apart`: two whole trainings of `ddp-fused`
beside each other that exchange nothing, which gain what the machine's two cores give at that time. All train by turns, round after
round, on the same batches: a figure is the median step without the first two of each round, a ratio the median of the ratios step by
step, memory the largest worker's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from r1ray.environment import malloc_environment, prepare_environment

prepare_environment()
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray's own spelling

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from r1ray.config import load_config  # noqa: E402
from r1ray.settings import Settings  # noqa: E402
from r1ray.train.config import FinetuneConfig  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
from bench_plan import largest_resident  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
WARM_UP = 2
LIMITS = {("lora", "ddp"): 1.05, ("full", "ddp"): 1.35, ("lora", "deepspeed"): 1.05, ("full", "deepspeed"): 1.05}
SCALING = 1.8
console = Console()
console = console if console.is_terminal else Console(width=120)


@dataclass(frozen=True, slots=True)
class Row:
    """One training, all its rounds: seconds of each step but the first two, tokens of them, peak of the largest worker."""

    method: str
    what: str
    workers: int
    steps_s: list[float]
    tokens: int
    peak_mb: float

    def __add__(self, later: Row) -> Row:
        more = {"steps_s": self.steps_s + later.steps_s, "tokens": self.tokens + later.tokens}
        return replace(self, **more, peak_mb=max(self.peak_mb, later.peak_mb))

    @property
    def step_s(self) -> float:
        return statistics.median(self.steps_s)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / sum(self.steps_s)

    def over(self, other: Row) -> float:
        """How many times as long the same steps take."""
        return statistics.median(mine / theirs for mine, theirs in zip(self.steps_s, other.steps_s, strict=True))


def ordered(method: str, workers: int, steps: int, settings: Settings) -> Any:
    from r1ray.data.demo import write_demo
    from r1ray.model.importer import import_model
    from r1ray.registry import Registry
    from r1ray.train.objective import objective_of
    from r1ray.train.order import resolve_order

    base = import_model("smollm2", registry=Registry(Settings()))  # the user's own registry: converting the GGUF file takes a minute
    demo = settings.home / "demo"
    if not demo.exists():
        write_demo(demo)
    train = {"num_workers": workers, "threads_per_worker": 1, "method": method, "max_steps": steps, "batch_size": 8, "micro_batch_size": 4}
    rest = {"dtype": "bfloat16", "checkpoint_every_seconds": "null", "log_every_steps": 2, "max_failures": 0, "learning_rate": 2e-4}
    changes = [f"train.{key}={value}" for key, value in {**train, **rest}.items()]
    config = load_config(FinetuneConfig, None, ["name=bench", f"data.path={demo / 'train.parquet'}", *changes])
    objective = objective_of("sft")
    material = objective.prepare(objective.read(config), base, config, settings)
    directory = settings.checkpoints / f"{method}-{workers}"
    directory.mkdir(parents=True)
    return resolve_order(config.train, base, material, directory, settings, lambda _: None)


def ours(order: Any) -> Row:
    from r1ray.train.fit import fit
    from r1ray.train.progress import curve

    shutil.rmtree(order.run_directory)  # of the round before
    order.run_directory.mkdir()
    stop, found = threading.Event(), [0]
    watcher = threading.Thread(target=largest_resident, args=(stop, found), daemon=True)
    watcher.start()
    fit(order)
    stop.set()
    watcher.join()
    steps = curve(order.run_directory)
    return row(order, "ours", [step.seconds for step in steps], [step.tokens for step in steps], max(found))


def peer(order: Any, framework: str, folder: Path) -> Row:
    """All ranks on this machine, as torchrun would start them."""
    figures = _ended(*_started(order, framework, folder))
    return row(order, framework, figures["seconds"], figures["tokens"], figures["peak"])


def apart(order: Any, framework: str, folder: Path) -> Row:
    """Two trainings of one worker at once. Both make the same steps, so a step of the pair is counted as the time per batch of the two."""
    places = folder / "left", folder / "right"
    for place in places:
        place.mkdir(exist_ok=True)
    trainings = [_started(order, framework, place) for place in places]
    left, right = (_ended(*training) for training in trainings)
    seconds = [1 / (1 / one + 1 / other) for one, other in zip(left["seconds"], right["seconds"], strict=True)]
    return replace(row(order, "apart", seconds, left["tokens"], max(left["peak"], right["peak"])), workers=2)


def _started(order: Any, framework: str, folder: Path) -> tuple[list[subprocess.Popen[bytes]], Path]:
    (folder / "order").write_bytes(pickle.dumps(order))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = order.config.max_workers
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    if framework != "ddp":
        shared |= malloc_environment(keeps_freed=order.config.keeps_freed)
    command = [sys.executable, str(ROOT / "scripts/peers/train_loop.py"), framework, str(folder / "order"), str(folder / "figures")]
    ranks = [
        subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.DEVNULL)
        for rank in range(world)
    ]
    return ranks, folder / "figures"


def _ended(ranks: list[subprocess.Popen[bytes]], figures: Path) -> dict[str, Any]:
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit(f"a peer failed ({figures.parent}); its own words are above")
    return json.loads(figures.read_text())


def row(order: Any, what: str, seconds: list[float], tokens: list[int], peak: int) -> Row:
    return Row(order.config.method, what, order.config.max_workers, seconds[WARM_UP:], sum(tokens[WARM_UP:]), peak / 2**20)


def rounds(turns: list[Callable[[], Row]], number: int) -> list[Row]:
    """Each round begins with another one, so that none profits from its place in a round."""
    rows: dict[int, Row] = {}
    for first in range(number):
        for place in range(len(turns)):
            at = (first + place) % len(turns)
            row = turns[at]()
            console.print(f"round {first + 1} of {number}: {row.method}, {row.what}, {row.workers} workers: {row.step_s:.3f} s per step")
            rows[at] = rows[at] + row if at in rows else row
    return [rows[at] for at in range(len(turns))]


def show(rows: list[Row]) -> None:
    table = Table("method", "what", "workers", "s per step", "tokens/s", "peak MB", "ratio", "wanted")
    by = {(each.method, each.what, each.workers): each for each in rows}
    for each in rows:
        ratio = wanted = ""
        ours, both = by[each.method, "ours", 2], by[each.method, each.what, 2]
        if each.what == "apart":
            ratio = f"machine {by[each.method, 'ddp-fused', 1].over(each):.2f}x faster"
        elif each.workers == 1:
            value = each.over(both)
            ratio = f"2 workers {value:.2f}x faster"
            if each.what == "ours":
                wanted = f"at least {SCALING:.1f}x{'' if value >= SCALING else '  MISSED'}"
        elif each is not ours:
            value, limit = ours.over(each), LIMITS.get((each.method, each.what))
            ratio = f"ours {value:.2f}x"
            if limit is not None:
                wanted = f"at most {limit:.2f}x{'' if value <= limit else '  MISSED'}"
        figures = f"{each.step_s:.3f}", f"{each.tokens_per_s:.0f}", f"{each.peak_mb:.0f}"
        table.add_row(each.method, each.what, str(each.workers), *figures, ratio, wanted)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--rows", default="lora,full,scaling", help="comma-separated parts; scaling needs lora")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    parts = arguments.rows.split(",")
    if not {"lora", "full", "scaling"}.issuperset(parts) or ("scaling" in parts and "lora" not in parts):
        parser.error(f"--rows {arguments.rows}: lora, full or both, separated by commas; scaling stands beside lora, as in lora,scaling")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="r1ray-train-") as folder:
        settings, place = Settings(home=Path(folder)), Path(folder)
        for method in ("lora", "full"):
            if method in parts:
                two = ordered(method, 2, arguments.steps, settings)
                turns = [partial(peer, two, "ddp", place), partial(ours, two), partial(peer, two, "deepspeed", place)]
                if method == "lora":
                    turns.append(partial(peer, two, "ddp-fused", place))
                if method == "lora" and "scaling" in parts:
                    one = ordered(method, 1, arguments.steps, settings)
                    turns += [partial(ours, one), partial(peer, one, "ddp-fused", place), partial(apart, one, "ddp-fused", place)]
                rows += rounds(turns, arguments.rounds)
    show(rows)
    if arguments.json:
        arguments.json.write_text(
            json.dumps([{**asdict(each), "step_s": each.step_s, "tokens_per_s": each.tokens_per_s} for each in rows], indent=1)
        )


if __name__ == "__main__":
    main()
