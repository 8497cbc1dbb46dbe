"""Reading and tokenising a set in memory against Ray Data, and what its rows cost a training worker; on generated dialogues.

    scripts/bench corpus [--rows 100000] [--json FILE]        # or: python scripts/bench_corpus.py

`arrow` and `ray` are the two values of data.backend: from JSON lines to the finished token set, each in a driver of its own, with the
bundled model's tokenizer. Memory is what the driver's private pages grow by at most, and for `ray` also all of the largest Ray worker; its
cluster has as many CPUs as the machine, four at least, and its start is not counted. Both must give the same set: the script fails when
they do not. `lists` is a worker that holds all rows as Python lists, `mapped` one that reads them from mapped files, as ours do. Both walk
through 200 batches of 16; memory is what that adds: private pages, and pages of mapped files, which workers of a node share.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from bench_prepare import load_wording, sound

STEPS, BATCH = 200, 16
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="dialogues to generate")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--worker", choices=["arrow", "ray", "lists", "mapped"], help=argparse.SUPPRESS)
    parser.add_argument("--dir", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker in ("lists", "mapped"):
        print(json.dumps(walked(arguments.worker, arguments.dir)))
    elif arguments.worker:
        print(json.dumps(tokenised(arguments.worker, arguments.dir)))
    else:
        with tempfile.TemporaryDirectory() as directory:
            compare(arguments, Path(directory))


def compare(arguments: argparse.Namespace, directory: Path) -> None:
    rng, words = random.Random(0), {language: load_wording(language) for language in ("en", "zh")}
    with (directory / "in.jsonl").open("w", encoding="utf-8") as file:
        for number in range(arguments.rows):
            file.write(json.dumps(sound(words, rng, number), ensure_ascii=False) + "\n")  # type: ignore[arg-type]
    size_mb = (directory / "in.jsonl").stat().st_size / MIB
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {arguments.rows:,} dialogues, {size_mb:.0f} MiB")
    sets = {name: worker(name, directory) for name in ("arrow", "ray")}
    ranks = {name: worker(name, directory) for name in ("lists", "mapped")}
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table("reading and tokenising", ("rows/s", "seconds", "driver MB", "largest Ray worker MB"), sets))
    console.print(table(f"a worker's rows, {STEPS} batches of {BATCH}", ("seconds", "private MB", "mapped files MB"), ranks))
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": arguments.rows, "load": os.getloadavg()[0], **sets, **ranks}, indent=1))
    if sets["arrow"]["data_hash"] != sets["ray"]["data_hash"] or sets["arrow"]["told"] != sets["ray"]["told"]:
        raise SystemExit(f"the two differ: {sets['arrow']['told']} and {sets['ray']['told']}")
    print(f"the same set: {sets['ray']['told']}")


def table(title: str, columns: tuple[str, ...], rows: dict[str, dict[str, Any]]) -> Table:
    made = Table(title=title, title_justify="left")
    made.add_column("")
    for column in columns:
        made.add_column(column, justify="right")
    for name, figures in rows.items():
        made.add_row(name, *(f"{figures[column]:,.1f}" if figures.get(column) is not None else "" for column in columns))
    return made


def worker(name: str, directory: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", name, "--dir", str(directory)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=3600)
    if done.returncode:
        raise SystemExit(f"{name} failed")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def tokenised(backend: str, directory: Path) -> dict[str, Any]:
    import logging

    from r1ray import cluster
    from r1ray.model.importer import import_model
    from r1ray.registry import Registry
    from r1ray.settings import Settings

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    artifact = import_model("smollm2", registry=Registry(Settings()))  # the user's own: converting the GGUF file takes a minute
    if backend == "ray":
        cluster.connect(num_cpus=max(4, os.cpu_count() or 1))
    settings = Settings(home=directory / backend)
    with Watch() as watch:
        begin = time.perf_counter()
        material, data_hash = made(backend, artifact, directory / "in.jsonl", settings)
        seconds = time.perf_counter() - begin
    (directory / "path").write_text(str(material.path.parent))
    return {
        "rows/s": material.num_rows / seconds,
        "seconds": seconds,
        "driver MB": watch.own_mb,
        "largest Ray worker MB": watch.worker_mb or None,
        "told": material.told,
        "data_hash": data_hash,
    }


def made(backend: str, artifact: Any, path: Path, settings: Any) -> tuple[Any, str]:
    from r1ray.data.config import DataConfig
    from r1ray.data.read import read_conversations
    from r1ray.train.corpus import Recipe, read_corpus
    from r1ray.train.tokens import tokenise

    data = DataConfig(path=path, backend=backend, max_bad_share=0.5)  # type: ignore[arg-type]
    if backend == "ray":
        corpus = read_corpus(Recipe(data=data, base=artifact, max_length=1024, mix=None), settings)
        return corpus.tokens, corpus.data_hash
    loaded = read_conversations(data)
    return tokenise(loaded, artifact, data, max_length=1024, cache=settings.cache), loaded.data_hash


class Watch:
    """How far this process' private memory grew, and that of the largest Ray worker, looked at five times a second."""

    def __enter__(self) -> Watch:
        self.own_mb = self.worker_mb = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        me, began_mb = psutil.Process(), resident()[0]
        while not self._ended.wait(0.2):
            self.own_mb = max(self.own_mb, resident()[0] - began_mb)
            for child in me.children(recursive=True):
                try:
                    if "ray::" in child.name() or "ray::" in " ".join(child.cmdline()[:1]):
                        info = child.memory_info()
                        self.worker_mb = max(self.worker_mb, (info.rss - info.shared) / MIB)
                except psutil.Error:
                    continue


def walked(how: str, directory: Path) -> dict[str, Any]:
    from r1ray.train import shards
    from r1ray.train.batches import BatchPlan
    from r1ray.train.feed import Feed

    place = Path((directory / "path").read_text())
    before = resident()
    begin = time.perf_counter()
    ids, masks = shards.columns(place)
    lengths: Any = shards.weights(place, "length")
    if how == "lists":
        ids, masks, lengths = list(ids), list(masks), list(lengths)  # type: ignore[assignment]
    plan = BatchPlan(lengths, batch_size=BATCH, num_epochs=1, seed=0, group_window=8)
    feed = Feed(input_ids=ids, masks=masks, plan=plan, num_steps=STEPS, rank=0, num_workers=1, accumulation=1, pad_id=0)
    for step in range(min(STEPS, plan.num_steps)):
        assert feed[step]["input_ids"].numel() >= feed.num_trained(step)
    seconds = time.perf_counter() - begin
    after = resident()
    return {"seconds": seconds, "private MB": after[0] - before[0], "mapped files MB": after[1] - before[1]}


def resident() -> tuple[float, float]:
    """(private, of files) MiB of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    private, of_files = (int(status[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile"))
    return private, of_files


if __name__ == "__main__":
    main()
