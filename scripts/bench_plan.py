"""Is `r1ray plan train` right? Predicted against measured peak memory of real fine-tuning workers on this machine.

    python scripts/bench_plan.py [--rows lora-2x256,...] [--json FILE]

Each row runs `jobs/finetune.py`'s own function for two steps on the bundled model, with one Ray Train worker in a process of its own,
and reads the worker's peak resident memory from the kernel. Rows whose names end in tensor2, pipeline2 and sequence2 split a model of the
same size between two workers, the larger of which counts: its weights are random, since the bundled model's nine heads cannot be halved.

The prediction knows the model's config, the way of training and the lengths of the dialogues; its constants for this machine are
`cpu.overhead_gib` and `cpu.activation_slack` in r1ray/model/plan/gpus.yaml, fitted once to the rows marked fitted (and to two of
LoRA with eager attention); the others check them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import psutil
from rich.console import Console
from rich.table import Table

from r1ray.data.config import DataConfig
from r1ray.model.plan.catalog import find
from r1ray.model.plan.hardware import GIB, load_hardware
from r1ray.model.plan.training import TrainingPlan, TrainingWish, plan_training
from r1ray.registry import Registry
from r1ray.settings import Settings
from r1ray.train.config import FinetuneConfig, Parallelism, PromptSettings, TrainConfig
from r1ray.types import Artifact

console = Console(highlight=False)
ALLOWED = 0.15
WORDS = ("account", "card", "please", "transfer", "the", "balance", "branch", "open", "late", "fee", "today", "loan", "rate", "why", "my")


@dataclass(frozen=True)
class Case:
    """One way of training: dialogues of nearly equal length, so that a pass is as large as it can be."""

    method: str
    size: int
    num_words: int
    checkpointing: bool = False
    split: Literal["", "tensor", "pipeline", "sequence"] = ""
    """What two workers share; else one worker has all of it."""

    @property
    def name(self) -> str:
        parts = [self.method, f"{self.size}x{self.num_words}", "checkpointing" * self.checkpointing, f"{self.split}2" * bool(self.split)]
        return "-".join(filter(None, parts))

    @property
    def num_workers(self) -> int:
        return 2 if self.split else 1

    @property
    def degrees(self) -> dict[str, int]:
        return {self.split: 2} if self.split else {}

    @property
    def num_passes(self) -> int:
        """As many as a pipeline has stages."""
        return 2 if self.split == "pipeline" else 1

    @property
    def attention(self) -> Literal["eager", "sdpa", "blockwise"]:
        """What training takes by itself."""
        if self.split == "sequence":
            return "sdpa"
        return "blockwise" if self.method in ("lora", "prompt") else "eager"


FITTED = (Case("full", 2, 256), Case("full", 4, 512))
SOFT = (Case("prompt", 4, 256), Case("prefix", 4, 256))
HELD_OUT = (Case("lora", 2, 256), Case("lora", 4, 512), Case("lora", 8, 128), Case("full", 4, 512, checkpointing=True), *SOFT)
SPLIT = tuple(Case(method, 4, 256, split=split) for method in ("full", "lora") for split in ("tensor", "pipeline", "sequence"))
VIRTUAL = 256  # positions of a soft prompt
CASES = (*FITTED, *HELD_OUT, *SPLIT)


@dataclass(frozen=True)
class Row:
    """Bytes of the worker; `length` is the longest dialogue's."""

    case: str
    length: int
    supervised: float
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def dialogues(case: Case, path: Path) -> Path:
    """A short question and an answer of `num_words` words, the same number in every dialogue."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as out:
        for _ in range(2 * case.size * case.num_passes):
            answer = " ".join(rng.choice(WORDS) for _ in range(case.num_words - 40))
            turns = [{"role": "user", "content": "Tell me " + rng.choice(WORDS)}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": turns}) + "\n")
    return path


def largest_resident(stop: threading.Event, found: list[int]) -> None:
    """Highest peak of any Ray worker below this process, in bytes. Looks for new workers seldom: that reads every process' files, and
    five times a second it took a fifteenth of a core from the workers.
    """
    workers: list[int] = []
    for turn in itertools.count():
        if stop.wait(0.2):
            return
        if turn % 15 == 0:
            workers = [pid for child in psutil.Process().children(recursive=True) if (pid := _worker(child))]
        for pid in workers:
            with suppress(OSError):  # it has ended
                found.append(peak_of(pid))


def _worker(process: psutil.Process) -> int | None:
    try:
        is_worker = process.name().startswith("ray::") or "default_worker" in " ".join(process.cmdline())
    except psutil.Error:
        return None
    return process.pid if is_worker else None


def peak_of(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def measure(case: Case, artifact: Artifact) -> Row:
    """In a process of its own: trains, and asks the plan about the very same batches."""
    from r1ray.data.read import read_conversations
    from r1ray.model.importer import import_model
    from r1ray.train.launcher import finetune
    from r1ray.train.tokens import tokenise

    with tempfile.TemporaryDirectory(prefix="r1ray-plan-") as folder:
        settings = Settings(home=Path(folder))
        os.environ["R1RAY_HOME"] = folder
        source = halvable(artifact, Path(folder) / "halvable") if case.split else artifact.path
        base = import_model(str(source), name="base", registry=Registry(settings))
        data = DataConfig(path=dialogues(case, Path(folder) / "dialogues.jsonl"))
        train = TrainConfig(
            method=case.method,  # type: ignore[arg-type]
            prompt=PromptSettings(num_virtual_tokens=VIRTUAL),
            num_workers=case.num_workers,
            threads_per_worker=1 if case.split else None,
            parallelism=Parallelism(**case.degrees),
            zero_stage=1 if case.split else 2,
            max_steps=2,
            batch_size=case.size * case.num_passes,
            micro_batch_size=case.size,
            max_length=4096,
            gradient_checkpointing=case.checkpointing,
            dtype="bfloat16",
            checkpoint_every_seconds=None,
        )
        tokens = tokenise(read_conversations(data), base, data, max_length=4096, cache=settings.cache)
        length = max(len(row) for row in tokens.rows()[0])
        supervised = tokens.num_trained_tokens / (tokens.num_rows * length)
        stop, found = threading.Event(), [0]
        watcher = threading.Thread(target=largest_resident, args=(stop, found), daemon=True)
        watcher.start()
        finetune(FinetuneConfig(name="measured", base=base.ref, data=data, train=train), settings)
        stop.set()
        watcher.join()
        plan = predicted(case, base, length, supervised)
    return Row(case.name, length, supervised, plan.memory.peak, max(found))


def halvable(source: Artifact, directory: Path) -> Path:
    """A Llama of the bundled model's size with random weights and eight heads."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from r1ray.model.load import load_tokenizer

    config = AutoConfig.from_pretrained(source.path)
    config.update({"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    load_tokenizer(source).save_pretrained(directory)
    return directory


def predicted(case: Case, artifact: Artifact, length: int, supervised: float) -> TrainingPlan:
    hardware = load_hardware()
    wish = TrainingWish(
        method=case.method,  # type: ignore[arg-type]
        num_virtual_tokens=VIRTUAL,
        attention=case.attention,
        gradient_checkpointing=case.checkpointing,
        zero_stage=1 if case.split else 2,
        accumulation=case.num_passes,
        micro_batch_size=case.size,
        length=length,
        supervised_share=supervised,
        **case.degrees,
    )
    return plan_training(find(str(artifact.path)).shape, wish, hardware.pool(f"{case.num_workers}xcpu"), hardware.assumptions)


def show(rows: list[Row]) -> None:
    table = Table("training", "longest", "loss share", "predicted GiB", "measured GiB", "error")
    table.columns[0].no_wrap = True
    for row in rows:
        name = row.case + (" (fitted)" if row.case in {case.name for case in FITTED} else "")
        figures = f"{row.predicted / GIB:.2f}", f"{row.measured / GIB:.2f}", f"{row.error:+.1%}"
        table.add_row(name, str(row.length), f"{row.supervised:.2f}", *figures, style="" if abs(row.error) <= ALLOWED else "red")
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="comma-separated names of rows; all when absent")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    arguments = parser.parse_args()
    wanted = set(arguments.rows.split(",")) if arguments.rows else {case.name for case in CASES}
    if unknown := wanted - {case.name for case in CASES}:
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(case.name for case in CASES)}")
    from r1ray.model.importer import import_model

    artifact = import_model("smollm2", registry=Registry())
    rows = []
    for case in (case for case in CASES if case.name in wanted):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as alone:
            rows.append(alone.submit(measure, case, artifact).result())
        console.print(f"{case.name}: {rows[-1].measured / GIB:.2f} GiB measured", style="dim")
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) | {"error": row.error} for row in rows], indent=1), encoding="utf-8")
    return 0 if all(abs(row.error) <= ALLOWED for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
