"""Speed and memory of the in-house engine against its peers, all in one run.

    scripts/bench engine [--ours-only | --onnx-only | --profile-only] [--precisions bfloat16 int8 ...] [--json FILE] [--repeats N]

Prompts of exactly 128 tokens submitted together, 64 new tokens each, greedy, end of turn ignored, on the bundled model; tokens_per_s
counts new tokens over wall time, prefill included; ttft_ms is the time of the same prompts with one new token. A second workload: 1024
tokens that requests share, and how soon the first token comes when they are in the cache. Rows have processes of their own, and ours and
theirs take turns. The peers live in environments of their own, which `uv run` makes from the first lines of scripts/peers/*.py (the first
time downloads some 4 GB). Timings are of the machine named in the first line; only ratios within one run compare.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

PEERS = Path(__file__).with_name("peers")
sys.path.insert(0, str(PEERS))

from engine_profile import profiles, requests  # noqa: E402
from workload import CONCURRENCIES, NUM_NEW, prompts  # noqa: E402

from r1ray.engine.config import EngineConfig, Precision  # noqa: E402
from r1ray.engine.protocol import Engine  # noqa: E402
from r1ray.registry import Registry  # noqa: E402
from r1ray.settings import Settings  # noqa: E402
from r1ray.types import Artifact  # noqa: E402

PEER_TIMEOUT_S = 1200
OURS = ("bfloat16", "int8", "int4")
SHORT = {"bfloat16": "bf16", "int8_weight_only": "int8 weight-only"}
console = Console()


@dataclass(frozen=True)
class Row:
    """One measurement; the fastest of the repeats."""

    engine: str
    precision: str
    concurrency: int
    tokens_per_s: float
    ttft_ms: float
    peak_mb: float


def machine() -> str:
    import torch
    import transformers

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "unknown CPU"
    )
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{os.cpu_count()} x {cpu}, {platform.system()}, {versions}, load {os.getloadavg()[0]:.1f}"


def timed(engine: Engine, concurrency: int, repeats: int) -> tuple[float, float]:
    """(tokens per second, seconds to the first token), the best of the repeats, after a warm-up."""
    from r1ray.engine.offline import generate_all

    def seconds(run: int, num_new: int) -> float:
        wanted = requests(prompts(concurrency, run), num_new)
        start = time.perf_counter()
        generate_all(engine, wanted)
        return time.perf_counter() - start

    seconds(0, 4)
    ttft_s = min(seconds(run, 1) for run in range(1, repeats + 1))
    return concurrency * NUM_NEW / min(seconds(100 + run, NUM_NEW) for run in range(1, repeats + 1)), ttft_s


def ours(artifact: Artifact, precision: str, concurrency: int, repeats: int) -> Row:
    from r1ray.engine.create import create_engine

    config = EngineConfig(num_slots=concurrency, max_context=512, dtype=precision, prefill_chunk=1024)  # type: ignore[arg-type]
    engine = create_engine(artifact, config, Registry())
    rate, ttft_s = timed(engine, concurrency, repeats)
    return Row("r1ray", SHORT.get(precision, precision), concurrency, rate, 1000 * ttft_s, peak_mb())


def ours_on_onnx(exported: Path, precision: str, concurrency: int, repeats: int) -> Row:
    """The in-house engine over the same export that onnxruntime-genai gets."""
    from r1ray.engine.batching import BatchingEngine
    from r1ray.engine.hardware import choose_threads
    from r1ray.engine.onnx import OnnxBackend, OnnxOptions

    num_threads = choose_threads(None)
    options = OnnxOptions(precision=precision, num_blocks=16 * concurrency, num_rows=concurrency, context=512, num_threads=num_threads)
    settings = EngineConfig(type="onnx", num_slots=concurrency, max_context=512, num_threads=num_threads, prefill_chunk=1024)
    engine = BatchingEngine(OnnxBackend(exported, options), settings, context_length=512)
    rate, ttft_s = timed(engine, concurrency, repeats)
    return Row("r1ray onnx", f"{precision} weights", concurrency, rate, 1000 * ttft_s, peak_mb())


def transformers_generate(artifact: Artifact, _precision: str, concurrency: int, repeats: int) -> Row:
    import torch

    from r1ray.model.load import load_model

    torch.set_num_threads(os.cpu_count() or 1)
    model: Any = load_model(artifact, registry=Registry(), dtype="bfloat16")

    def seconds(run: int, num_new: int) -> float:
        ids = torch.tensor(prompts(concurrency, run))
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False)
        return time.perf_counter() - start

    seconds(0, 2)
    ttft_s = min(seconds(run, 1) for run in range(1, repeats + 1))
    rate = concurrency * NUM_NEW / min(seconds(100 + run, NUM_NEW) for run in range(1, repeats + 1))
    return Row("transformers generate", "bf16", concurrency, rate, 1000 * ttft_s, peak_mb())


def shared_prefix(artifact: Artifact, precision: str) -> dict[str, float]:
    """Milliseconds to the first token after 1024 tokens seen for the first time, and when the cache has them; and the start-up."""
    from r1ray.engine.create import create_engine
    from r1ray.engine.offline import generate_all

    start = time.perf_counter()
    engine = create_engine(artifact, EngineConfig(num_slots=4, max_context=2048, dtype=precision), Registry())  # type: ignore[arg-type]
    start_s = time.perf_counter() - start
    generate_all(engine, requests([range(100, 140)], 2))
    misses, hits = [], []
    for run in range(3):
        prefix = [2000 + 3000 * run + 7 * place % 2900 for place in range(1024)]
        for times, tail in ((misses, 5), (hits, 6), (hits, 7)):
            begin = time.perf_counter()
            generate_all(engine, requests([[*prefix, *range(tail, tail + 32)]], 1))
            times.append(1000 * (time.perf_counter() - begin))
    asyncio.run(engine.stop())
    return {"miss_ms": min(misses), "hit_ms": min(hits), "start_s": start_s}


def beside(artifact: Artifact, precision: str) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """What is no row of the table: the shared prefix, first because it times a start-up, then the profiles."""
    return shared_prefix(artifact, precision), profiles(artifact, precision)


def in_own_environment(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script of scripts/peers in the environment that its first lines ask for; says why when it fails."""
    command = ["uv", "run", "--no-project", "--script", str(PEERS / script), *arguments]
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PEER_TIMEOUT_S, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        console.print(f"{script} did not run: {reason}", style="yellow")
    return done


def peer(script: str, *arguments: str) -> list[Row]:
    """Rows of a peer; none when it does not run."""
    done = in_own_environment(script, *arguments)
    return [Row(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


def onnx_rows(artifact: Artifact, repeats: int) -> list[Row]:
    """Our engine and onnxruntime-genai on one export."""
    from r1ray.compress.config import ExportOnnxConfig
    from r1ray.compress.graph import build_graph

    exported = Settings().cache / "bench" / f"onnx-{artifact.manifest.weights_sha256[:12]}"
    if not exported.is_dir():
        staged = exported.with_suffix(".partial")
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        build_graph(artifact.path, staged, ExportOnnxConfig(model=artifact.ref, precision="int8"))
        staged.rename(exported)
    rows: list[Row] = []
    for concurrency in CONCURRENCIES:
        rows.append(alone(ours_on_onnx, exported, "int8", concurrency, repeats))
        console.print(f"{rows[-1].engine}, {concurrency} streams: {rows[-1].tokens_per_s:.0f} tokens/s", style="dim")
    return [*rows, *(peer("run_onnxruntime.py", str(exported), str(repeats)) if shutil.which("uv") else [])]


def peers(artifact: Artifact, repeats: int) -> list[Row]:
    if shutil.which("uv") is None:
        console.print("no uv: the peers in environments of their own are left out", style="yellow")
        return []
    exported = Settings().cache / "bench" / f"openvino-{artifact.manifest.weights_sha256[:12]}"
    if not exported.is_dir():
        console.print("exporting the model for OpenVINO (once)", style="dim")
        staged = exported.with_suffix(".partial")
        shutil.rmtree(staged, ignore_errors=True)
        if in_own_environment("export_openvino.py", str(artifact.path), str(staged)).returncode == 0:
            staged.rename(exported)
    return [*peer("run_openvino.py", str(exported), str(repeats)), *peer("run_vllm.py", str(artifact.path), str(repeats))]


def peak_mb() -> float:
    """Of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def alone(measure: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def rivals(row: Row, rows: list[Row]) -> list[Row]:
    """Whom ours is measured against: in bf16 the peers in bf16, on ONNX Runtime its own generator, else every peer."""
    if not row.engine.startswith("r1ray"):
        return []
    peers = [peer for peer in rows if not peer.engine.startswith("r1ray") and peer.concurrency == row.concurrency]
    if row.engine == "r1ray onnx":
        return [peer for peer in peers if peer.engine.startswith("onnxruntime")]
    return [peer for peer in peers if row.precision != "bf16" or peer.precision == "bf16"]


def show(rows: list[Row]) -> None:
    """Ratios are to the fastest of the rivals."""
    table = Table("engine", "precision", "concurrency", "tokens/s", "TTFT ms", "peak MiB", "to the best peer")
    for row in sorted(rows, key=lambda row: (row.concurrency, row.engine)):
        rates = [rival.tokens_per_s for rival in rivals(row, rows)]
        ratio = f"{row.tokens_per_s / max(rates):.2f}x" if rates else ""
        cells = (f"{row.tokens_per_s:.0f}", f"{row.ttft_ms:.0f}", f"{row.peak_mb:.0f}", ratio)
        table.add_row(row.engine, row.precision, str(row.concurrency), *cells)
    console.print(table)


def show_profiles(found: dict[str, dict[str, float]]) -> None:
    for name, parts in found.items():
        console.print(f"{name}: " + ", ".join(f"{part} {ms:.2f}" for part, ms in parts.items()) + " ms", style="dim", soft_wrap=True)


def show_prefix(precision: str, times: dict[str, float]) -> None:
    ratio = times["hit_ms"] / times["miss_ms"]
    console.print(
        f"{precision}: start-up {times['start_s']:.1f} s; first token after 1024 shared tokens: {times['miss_ms']:.0f} ms new, "
        f"{times['hit_ms']:.0f} ms cached ({ratio:.2f}x)"
    )


def save(file: Path | None, rows: list[Row], **more: object) -> None:
    """Nothing without a file."""
    if file is not None:
        file.write_text(json.dumps({"machine": machine(), "rows": [asdict(row) for row in rows], **more}, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours-only", action="store_true", help="leave the peers out")
    parser.add_argument("--onnx-only", action="store_true", help="only ONNX Runtime: under our engine and under its own")
    parser.add_argument("--profile-only", action="store_true", help="only where the time of our steps goes")
    parser.add_argument("--precisions", nargs="+", choices=get_args(Precision), default=OURS, metavar="P", help="of ours, in this order")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--repeats", type=int, default=2, help="measurements per row after the warm-up; the fastest counts")
    arguments = parser.parse_args()
    from r1ray.model.importer import import_model

    artifact = import_model("smollm2", registry=Registry())
    console.print(machine())
    if arguments.profile_only:
        for precision in arguments.precisions:
            show_profiles(alone(profiles, artifact, precision))
        return
    if arguments.onnx_only:
        rows = onnx_rows(artifact, arguments.repeats)
        show(rows)
        save(arguments.json, rows)
        return
    rows = []
    for concurrency in CONCURRENCIES:
        kinds = [(ours, precision) for precision in arguments.precisions]
        kinds += [] if arguments.ours_only else [(transformers_generate, "bfloat16")]
        for measure, precision in kinds:
            rows.append(alone(measure, artifact, precision, concurrency, arguments.repeats))
            console.print(
                f"{rows[-1].engine} {rows[-1].precision}, {concurrency} streams: {rows[-1].tokens_per_s:.0f} tokens/s", style="dim"
            )
    if not arguments.ours_only:
        rows += onnx_rows(artifact, arguments.repeats) + peers(artifact, arguments.repeats)
    show(rows)
    found = {precision: alone(beside, artifact, precision) for precision in arguments.precisions}
    for precision, (times, _) in found.items():
        show_prefix(precision, times)
    for _, parts in found.values():
        show_profiles(parts)
    prefixes = {precision: times for precision, (times, _) in found.items()}
    save(arguments.json, rows, prefix=prefixes, profiles={name: each for _, parts in found.values() for name, each in parts.items()})


if __name__ == "__main__":
    main()
