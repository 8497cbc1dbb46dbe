"""`r1ray plan`: what training and serving need and cost, before anything is paid.

Parses, asks r1ray.model.plan and r1ray.engine.simulate, prints tables or JSON. Touches a cluster only with `--cluster`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from pydantic import ValidationError
from rich.console import Console

from r1ray.cli import plan_tables
from r1ray.cli.frame import command
from r1ray.cluster import Cluster, check_placement, connect, num_placeable
from r1ray.config import Config
from r1ray.errors import ClusterTooSmall, InvalidValue

if TYPE_CHECKING:
    from r1ray.engine.simulate import Outcome, Trace
    from r1ray.model.plan.catalog import PlannedModel
    from r1ray.model.plan.hardware import Hardware
    from r1ray.model.plan.serving import Replica
    from r1ray.model.plan.training import TrainingPlan

__all__ = ["app"]

HELP = "Memory, speed and money of training and serving, from a model's config alone."
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=HELP, rich_markup_mode=None)

Model = Annotated[str, typer.Option(help="r1, r1-distill-qwen-7b, ... (r1ray plan models), or a directory with a config.json.")]
GpuFile = Annotated[Path | None, typer.Option(help="YAML that overlays r1ray's GPU data and prices; else gpus.yaml in r1ray's home.")]
PerNode = Annotated[int | None, typer.Option(help="GPUs that share a node; the type's largest node when absent.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
OnCluster = Annotated[bool, typer.Option("--cluster", help="Check against the running Ray cluster; exit code 1 when it can never fit.")]
PIPE_WIDTH = 150
W = TypeVar("W", bound=Config)


@command(app, "models")
def models() -> None:
    """The models whose configs ship with r1ray, their sizes and cache."""
    from r1ray.model.plan.catalog import find, names

    _console().print(plan_tables.models([find(name) for name in names()]))


@command(app, "gpus")
def gpus(
    gpu_file: GpuFile = None,
    write: Annotated[Path | None, typer.Option(help="Copy r1ray's own file there, to be edited.")] = None,
) -> None:
    """GPU data, prices and assumptions in force."""
    from r1ray.model.plan.hardware import SHIPPED, load_hardware

    if write is not None:
        if write.exists():
            raise InvalidValue(f"{write} exists already. Edit it, or choose another file.")
        write.parent.mkdir(parents=True, exist_ok=True)
        write.write_text(SHIPPED.read_text(encoding="utf-8"), encoding="utf-8")
    hardware = load_hardware(gpu_file)
    _console().print(plan_tables.gpus(hardware))
    _console().print(plan_tables.assumptions(hardware.assumptions), style="dim")


@command(app, "train")
def train(  # noqa: PLR0913 - one parameter per option
    *,
    model: Model,
    method: Annotated[str, typer.Option(help="full, lora, prompt or prefix")] = "lora",
    gpus: Annotated[str | None, typer.Option(help="e.g. 8xh100; when absent, the fewest GPUs of every type.")] = None,
    zero_stage: Annotated[int, typer.Option(help="DeepSpeed ZeRO stage, 0-3.")] = 2,
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 16,
    num_virtual_tokens: Annotated[int, typer.Option(help="Positions of a soft prompt.")] = 32,
    micro_batch_size: Annotated[int, typer.Option(help="Dialogues per forward pass of a GPU.")] = 4,
    accumulation: Annotated[int, typer.Option(help="Forward passes per optimizer step.")] = 1,
    length: Annotated[int, typer.Option(help="Tokens of the longest dialogue.")] = 1024,
    supervised_share: Annotated[float, typer.Option(help="Share of the tokens that carry loss.")] = 1.0,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Compute activations twice to store less.")] = False,
    offload: Annotated[str, typer.Option(help="To the node's memory: none, optimizer or parameters (weights too).")] = "none",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    attention: Annotated[str, typer.Option(help="sdpa or eager.")] = "sdpa",
    tensor: Annotated[int, typer.Option(help="GPUs that share every matrix.")] = 1,
    pipeline: Annotated[int, typer.Option(help="Stages of layers.")] = 1,
    sequence: Annotated[int, typer.Option(help="GPUs that share every dialogue.")] = 1,
    tokens: Annotated[str, typer.Option(help="Tokens to train on, epochs included: 500k, 100M, 2B.")] = "100M",
    per_node: PerNode = None,
    gpu_file: GpuFile = None,
    cluster: OnCluster = False,
    as_json: AsJson = False,
) -> None:
    """Memory per GPU, tokens per second, hours and money of a fine-tuning job."""
    from r1ray.model.plan.catalog import find
    from r1ray.model.plan.hardware import load_hardware
    from r1ray.model.plan.training import TrainingWish, cheapest_first, plan_training

    wish = _checked(TrainingWish, locals())  # options are named as its fields
    found, hardware, count = find(model), load_hardware(gpu_file), _count(tokens)
    wanted = plan_training(found.shape, wish, hardware.pool(gpus, per_node), hardware.assumptions) if gpus else None
    others = cheapest_first(found.shape, wish, hardware, count)
    _show_training(found, wanted, others, count, hardware, as_json)
    if cluster:
        _said(check_training(connect(), wanted or (others[0] if others else None)), as_json)
    if wanted and not wanted.fits:
        raise typer.Exit(1)


@command(app, "serve")
def serve(  # noqa: PLR0913 - one parameter per option
    *,
    model: Model,
    gpus: Annotated[str, typer.Option(help="e.g. 8xh100")],
    context: Annotated[int, typer.Option(help="Prompt and answer of a request in tokens.")] = 4096,
    prompt: Annotated[str, typer.Option(help="Prompt tokens: 1024; with --simulate also 256-2048 or ~1024 (log-normal).")] = "1024",
    answer: Annotated[str, typer.Option(help="Answer tokens, for --simulate; same forms.")] = "~300",
    streams: Annotated[int, typer.Option(help="Requests that one replica must hold together.")] = 8,
    weights: Annotated[str, typer.Option(help="auto, bfloat16, fp8, int8 or int4")] = "auto",
    cache: Annotated[str, typer.Option(help="KV cache: bfloat16 or fp8")] = "bfloat16",
    tpot_ms: Annotated[float, typer.Option(help="Longest acceptable time between two tokens of a stream.")] = 100.0,
    tensor_parallel: Annotated[int | None, typer.Option(help="Fix the degree.")] = None,
    stages: Annotated[int | None, typer.Option(help="Fix the number of pipeline stages.")] = None,
    prefill_chunk: Annotated[int, typer.Option(help="Prompt tokens per step beside the running streams.")] = 1024,
    simulate: Annotated[bool, typer.Option("--simulate", help="Play requests against one replica.")] = False,
    rate: Annotated[float, typer.Option(help="Requests per second on one replica, for --simulate.")] = 1.0,
    requests: Annotated[int, typer.Option(help="How many, for --simulate.")] = 2000,
    trace: Annotated[Path | None, typer.Option(help="CSV of arrival_s,prompt_tokens,answer_tokens in place of --rate.")] = None,
    seed: Annotated[int, typer.Option(help="Of the arrivals and lengths.")] = 0,
    per_node: PerNode = None,
    gpu_file: GpuFile = None,
    cluster: OnCluster = False,
    as_json: AsJson = False,
) -> None:
    """How a model lies on GPUs, what its cache holds, how fast it answers; the lines for serve_config.yaml."""
    from r1ray.model.plan.catalog import find
    from r1ray.model.plan.hardware import load_hardware
    from r1ray.model.plan.serving import ServingWish, choose

    wish = _checked(ServingWish, locals() | {"prompt": _median(prompt)})  # as above
    found, hardware = find(model), load_hardware(gpu_file)
    replica = choose(found.shape, hardware.pool(gpus, per_node), wish, hardware.assumptions)
    outcome = _simulated(replica, _played(trace, rate, requests, (prompt, answer), seed)) if simulate else None
    _show_serving(found, replica, hardware, outcome, as_json)
    if cluster:
        _said(check_serving(connect(), found.name, replica), as_json)


def _show_training(
    found: PlannedModel, wanted: TrainingPlan | None, others: Sequence[TrainingPlan], num_tokens: float, hardware: Hardware, as_json: bool
) -> None:
    from r1ray.model.plan.training import plan_training, relaxed

    if as_json:
        print(json.dumps(plan_tables.training_json(found, wanted, others, num_tokens, hardware), indent=1))
        return
    remedies: list[TrainingPlan] = []
    if wanted and not wanted.fits:
        remedies = [plan_training(found.shape, each, wanted.pool, hardware.assumptions) for each in relaxed(wanted.wish)]
    console = _console()
    for part in plan_tables.training(found, wanted, others, remedies, num_tokens, hardware):
        console.print(part)


def _show_serving(found: PlannedModel, replica: Replica, hardware: Hardware, outcome: Outcome | None, as_json: bool) -> None:
    from r1ray.model.plan.fragment import fragment
    from r1ray.model.plan.serving import layouts

    text = fragment(found.name, replica)
    if as_json:
        print(json.dumps(plan_tables.serving_json(found.name, replica, text, outcome), indent=1))
        return
    others = layouts(found.shape, replica.pool, replica.wish, hardware.assumptions)
    console = _console()
    for part in plan_tables.serving(found, replica, others, hardware, outcome):
        console.print(part)
    print(text, end="")


def _played(trace: Path | None, rate: float, num: int, lengths: tuple[str, str], seed: int) -> Trace:
    """The requests of a file, or drawn: (prompt, answer) lengths as the options write them."""
    from r1ray.engine.simulate import poisson, read_trace

    prompt, answer = lengths
    return read_trace(trace) if trace else poisson(rate=rate, num=num, prompt=prompt, answer=answer, seed=seed)


def _simulated(replica: Replica, trace: Trace) -> Outcome:
    from r1ray.engine.simulate import Limits, simulate

    slots, chunk = max(1, replica.most_streams), replica.wish.prefill_chunk
    limits = Limits(num_slots=slots, prefill_chunk=chunk, cache_tokens=replica.cache_tokens)
    return simulate(trace, replica, limits)


def check_training(found: Cluster, plan: TrainingPlan | None) -> str:
    """What the cluster holds of the plan's workers.

    Raises:
        ClusterTooSmall: fewer than the plan wants, or there is no plan that fits.
    """
    if plan is None:
        raise ClusterTooSmall("No GPU type holds it. Lower --micro-batch-size or --length, or set --zero-stage 3 --gradient-checkpointing.")
    num = num_placeable(found, {"CPU": 1.0, "GPU": 1.0} if plan.pool.gpu.is_gpu else {"CPU": 1.0})
    if num < plan.pool.num:
        raise ClusterTooSmall(
            f"The plan wants {plan.pool.num} workers of {plan.pool.name}; this cluster can ever hold {num}. "
            f"Plan with --gpus {max(1, num)}x{plan.pool.name}, or add nodes in cluster.yaml."
        )
    return f"The cluster at {found.address} can hold {num} workers; the plan wants {plan.pool.num}."


def check_serving(found: Cluster, name: str, replica: Replica) -> str:
    """That one replica can be placed.

    Raises:
        ClusterTooSmall: names the bundle that finds no room.
    """
    wanted = [{"CPU": 1.0, "GPU": 1.0}] * replica.layout.num_gpus
    check_placement(found, wanted, wanted_by=f"serving {name}")
    return f"The cluster at {found.address} can place a replica: {len(wanted)} bundles of one GPU."


def _checked(schema: type[W], options: Mapping[str, Any]) -> W:
    """Of those options that are named as a field."""
    try:
        return schema.model_validate({name: value for name, value in options.items() if name in schema.model_fields})
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc'])) or 'options'}: {p['msg']}" for p in error.errors(include_url=False))
        raise InvalidValue(f"{problems}. See r1ray plan --help.") from error


def _count(text: str) -> float:
    scale = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}.get(text[-1:].lower())
    try:
        count = float(text[:-1]) * scale if scale else float(text)
    except ValueError as error:
        raise InvalidValue(f"--tokens {text!r} is no number. Write 500k, 100M or 2B.") from error
    if count <= 0:
        raise InvalidValue(f"--tokens {text} must be above 0. Give the tokens of all epochs.")
    return count


def _median(text: str) -> int:
    """The middle of a length as `--prompt` writes it."""
    low, _, high = text.removeprefix("~").partition("-")
    try:
        return (int(low) + int(high or low)) // 2
    except ValueError as error:
        raise InvalidValue(f"{text!r} is no length. Write 512, 128-1024 or ~512.") from error


def _said(text: str, as_json: bool) -> None:
    """Beside JSON a remark would be noise: the exit code says it."""
    if not as_json:
        _console().print(text)


def _console() -> Console:
    """As wide as the terminal; a pipe gets whole lines."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPE_WIDTH)
