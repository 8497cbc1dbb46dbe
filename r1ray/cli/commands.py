"""The `r1ray` command: look after models and the cluster, talk to a served model.

Parses, calls one function of the library, draws a table. Training, tuning and serving are jobs (`ray job submit`, `serve run`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from r1ray.cli import plan
from r1ray.cli.frame import command
from r1ray.errors import InvalidValue

__all__ = ["app"]

HELP = "Look after models and the cluster, talk to a served model. Training, tuning and serving: ray job submit, serve run."

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=HELP, rich_markup_mode=None)
app.add_typer(plan.app, name="plan")
Reference = Annotated[str, typer.Argument(help="name, name@alias or name@version")]

_SHOWN_METRICS = 9


def console() -> Console:
    """Made anew, so that it writes to the current stdout."""
    return Console(highlight=False)


@command(app, "doctor")
def doctor(
    start: Annotated[bool, typer.Option(help="Start a local Ray cluster when none is configured, to see that it works.")] = False,
) -> None:
    """What is installed, which cluster answers, what fits on it; exit code 1 when something must be mended."""
    from r1ray.cli.doctor import examine

    table = Table("what", "found", box=None, header_style="bold")
    findings = examine(start=start)
    for finding in findings:
        style = {"ok": "", "warning": "yellow", "wrong": "red"}[finding.level]
        table.add_row(finding.subject, finding.text, style=style)
    console().print(table)
    if any(finding.level == "wrong" for finding in findings):
        raise typer.Exit(1)


@command(app, "environment")
def environment(
    fast_serve: Annotated[
        bool, typer.Option(help="Add HAProxy in front of Serve; it binds ports 8404 and 9101 on all interfaces.")
    ] = False,
) -> None:
    """Shell exports that must be set before `ray start`: eval "$(r1ray environment)"."""
    import shlex

    from r1ray.environment import ray_environment, serve_environment

    variables = ray_environment() | (serve_environment() if fast_serve else {})
    for name, value in sorted(variables.items()):
        print(f"export {name}={shlex.quote(value)}")


@command(app, "import")
def import_model(
    source: Annotated[str, typer.Argument(help="Hugging Face directory, *.gguf, adapter directory, `smollm2` or a hub id")],
    name: Annotated[str | None, typer.Option(help="Name in the registry; from the source when absent.")] = None,
    base: Annotated[str | None, typer.Option(help="Base of an adapter, as a registry reference.")] = None,
    chat_template: Annotated[Path | None, typer.Option(help="Jinja file that replaces the model's own template.")] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Then measure which precision serves fastest here. Minutes.")] = False,
) -> None:
    """Register a model."""
    from r1ray.model import importer
    from r1ray.registry import Registry

    artifact = importer.import_model(source, name=name, registry=Registry(), base=base, chat_template=chat_template)
    manifest = artifact.manifest
    console().print(
        f"{artifact.ref}: {manifest.family}, {manifest.num_parameters / 1e6:.1f} M parameters, in {artifact.path}", soft_wrap=True
    )
    if calibrate:
        calibrate_model(artifact.ref)


@command(app, "merge")
def merge(
    ref: Reference, name: Annotated[str | None, typer.Option(help="Name of the result; the adapter's with -merged when absent.")] = None
) -> None:
    """Make an adapter and its base one version of full weights, to go on training from."""
    from r1ray.model.merging import merged_version
    from r1ray.registry import Registry

    artifact = merged_version(ref, Registry(), name)
    console().print(f"{artifact.ref}: {artifact.manifest.num_parameters / 1e6:.1f} M parameters, in {artifact.path}", soft_wrap=True)


@command(app, "dequantise")
def dequantise(
    ref: Reference, name: Annotated[str | None, typer.Option(help="Name of the result; the model's with -bf16 when absent.")] = None
) -> None:
    """Make a version in bfloat16 of one in FP8, as DeepSeek publishes R1: what can be trained."""
    from r1ray.model.dequantise import dequantised_version
    from r1ray.registry import Registry

    artifact = dequantised_version(ref, Registry(), name)
    console().print(f"{artifact.ref}: {artifact.manifest.num_parameters / 1e6:.1f} M parameters, in {artifact.path}", soft_wrap=True)


@command(app, "models")
def models(name: Annotated[str | None, typer.Argument(help="Show the versions of this model.")] = None) -> None:
    """List the models, or the versions of one."""
    from r1ray.registry import Registry

    registry = Registry()
    if name is not None:
        console().print(_versions_table(registry.versions(name)))
        return
    table = Table("model", "versions", "aliases", "kind", "created", box=None, header_style="bold")
    for model in registry.models():
        aliases = ", ".join(f"{alias}={version}" for alias, version in sorted(model.aliases.items()))
        newest = model.versions[0]
        table.add_row(model.name, str(len(model.versions)), aliases, newest.kind, newest.created_at[:19])
    console().print(table if table.row_count else f"No model in {registry.settings.registry_uri}. Import one: r1ray import smollm2")


@command(app, "promote")
def promote(
    ref: Reference,
    alias: Annotated[str, typer.Option(help="Alias to move.")] = "production",
    force: Annotated[bool, typer.Option(help="Also where the gate said no.")] = False,
) -> None:
    """Point an alias at a version; serving follows it. Refused where jobs/gate.py said no."""
    from r1ray.registry import Registry

    console().print(f"{alias} is now {Registry().promote(ref, alias, force=force).ref}")


@command(app, "rollback")
def rollback(
    name: Annotated[str, typer.Argument(help="Model name")], alias: Annotated[str, typer.Option(help="Alias to move.")] = "production"
) -> None:
    """Point an alias back at what it named before; may be repeated."""
    from r1ray.registry import Registry

    console().print(f"{alias} is now {Registry().rollback(name, alias).ref}")


@command(app, "prune")
def prune(
    name: Annotated[str, typer.Argument(help="Model name")],
    keep: Annotated[int, typer.Option(min=1, help="Newest versions that stay.")] = 3,
) -> None:
    """Delete a model's oldest versions, files included; what an alias names, or another version was made from, stays."""
    from r1ray.registry import Registry

    gone = Registry().keep(name, keep)
    console().print(f"deleted {', '.join(f'{name}@{version}' for version in gone)}" if gone else "nothing to delete")


@command(app, "policy")
def policy(
    ref: Reference, reset: Annotated[bool, typer.Option("--reset", help="Back to DeepSeek-R1's recommendation, for every task.")] = False
) -> None:
    """Show the sampling settings that a version answers with, and where they come from."""
    from r1ray.registry import Registry
    from r1ray.types import SamplingPolicy

    registry = Registry()
    artifact = registry.resolve(ref)
    if reset:
        artifact = registry.attach_policy(artifact.ref, SamplingPolicy())
    found = artifact.policy or SamplingPolicy()
    table = Table("task", "settings", "from", box=None, header_style="bold")
    for task, sampling in {"default": found.default, **found.tasks}.items():
        origin = found.provenance.get(task, {})
        fields = ", ".join(f"{name} {value}" for name, value in sampling.model_dump(exclude={"seed", "stop"}).items())
        chosen = f"{origin.get('setting')} of {origin.get('sweep')}: {origin.get('rule')}"
        table.add_row(task, fields, chosen if origin else "DeepSeek-R1's recommendation")
    console().print(table)


@command(app, "lineage")
def lineage(ref: Reference) -> None:
    """A version and what it was made from."""
    from r1ray.registry import Registry

    table = Table("version", "kind", "base", "data", "metrics", "created", box=None, header_style="bold")
    for artifact in Registry().lineage(ref):
        manifest = artifact.manifest
        table.add_row(
            artifact.ref,
            manifest.kind,
            manifest.base or "",
            (manifest.data_hash or "")[:12],
            _metrics(manifest.metrics),
            manifest.created_at[:19],
        )
    console().print(table)


@command(app, "chat")
def chat(
    url: Annotated[str, typer.Option(help="An OpenAI-compatible endpoint.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str | None, typer.Option(help="Model id; the first that the server has when absent.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer; the server's default when absent.")] = None,
    once: Annotated[str | None, typer.Option(help="Ask this one question and end.")] = None,
) -> None:
    """Talk to a served model; reasoning is dimmed, sources follow the answer. /new forgets, /quit or Ctrl-D ends."""
    from r1ray.cli.chat import Chat, converse

    session = Chat.connect(url, model=model, system=system, max_tokens=max_tokens)
    converse(session, console(), once=once)


@command(app, "search")
def search(
    collection: Annotated[str, typer.Argument(help="Name that jobs/index_corpus.py gave it.")],
    question: Annotated[str, typer.Argument(help="As a customer would ask it.")],
    k: Annotated[int, typer.Option("-k", "--num", min=1, help="Passages to show.")] = 3,
) -> None:
    """Look up a question in a retrieval collection: the passages that a served model would be given."""
    from r1ray.retrieval.search import Retriever
    from r1ray.settings import Settings

    passages = Retriever(Settings().indexes / collection).search(question, k)
    if not passages:
        console().print("no passage found")
    for number, passage in enumerate(passages, start=1):
        title = " > ".join(part for part in (passage.source, passage.heading) if part)
        console().print(f"[{number}] {title} ({passage.id}, score {passage.score:.4f})", style="cyan", markup=False, soft_wrap=True)
        console().print(passage.text, markup=False, soft_wrap=True)


@command(app, "calibrate")
def calibrate_model(
    ref: Annotated[str, typer.Argument(help="Registry reference; calibrating a base serves all its adapters too.")],
    text: Annotated[Path | None, typer.Option(help="UTF-8 text like the model's use; the bank demo's dialogues when absent.")] = None,
) -> None:
    """Measure which precision is fastest here within 1.5 % of float32's perplexity; engine.dtype=auto then takes it. Minutes."""
    from r1ray.engine.calibrate import MIN_TOKENS, calibrate
    from r1ray.model.load import load_tokenizer
    from r1ray.registry import Registry

    registry = Registry()
    artifact = registry.resolve(ref)
    ids = load_tokenizer(artifact)(_text(text))["input_ids"]
    console().print(f"{min(len(ids), MIN_TOKENS)} tokens of {text or 'the demo'}", style="dim")
    found = calibrate(artifact, ids[:MIN_TOKENS], registry=registry, on_done=lambda line: console().print(line, style="dim"))
    console().print(f"engine.dtype=auto is now {found.chosen} for {artifact.ref}: {found.reason}", soft_wrap=True)


def _text(path: Path | None) -> str:
    """A file's, or what the demo's customers and bank say."""
    if path is None:
        from r1ray.data.demo import demo_conversations

        return "\n".join(message.content for dialogue in demo_conversations("train") for message in dialogue.messages)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidValue(f"--text {path} cannot be read: {error}. Give a UTF-8 text file.") from error


@command(app, "demo-data")
def demo_data(
    out: Annotated[Path, typer.Argument(help="Directory to write to")], seed: Annotated[int, typer.Option(help="Of the generator.")] = 0
) -> None:
    """Write the bank customer service demo: training and held-out dialogues and a knowledge base."""
    from r1ray.data.demo import write_demo

    paths = write_demo(out, seed=seed)
    console().print(f"{paths.train}\n{paths.test}\n{paths.knowledge}", soft_wrap=True)


@command(app, "split")
def split(
    data: Annotated[Path, typer.Argument(help="File of dialogues or labelled texts")],
    out: Annotated[Path, typer.Argument(help="Directory for train.parquet and test.parquet")],
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Held-out share of each intent.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the choice.")] = 0,
    settings: Annotated[
        list[str] | None, typer.Argument(help="How to read it: keys of `data`, e.g. question_column=问 max_bad_share=0.1")
    ] = None,
) -> None:
    """Hold rows out for evaluation: the same rows for the same data and seed, in any row order."""
    from r1ray.config import load_config
    from r1ray.data.config import DataConfig
    from r1ray.data.read import read_conversations
    from r1ray.data.split import hold_out
    from r1ray.data.write import write_parquet

    read = load_config(DataConfig, None, ["path=.", *(each.removeprefix("data.") for each in settings or ())])
    train, test = hold_out(read_conversations(read.model_copy(update={"path": data})).conversations, share, seed=seed, by_intent=True)
    for name, conversations in (("train", train), ("test", test)):
        path = write_parquet(conversations, out / f"{name}.parquet")
        console().print(f"{path}  {len(conversations)} dialogues", soft_wrap=True)


def _versions_table(versions: list[Any]) -> Table:
    table = Table("version", "aliases", "kind", "metrics", "parents", "created", box=None, header_style="bold")
    for info in versions:
        row = (str(info.version), ", ".join(info.aliases), info.kind, _metrics(info.metrics), ", ".join(info.parents), info.created_at[:19])
        table.add_row(*row, style="bold" if "production" in info.aliases else "")
    return table


def _metrics(metrics: Any) -> str:
    shown = [f"{name} {value:.4g}" for name, value in sorted(metrics.items())]
    return ", ".join(shown[:_SHOWN_METRICS]) + (f", {len(shown) - _SHOWN_METRICS} more" if len(shown) > _SHOWN_METRICS else "")
