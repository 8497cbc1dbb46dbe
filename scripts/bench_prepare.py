"""Speed and memory of jobs/prepare_data.py's cleaning against pandas doing the same, on generated dialogues.

    scripts/bench prepare [--rows 100000] [--json FILE]        # or: python scripts/bench_prepare.py

Both read the same JSON lines, each in a process of its own, and do the same: schema, masking of personal data, mangled text, length,
language, quality, exact duplicates, near duplicates, contradictions by majority, Parquet out. Both use the same rules for single
rows and the same MinHash; what differs is streaming in batches with sorted-array indexes against a DataFrame with a column per step,
groupby and dicts. They must keep the same rows: the script fails when they do not. rows_per_s counts rows read over wall time from
opening the file to the closed Parquet file; peak_mb is the process's, imports included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from r1ray.data.bank.wording import Wording, load_wording
from r1ray.data.prepare.config import PrepareConfig

DEFECTS = {"copy": 0.03, "near": 0.05, "conflict": 0.02, "private": 0.05, "broken": 0.01, "mangled": 0.01, "foreign": 0.01, "schema": 0.01}
SMALL_TALK = {
    "en": (
        "I tried twice since {}.",
        "My number is {}.",
        "A friend told me to ask for {}.",
        "This is about case {}.",
        "I called on {} already.",
    ),
    "zh": ("我从{}号开始试了两次。", "我的编号是{}。", "朋友让我找{}。", "这是第{}号工单。", "我{}号已经打过电话了。"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000, help="dialogues to generate")
    parser.add_argument("--seed", type=int, default=0, help="of the generator")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--worker", choices=["ours", "pandas"], help=argparse.SUPPRESS)
    parser.add_argument("--dir", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps({"ours": ours, "pandas": with_pandas}[arguments.worker](arguments.dir)))
        return
    with tempfile.TemporaryDirectory() as directory:
        compare(arguments, Path(directory))


def compare(arguments: argparse.Namespace, directory: Path) -> None:
    write(directory / "in.jsonl", arguments.rows, arguments.seed)
    size_mb = (directory / "in.jsonl").stat().st_size / 2**20
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "unknown CPU"
    )
    print(f"{os.cpu_count()} x {cpu}, {platform.system()}, load {os.getloadavg()[0]:.1f}; {arguments.rows:,} dialogues, {size_mb:.0f} MiB")
    figures = {name: worker(name, directory) for name in ("ours", "pandas")}
    table = Table(title="cleaning, one process", title_justify="left")
    for column in ("", "rows/s", "seconds", "peak MB", "peak MB at a tenth", "kept"):
        table.add_column(column, justify="right")
    tenth = directory / "tenth"
    tenth.mkdir()
    write(tenth / "in.jsonl", arguments.rows // 10, arguments.seed)
    for name, figure in figures.items():
        figure["peak_mb_tenth"] = worker(name, tenth)["peak_mb"]
        table.add_row(
            name,
            f"{figure['rows_per_s']:,.0f}",
            f"{figure['seconds']:.1f}",
            f"{figure['peak_mb']:.0f}",
            f"{figure['peak_mb_tenth']:.0f}",
            f"{figure['kept']:,}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": arguments.rows, **figures}, indent=1))
    ids = [set((directory / f"{name}.ids").read_text().split()) for name in figures]
    if ids[0] != ids[1]:
        raise SystemExit(f"the two keep different rows: {len(ids[0] - ids[1])} only ours, {len(ids[1] - ids[0])} only pandas")
    print("both keep the same rows")


def worker(name: str, directory: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--worker", name, "--dir", str(directory)], capture_output=True, text=True, check=False, timeout=3600
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def write(path: Path, num_rows: int, seed: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in dialogues(num_rows, seed):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def dialogues(num_rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """Bank dialogues of one to three questions; some 20 % have a planted defect."""
    rng = random.Random(seed)
    words = {language: load_wording(language) for language in ("en", "zh")}  # type: ignore[arg-type]
    recent: list[dict[str, Any]] = []
    for number in range(num_rows):
        row = sound(words, rng, number)
        kind = next((kind for kind, share in DEFECTS.items() if rng.random() < share), None)
        if kind is not None:
            row = damaged(row, kind, recent, rng, number)
        recent = [*recent[-200:], row]
        yield row


def sound(words: dict[str, Wording], rng: random.Random, number: int) -> dict[str, Any]:
    language = rng.choice(["en", "zh"])
    wording = words[language]
    turns = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        intent = rng.choice(list(wording.intents.values()))
        values = {slot: rng.choice(wording.pools[pool]["train"]) for slot, pool in intent.slots.items()}
        talk = [rng.choice(SMALL_TALK[language]).format(rng.randrange(10**6)) for _ in range(rng.randint(1, 3))]
        question = rng.choice(intent.phrases["train"]).format(**values) + ("" if language == "zh" else " ")
        turns.append({"role": "user", "text": question + ("" if language == "zh" else " ").join(talk)})
        line = json.dumps({"intent": intent.name, "entities": values}, ensure_ascii=False)
        annotations = {"intent": intent.name, "entities": values}
        turns.append({"role": "assistant", "text": f"{line}\n{intent.reply.format(**values)}", "annotations": annotations})
    return {"conversation_id": f"row-{number}", "utterances": turns}


def damaged(row: dict[str, Any], kind: str, recent: list[dict[str, Any]], rng: random.Random, number: int) -> dict[str, Any]:
    name, turns = row["conversation_id"], row["utterances"]
    if kind in ("copy", "near", "conflict"):
        sane = [other for other in recent if other["utterances"]] or [row]
        turns = [dict(turn) for turn in rng.choice(sane)["utterances"]]
        if kind == "near":
            turns[0]["text"] += "!"
        if kind == "conflict":
            turns[-1] = {
                "role": "assistant",
                "text": "Please ask at the branch.",
                "annotations": {"intent": "branch_hours", "entities": {}},
            }
    elif kind == "private":
        turns[0]["text"] += f" 1{rng.choice('3578')}{rng.randrange(10**9):09d}, c{number}@mail.cn"
    elif kind == "broken":
        turns[-1]["text"] = "." * rng.randint(20, 60)
    elif kind == "mangled":
        turns[0]["text"] = "\ufffd" * 20 + turns[0]["text"]
    elif kind == "foreign":
        turns = [
            {"role": "user", "text": f"Я потерял карту {number}, что мне делать?"},
            {"role": "assistant", "text": "Позвоните нам, пожалуйста."},
        ]
    else:
        turns = []
    return {"conversation_id": name, "utterances": turns}


def ours(directory: Path) -> dict[str, Any]:
    import pyarrow.parquet as pq

    from r1ray.data.prepare.pipeline import prepare
    from r1ray.settings import Settings

    out = directory / "ours.parquet"
    tree = {"sources": [{"path": directory / "in.jsonl"}], "out": out, "progress_s": None, "diversity": {"sample": 2}}
    begin = time.perf_counter()
    report = prepare(PrepareConfig.model_validate(tree), Settings()).report
    seconds = time.perf_counter() - begin
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (directory / "ours.ids").write_text("\n".join(pq.read_table(out, columns=["conversation_id"])["conversation_id"].to_pylist()))
    return {
        "rows_per_s": report["rows_in"] / seconds,
        "seconds": seconds,
        "peak_mb": peak_mb,
        "kept": report["rows_out"],
        "index_mb": report["index_mb"],
    }


def with_pandas(directory: Path) -> dict[str, Any]:
    """The same cleaning as a notebook would do it: everything in one DataFrame, a column per step, groupby for what compares rows."""
    import pandas as pd

    from r1ray.data.clean.pii import Masker
    from r1ray.data.clean.quality import shipped
    from r1ray.data.clean.rules import Broken, check
    from r1ray.data.config import DataConfig
    from r1ray.data.formats import parser
    from r1ray.data.prepare.cleaning import answer_key, question_key
    from r1ray.data.records import BadRow
    from r1ray.data.turns import check_order
    from r1ray.types import Conversation

    config = PrepareConfig().clean
    begin = time.perf_counter()
    frame = pd.read_json(directory / "in.jsonl", lines=True)
    num_rows = len(frame)
    parse = parser("annotated", list(frame.columns), DataConfig(path=directory))

    def dialogue(row: Any) -> Conversation | None:
        try:
            name, turns = parse({"conversation_id": row.conversation_id, "utterances": row.utterances})
            check_order(turns)
        except BadRow:
            return None
        return Conversation(id=name or "", messages=tuple(turns))

    def language(conversation: Conversation) -> str | None:
        try:
            return check(conversation, config)
        except Broken:
            return None

    assert config.pii is not None and config.quality is not None and config.near_duplicates is not None
    frame["dialogue"] = frame.apply(dialogue, axis=1)
    frame = frame[frame.dialogue.notna()]
    frame["dialogue"] = frame.dialogue.map(Masker(config.pii).mask)
    frame["language"] = frame.dialogue.map(language)
    frame = frame[frame.language.notna()]
    frame = frame[shipped().badness(list(frame.dialogue)) < config.quality.threshold]
    frame["question"], frame["answer"] = frame.dialogue.map(question_key), frame.dialogue.map(answer_key)
    votes = frame.groupby(["question", "answer"]).size()
    total = votes.groupby("question").transform("sum")
    winners = set(votes[votes * 2 > total].index)
    frame = frame.drop_duplicates(["question", "answer"])
    frame = frame[near_mask(frame)]
    frame = frame[[pair in winners for pair in zip(frame.question, frame.answer, strict=True)]]
    frame[["conversation_id", "utterances"]].to_parquet(directory / "pandas.parquet", compression="zstd")
    seconds = time.perf_counter() - begin
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (directory / "pandas.ids").write_text("\n".join(frame.conversation_id))
    return {"rows_per_s": num_rows / seconds, "seconds": seconds, "peak_mb": peak_mb, "kept": len(frame)}


def near_mask(frame: Any) -> list[bool]:
    """Row by row: bands in a dict of sets, candidates compared by their signatures."""
    from collections import defaultdict

    import numpy as np

    from r1ray.data.clean.minhash import normalised, short, signatures, similarity

    config = PrepareConfig().clean.near_duplicates
    assert config is not None
    buckets: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
    stored: list[Any] = []
    keep = []
    for conversation, language in zip(frame.dialogue, frame.language, strict=True):
        last = conversation.messages[-1]
        wanted = ("user",) if last.annotations else ("user", "assistant", "tool")
        text = normalised("\n".join(m.content for m in conversation.messages if m.role in wanted))
        signature = signatures([text], num_hashes=config.num_hashes, shingle=3 if language == "zh" else 5)
        group = (last.annotations.intent, str(sorted(last.annotations.entities.items()))) if last.annotations else ()
        bands = signature.reshape(config.num_bands, -1)
        keys = [(group, number, band.tobytes()) for number, band in enumerate(bands)]
        brief = short(signature)[0]
        candidates = sorted({row for key in keys for row in buckets[key]})
        is_near = bool(candidates) and similarity(brief, np.stack([stored[row] for row in candidates])).max() >= config.threshold
        keep.append(not is_near)
        if not is_near:
            for key in keys:
                buckets[key].append(len(stored))
            stored.append(brief)
    return keep


if __name__ == "__main__":
    main()
