"""How `r1ray plan` shows its answers: tables for people, dictionaries for JSON. Computes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from r1ray.engine.simulate import Outcome
    from r1ray.model.plan.catalog import PlannedModel
    from r1ray.model.plan.hardware import Assumptions, Hardware
    from r1ray.model.plan.host import HostMemory
    from r1ray.model.plan.serving import Replica
    from r1ray.model.plan.shape import ModelShape
    from r1ray.model.plan.training import TrainingPlan

__all__ = ["assumptions", "gpus", "models", "serving", "serving_json", "training", "training_json"]

GIB = 1024**3
SHOWN_LAYOUTS = 5
Part = Table | str


def models(found: Sequence[PlannedModel]) -> Table:
    table = _table("model", "parameters", "active", "prediction head", "layers", "cache per 1k tokens", "stored weights", "context")
    for model in found:
        shape, count = model.shape, model.shape.parameters
        table.add_row(
            model.name,
            _billions(count.total),
            _billions(shape.active_parameters),
            _billions(count.prediction_head) if count.prediction_head else "",
            str(shape.num_layers),
            f"{shape.kv_bytes_per_token() * 1000 / 1e6:.0f} MB",
            f"{count.total * shape.stored_bytes / GIB:.1f} GiB",
            str(shape.max_context),
        )
    return table


def gpus(hardware: Hardware) -> Table:
    price = f"{hardware.currency} per hour"
    table = _table("type", "memory GiB", "bf16 TFLOPS", "FP8 TFLOPS", "memory GB/s", "in node GB/s", "network GB/s", "per node", price)
    for name, gpu in hardware.gpus.items():
        figures = (gpu.memory_gib, gpu.bf16_tflops, gpu.fp8_tflops, gpu.bandwidth_gbs, gpu.link_gbs, gpu.network_gbs, gpu.gpus_per_node)
        table.add_row(name, *("" if figure is None else f"{figure:g}" for figure in figures), f"{gpu.price_per_hour:.2f}")
    return table


def assumptions(assumed: Assumptions) -> str:
    return "assumed: " + ", ".join(f"{name} {value:g}" for name, value in assumed)


def training(
    model: PlannedModel,
    wanted: TrainingPlan | None,
    others: Sequence[TrainingPlan],
    remedies: Sequence[TrainingPlan],
    num_tokens: float,
    hardware: Hardware,
) -> Iterator[Part]:
    """The wanted pool in detail, what would make it fit, the other types."""
    shape = model.shape
    yield f"{model.name}: {_billions(shape.parameters.total)} parameters, {_billions(shape.active_parameters)} active"
    if shape.quantisation is not None:
        yield _as_published(model.name, shape)
    if wanted is not None:
        yield _memory(wanted)
        if wanted.host is not None:
            yield _host(wanted.host)
        yield _verdict(wanted, num_tokens, hardware.currency)
    if remedies:
        yield _remedies(remedies)
    yield _types(others, num_tokens, hardware) if others else "No GPU type holds it this way, at any number."
    if shown := ([wanted] if wanted else others[:1]):
        speed = shown[0].speed
        yield (
            f"assumed: {speed.utilisation:.0%} of the GPU's bf16 arithmetic (MFU), {speed.operations_per_token / 1e9:.1f} GFLOP per token, "
            "communication hidden behind arithmetic as far as it lasts. Change it, and prices, in gpus.yaml: r1ray plan gpus --write FILE."
        )


def _as_published(name: str, shape: ModelShape) -> str:
    if shape.quantisation != "fp8":
        return f"{name} is stored in {shape.quantisation}, of which nothing is trained: import it as it was before it was quantised."
    return (
        f"{name} is published in FP8, which is not trained. First make bfloat16 of it: r1ray dequantise {name}; that takes "
        f"{2 * (shape.parameters.total + shape.parameters.prediction_head) / GIB:,.0f} GiB of disk."
    )


def _memory(plan: TrainingPlan) -> Table:
    memory, wish = plan.memory, plan.wish
    table = _table(f"per GPU of {plan.pool.num} x {plan.pool.name}", "GiB", "")
    batch = f"{wish.micro_batch_size} x {wish.length} tokens"
    checkpointed = "checkpointed" if wish.gradient_checkpointing else "all kept"
    split = "" if plan.pool.num == 1 else f", split over {plan.pool.num}"
    at_once = "and their gradient" if wish.batch.whole_logits else "a few hundred at a time"
    head = f"logits of {wish.supervised_share:.0%} of the positions, {at_once}"
    rows = [
        ("weights", memory.weights, f"{plan.total / 1e9:.2f} B in {wish.dtype}" + (split if wish.zero_stage == 3 else "")),
        ("gradients", memory.gradients, f"of {_millions(plan.trainable)} trained" + (split if wish.zero_stage >= 2 else "")),
        ("optimizer", memory.optimizer, f"float32 master and AdamW, {wish.offload} offloaded" + (split if wish.zero_stage else "")),
        ("buckets", memory.buckets, "DeepSpeed's communication buffers"),
        ("activations", memory.activations.kept, f"{batch}, {wish.attention} attention, {checkpointed}"),
        ("output layer", memory.activations.logits, head),
        ("one layer's work", memory.activations.working, "in the backward pass"),
        ("optimizer step", memory.step, "float32 gradients, after the activations"),
        ("overhead", memory.overhead, "context, libraries, communication"),
    ]
    if memory.slack:
        rows.append(("allocator", memory.slack, "lost between the activations"))
    for name, size, note in rows:
        table.add_row(name, f"{size / GIB:.2f}", note)
    table.add_row("peak", f"{memory.peak / GIB:.2f}", f"of {plan.usable / GIB:.1f} usable", style="bold" if plan.fits else "bold red")
    return table


def _host(host: HostMemory) -> Table:
    table = _table(f"main memory of a node with {host.num_workers} GPU workers", "GiB", "")
    for name, size, note in (
        ("processes", host.processes, "libraries and CUDA: worker_host_gib in gpus.yaml"),
        ("start", host.start, "weights on their way to the GPUs"),
        ("training", host.training, "what is offloaded"),
        ("saving", host.saving, "copied at once for a checkpoint"),
    ):
        table.add_row(name, f"{size / GIB:.2f}", note)
    table.add_row("peak", f"{host.peak / GIB:.2f}", "processes and the start, or training and saving", style="bold")
    return table


def _verdict(plan: TrainingPlan, num_tokens: float, currency: str) -> str:
    verdict = "fits" if plan.fits else "does not fit"
    return (
        f"{plan.pool.num} x {plan.pool.name}, {plan.wish.method}, ZeRO-{plan.wish.zero_stage}: {verdict}; "
        f"{plan.speed.tokens_per_s:,.0f} tokens/s (bound by {plan.speed.bound}), {num_tokens / 1e6:,.4g} M tokens in "
        f"{plan.hours(num_tokens):,.1f} h for {plan.money(num_tokens):,.0f} {currency}"
    )


def _remedies(plans: Sequence[TrainingPlan]) -> Table:
    table = _table("to make it fit, one after the other", "peak GiB", "tokens/s", "")
    for plan in plans:
        wish = plan.wish
        said = f"ZeRO-{wish.zero_stage}, micro-batch {wish.micro_batch_size}, offload {wish.offload}"
        said += ", gradient checkpointing" if wish.gradient_checkpointing else ""
        table.add_row(said, f"{plan.memory.peak / GIB:.1f}", f"{plan.speed.tokens_per_s:,.0f}", "fits" if plan.fits else "")
    return table


def _types(plans: Sequence[TrainingPlan], num_tokens: float, hardware: Hardware) -> Table:
    table = _table("fewest that hold it", "GiB per GPU", "tokens/s", "bound by", "hours", hardware.currency)
    for plan in plans:
        table.add_row(
            f"{plan.pool.num} x {plan.pool.name}",
            f"{plan.memory.peak / GIB:.1f}",
            f"{plan.speed.tokens_per_s:,.0f}",
            plan.speed.bound,
            f"{plan.hours(num_tokens):,.1f}",
            f"{plan.money(num_tokens):,.2f}",
        )
    return table


def serving(
    model: PlannedModel, replica: Replica, others: Sequence[Replica], hardware: Hardware, outcome: Outcome | None
) -> Iterator[Part]:
    """The chosen layout, the runners-up, the simulation."""
    wish, layout, streams = replica.wish, replica.layout, max(1, replica.most_streams)
    yield f"{model.name} on {replica.pool.num} x {replica.pool.name}, {replica.pool.per_node} per node: {layout_text(replica)}"
    table = _table("one replica", "", "")
    context = f"at {wish.context} tokens of context"
    rows = (
        (
            "weights",
            f"{replica.weight_bytes / GIB:.1f} GiB",
            f"{replica.precision}, on the fullest GPU of {replica.pool.gpu.memory_gib:g} GiB",
        ),
        ("KV cache", f"{replica.cache_tokens:,} tokens", f"{replica.num_requests} requests of {wish.context} tokens; {wish.cache}"),
        ("streams together", str(streams), f"within the cache and {wish.tpot_ms:g} ms per token"),
        ("one stream alone", f"{1 / replica.decode_s(1, wish.context):,.0f} tokens/s", context),
        ("each of all streams", f"{1 / replica.decode_s(streams, wish.context):,.1f} tokens/s", context),
        (
            "all streams",
            f"{replica.decode_rate(streams, wish.context):,.0f} tokens/s",
            f"{replica.num_replicas} replicas: {replica.pool_rate:,.0f}",
        ),
        ("first token", f"{1000 * replica.prefill_s(wish.prompt):,.0f} ms", f"prompt of {wish.prompt} tokens, nothing else running"),
        ("money", f"{_per_million(replica):.2f} {hardware.currency}", "per million answer tokens with all streams busy"),
        ("placement", str(len(replica.bundles())), f"bundles of {{GPU: {layout.tensor_parallel}}}, {replica.strategy}"),
    )
    for row in rows:
        table.add_row(*row)
    yield table
    if len(others) > 1:
        yield _layouts(others)
    if outcome is not None:
        yield simulation(outcome)
    assumed = replica.assumptions
    yield (
        f"assumed: {assumed.bandwidth_efficiency:.0%} of the memory bandwidth, {assumed.prefill_efficiency:.0%} of the arithmetic. "
        "Change it in gpus.yaml: r1ray plan gpus --write FILE. In serve_config.yaml, below models:"
    )


def layout_text(replica: Replica) -> str:
    layout = replica.layout
    stages = "1 stage" if layout.stages == 1 else f"{layout.stages} stages of {'+'.join(map(str, layout.layers))} layers"
    return f"{replica.num_replicas} x ({stages}, tensor parallel {layout.tensor_parallel})"


def _layouts(replicas: Sequence[Replica]) -> Table:
    table = _table("layouts that hold it, best first", "requests", "streams", "alone tok/s", "pool tok/s", "first token ms", "strategy")
    for replica in replicas[:SHOWN_LAYOUTS]:
        wish = replica.wish
        table.add_row(
            f"{replica.num_replicas} x (TP {replica.layout.tensor_parallel}, {replica.layout.stages} stages)",
            str(replica.num_requests),
            str(replica.most_streams),
            f"{1 / replica.decode_s(1, wish.context):.0f}",
            f"{replica.pool_rate:,.0f}",
            f"{1000 * replica.prefill_s(wish.prompt):,.0f}",
            replica.strategy,
        )
    return table


def simulation(outcome: Outcome) -> Table:
    """Percentiles of a simulated run."""
    table = _table("simulated, one replica", "p50", "p90", "p99")
    labels = {"ttft": "first token", "tpot": "between tokens", "total": "whole answer", "queued": "waiting for a slot"}
    for name, shares in outcome.percentiles().items():
        table.add_row(labels[name], *(_seconds(value) for value in shares.values()))
    rate = f"{len(outcome.ttft) / max(outcome.seconds, 1e-9):.2f} requests/s"
    table.add_row("throughput", f"{outcome.tokens_per_s:,.0f} tokens/s", rate, "")
    table.add_row(
        "load", f"{outcome.mean_running:.1f} running", f"at most {outcome.most_waiting} waiting", f"{outcome.num_rejected} refused"
    )
    table.add_row("cache", f"at most {outcome.most_cached:,} tokens", f"{outcome.num_preempted} preempted", "")
    return table


def training_json(
    model: PlannedModel, wanted: TrainingPlan | None, others: Sequence[TrainingPlan], num_tokens: float, hardware: Hardware
) -> dict[str, Any]:
    plans = {"wanted": wanted and _plan_json(wanted, num_tokens), "fewest": [_plan_json(plan, num_tokens) for plan in others]}
    told = {"model": model.name, "quantisation": model.shape.quantisation, "currency": hardware.currency, "tokens": num_tokens}
    return {**told, **plans, "assumptions": hardware.assumptions.model_dump()}


def _plan_json(plan: TrainingPlan, num_tokens: float) -> dict[str, Any]:
    return {
        "gpus": f"{plan.pool.num}x{plan.pool.name}",
        "fits": plan.fits,
        "usable_bytes": plan.usable,
        "peak_bytes": plan.memory.peak,
        "memory_bytes": asdict(plan.memory),
        "node_memory_bytes": plan.host and {**asdict(plan.host), "peak": plan.host.peak},
        "total_parameters": plan.total,
        "trainable_parameters": plan.trainable,
        **asdict(plan.speed),
        "hours": plan.hours(num_tokens),
        "money": plan.money(num_tokens),
        "wish": plan.wish.model_dump(),
    }


def serving_json(name: str, replica: Replica, text: str, outcome: Outcome | None) -> dict[str, Any]:
    context, streams = replica.wish.context, max(1, replica.most_streams)
    return {
        "model": name,
        "gpus": f"{replica.pool.num}x{replica.pool.name}",
        "tensor_parallel": replica.layout.tensor_parallel,
        "stages": list(replica.layout.layers),
        "replicas": replica.num_replicas,
        "weights": replica.precision,
        "weight_bytes_per_gpu": replica.weight_bytes,
        "cache_tokens": replica.cache_tokens,
        "requests": replica.num_requests,
        "streams": streams,
        "tokens_per_s_one_stream": 1 / replica.decode_s(1, context),
        "tokens_per_s_replica": replica.decode_rate(streams, context),
        "tokens_per_s_pool": replica.pool_rate,
        "ttft_s": replica.prefill_s(replica.wish.prompt),
        "bundles": replica.bundles(),
        "strategy": replica.strategy,
        "serve_config": text,
        "simulation": outcome and outcome.summary(),
        "assumptions": replica.assumptions.model_dump(),
    }


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    table.columns[0].no_wrap = True
    return table


def _billions(number: float) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else _millions(number)


def _millions(number: float) -> str:
    return f"{number / 1e6:.1f} M" if number < 1e9 else f"{number / 1e9:.2f} B"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def _per_million(replica: Replica) -> float:
    return replica.pool.price_per_hour / 3600 / max(replica.pool_rate, 1e-9) * 1e6
