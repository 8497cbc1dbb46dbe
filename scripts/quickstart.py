"""The main job of r1ray on one machine, every step through the entry point that a user would use.

    scripts/quickstart                 everything, then serves until Ctrl-C
    scripts/quickstart --once          everything, one answer, then ends it all; exit code 0 only if each step worked
    scripts/quickstart --data FILE     trains on your file (annotated, messages, alpaca, sharegpt, or CSV text/label)

Steps: import -> Ray head -> data -> fine-tune (Ray Train, DeepSpeed) -> evaluate -> gate, promote -> sampling sweep (Ray Tune)
-> index -> serve (Ray Serve) -> one streamed answer. State stays in R1RAY_HOME (default ~/.r1ray): a second run resumes.
It starts processes, submits jobs and reads their results; every decision is in the jobs' config files. What a user would type is
printed, `r1ray ...` and `ray job submit ...`; both run in this process, which has imported MLflow, torch and Ray once for all.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from rich.markup import escape
from rich.table import Table
from services import LOOPBACK, Service, StepFailed, answers, console, free_port

from r1ray.environment import prepare_environment
from r1ray.errors import R1RayError, ServingError
from r1ray.settings import Settings

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Plan:
    """What to train on and how it is called: the demo, or the user's own file."""

    name: str
    train_config: str
    data: Path
    test: Path
    question: str
    collection: str | None
    num_test: int = 96


@contextlib.contextmanager
def step(title: str) -> Iterator[None]:
    """One line when a step begins and one with its seconds when it is done."""
    start = time.monotonic()
    console.print(f"[bold cyan]==>[/] [bold]{title}[/]")
    yield
    console.print(f"    [green]done[/] in {time.monotonic() - start:.0f} s")


def said(command: str) -> None:
    console.print(f"    $ {command}", style="dim", markup=False)


def r1ray(*arguments: str) -> None:
    """The command of that name; StepFailed on a non-zero exit."""
    from r1ray.cli.commands import app

    said(f"r1ray {shlex.join(arguments)}")
    if code := app(arguments, standalone_mode=False):
        raise StepFailed(f"`r1ray {arguments[0]}` ended with code {code}; the reason is printed above.")


class Quickstart:
    """The steps in order. Holds what one leaves for the next: ports, services, the registered version."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.settings = Settings()
        self.settings.home.mkdir(parents=True, exist_ok=True)
        self.services: dict[str, Service] = {}
        prepare_environment()
        os.environ |= {"PYTHONUNBUFFERED": "1", "R1RAY_HOME": str(self.settings.home), "PYTHONWARNINGS": "ignore"}
        warnings.simplefilter("ignore")
        self.dashboard = ""
        self.ray_address = ""

    # --- the cluster and its services

    def launch_ray(self) -> None:
        ports = {"dashboard": free_port(8265), "gcs": free_port(6399), "client": free_port(9899), "agent": free_port(52465)}
        num_cpus = max(4, os.cpu_count() or 1)
        console.print(
            f"    {num_cpus} logical CPUs on {os.cpu_count()} cores: trainers and servers wait more than they compute at the edges",
            style="dim",
        )
        command = ["ray", "start", "--head", "--block", "--disable-usage-stats", f"--num-cpus={num_cpus}", f"--port={ports['gcs']}"]
        command += [f"--dashboard-host={LOOPBACK}", f"--dashboard-port={ports['dashboard']}", f"--ray-client-server-port={ports['client']}"]
        command += [f"--dashboard-agent-listen-port={ports['agent']}", f"--object-store-memory={512 * 2**20}"]
        self.dashboard = f"http://{LOOPBACK}:{ports['dashboard']}"
        self.launch("Ray head", command, f"{self.dashboard}/api/version")
        self.ray_address = os.environ["RAY_ADDRESS"] = f"{LOOPBACK}:{ports['gcs']}"

    def compile_kernels(self) -> None:
        """The engine's, beside the fine-tuning: the first evaluation would wait for them otherwise."""
        command = ["nice", sys.executable, "-m", "r1ray.engine.native.build"]
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def launch(self, name: str, command: Sequence[str], url: str) -> None:
        """Start a server that will answer at `url`, and go on."""
        log = self.settings.home / "logs" / f"{name.lower().replace(' ', '-')}.log"
        log.parent.mkdir(exist_ok=True)
        self.services[name] = Service(name, command, log, url)

    def stop(self) -> None:
        """Jobs first: a job's driver outlives the head that started it. Ray last: Serve needs it to take its replicas down."""
        if self.dashboard and answers(f"{self.dashboard}/api/version"):
            self.stop_jobs()
        for name, service in reversed(self.services.items()):
            if name != "Ray head":
                # `serve run` shuts its applications down on Ctrl-C alone; replicas left alone keep Ray from ending for half a minute
                service.ask_to_stop(signal.SIGINT)
        for service in reversed(self.services.values()):
            service.stop()

    @functools.cached_property
    def jobs(self) -> JobSubmissionClient:
        """Says nothing by itself: the jobs' own output is what matters."""
        from ray.job_submission import JobSubmissionClient

        for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
            logging.getLogger(name).setLevel(logging.ERROR)
        return JobSubmissionClient(self.dashboard)

    def stop_jobs(self) -> None:
        client = self.jobs
        running = [job.submission_id for job in client.list_jobs() if job.submission_id and not job.status.is_terminal()]
        for name in running:
            console.print(f"    stopping job {name}", style="dim")
            client.stop_job(name)
        deadline = time.monotonic() + 20
        while any(not client.get_job_status(name).is_terminal() for name in running) and time.monotonic() < deadline:
            time.sleep(0.5)

    # --- the jobs

    def submit(self, job: str, *overrides: str, config: str | None = None) -> str:
        """`ray job submit --no-wait`: the job's name."""
        command = shlex.join(["python", f"jobs/{job}.py", "--config", f"jobs/configs/{config or job}.yaml", *overrides])
        said(f"ray job submit --working-dir . -- {command}")
        return str(self.jobs.submit_job(entrypoint=command, runtime_env={"working_dir": str(ROOT)}))

    def finish(self, name: str) -> None:
        """The job's output as it comes; StepFailed unless it succeeds."""
        asyncio.run(self.follow(name))
        while not (status := self.jobs.get_job_status(name)).is_terminal():
            time.sleep(0.2)
        if status != "SUCCEEDED":
            reason = (self.jobs.get_job_info(name).message or "no reason given").partition(", last available logs")[0]
            raise StepFailed(f"Job {name} ended as {status}: {reason}")

    async def follow(self, name: str) -> None:
        async for lines in self.jobs.tail_job_logs(name):
            print(lines, end="", flush=True)

    def plan(self) -> Plan:
        if self.arguments.data:
            return own_data(self.arguments.data.resolve(), self.arguments.test, self.settings)
        demo = self.settings.home / "demo"
        r1ray("demo-data", str(demo))
        return Plan(
            name="bank-assistant",
            train_config="finetune_lora",
            data=demo / "train.parquet",
            test=demo / "test.parquet",
            question="I think I have lost my credit card. What should I do now?",
            collection="bank",
        )

    def train(self, plan: Plan) -> str:
        collection = f"collection={plan.collection or 'null'}"
        settings = (f"name={plan.name}", collection, f"data.path={plan.data}", "train.num_workers=2")
        return self.submit("finetune", *settings, config=plan.train_config)

    def evaluate(self, plan: Plan) -> str:
        models = f"models=[smollm2-135m-instruct, {plan.name}]"
        settings = (f"limit={plan.num_test}", "perplexity_examples=24", "length_margin=1.1", f"out={self.report_path(plan)}")
        return self.submit("evaluate", models, f"data.path={plan.test}", *settings)

    def gate(self, plan: Plan, metric: str) -> str:
        """Better than the base, safe as it, and merged as it was trained: then it is in production."""
        chosen = f"sets={{task: {{data: {{path: '{plan.test}'}}, limit: 24, max_drop: {{{metric}: 0.0}}}}}}"
        return self.submit("gate", f"model={plan.name}", chosen)

    def sweep(self, plan: Plan) -> str:
        return self.submit("sweep_sampling", f"model={plan.name}@production", f"data.path={plan.test}", "num_samples=4", "limit=24")

    def index(self, plan: Plan) -> str | None:
        if plan.collection is None:
            return None
        return self.submit("index_corpus", f"sources=[{plan.data.parent / 'knowledge'}]", f"collection={plan.collection}")

    def report_path(self, plan: Plan) -> Path:
        return self.settings.home / "reports" / f"quickstart-{plan.name}.json"

    def serve(self, plan: Plan) -> str:
        port = free_port(8000)
        config = yaml.safe_load((ROOT / "serve_config.yaml").read_text(encoding="utf-8"))
        config["http_options"]["port"] = port
        model = config["applications"][0]["args"]["models"][0]
        model |= {"id": plan.name, "ref": f"{plan.name}@production", "collection": plan.collection or ""}
        path = self.settings.home / "serve_config.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        url = f"http://{LOOPBACK}:{port}"
        self.launch("Serve", ["serve", "run", f"--address={self.ray_address}", str(path)], f"{url}/health")
        self.services["Serve"].wait(180)
        return url

    def launch_mlflow(self) -> str:
        port = free_port(5000)
        url = f"http://{LOOPBACK}:{port}"
        command = ["mlflow", "server", f"--backend-store-uri={self.settings.registry_uri}", f"--host={LOOPBACK}", f"--port={port}"]
        self.launch("MLflow", [*command, "--workers=1"], f"{url}/health")
        return url


def own_data(data: Path, test: Path | None, settings: Settings) -> Plan:
    """A plan for the user's file: labelled CSV -> the label recipe, anything else -> the dialogue recipe."""
    name = re.sub(r"[^a-z0-9]+", "-", data.stem.lower()).strip("-") or "my-data"
    labelled = data.suffix == ".csv"
    test = test or sibling_test_file(data)
    recipe, why = ("finetune_labels", "a table of texts and labels") if labelled else ("finetune_lora", "a file of dialogues")
    console.print(f"    recipe {recipe}: {data.name} is {why}")
    if test is None:
        held_out = settings.home / "data" / name
        console.print(f"    no file of test rows beside {data.name}: holding out 10 % of it as {held_out / 'test.parquet'}")
        r1ray("split", str(data), str(held_out))
        data, test = held_out / "train.parquet", held_out / "test.parquet"
    question = first_text(test)
    return Plan(name, recipe, data, test, question, None, num_test=300 if labelled else 96)


def check_files(arguments: argparse.Namespace) -> None:
    """Before anything starts."""
    for option, path in (("--data", arguments.data), ("--test", arguments.test)):
        if path is not None and not path.is_file():
            raise StepFailed(f"{option} {path}: no such file. Give a JSON, JSONL, CSV or Parquet file.")


def sibling_test_file(data: Path) -> Path | None:
    """`x_train.csv` goes with `x_test.csv`, `x_dev.csv` or `x_valid.csv` in the same folder."""
    for word in ("test", "dev", "valid", "validation"):
        other = data.with_name(data.name.replace("train", word))
        if other != data and other.is_file():
            console.print(f"    evaluating on {other.name}: it stands beside {data.name}")
            return other
    return None


def first_text(path: Path) -> str:
    """What the first customer in a file says."""
    from r1ray.data.config import DataConfig
    from r1ray.data.read import read_conversations

    loaded = read_conversations(DataConfig(path=path, limit=1))
    return next(message.content for message in loaded.conversations[0].messages if message.role == "user")


def ask(url: str, plan: Plan) -> None:
    """One streamed answer through the real openai client, then what it cites."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120)
    console.print(f"    [bold]user[/]  {escape(plan.question)}")
    start, first, text = time.monotonic(), 0.0, ""
    cited: list[dict[str, str]] = []
    console.print("    [bold]model[/] ", end="")
    for chunk in client.chat.completions.create(model=plan.name, messages=[{"role": "user", "content": plan.question}], stream=True):
        delta = (chunk.choices[0].delta.content or "") if chunk.choices else ""
        first = first or (time.monotonic() - start if delta else 0.0)
        text += delta
        console.print(delta, end="", markup=False)
        cited = getattr(chunk, "citations", None) or cited
    console.print()
    console.print(f"    first token after {first * 1000:.0f} ms, {len(text)} characters in {time.monotonic() - start:.1f} s", style="dim")
    for citation in cited:
        line = f"    [citation:{citation['index']}] {citation['source']} — {citation['heading']}"
        console.print(line, style="dim", markup=False)
    if not text.strip():
        raise ServingError(f"{plan.name} gave an empty answer. See the replica's log in the Ray dashboard's Serve page.")
    if plan.collection and not cited:
        raise ServingError(f"The answer of {plan.name} cites no passage of collection {plan.collection}; expected [citation:X] in it.")


def check_scores(report: Path) -> str:
    """One line `base -> tuned`; StepFailed when tuning did not help."""
    base, tuned = (entry["metrics"] for entry in json.loads(report.read_text(encoding="utf-8"))["reports"])
    metric = next(name for name in ("intent_accuracy", "exact_match", "rouge_l") if name in tuned)
    if tuned[metric] <= base[metric]:
        raise StepFailed(f"{metric} did not rise: base {base[metric]:.3f}, tuned {tuned[metric]:.3f}. See {report}.")
    return f"{metric}: base {base[metric]:.3f} -> tuned {tuned[metric]:.3f}"


def summary(lines: Mapping[str, str]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, value in lines.items():
        table.add_row(f"[bold]{name}[/]", value)
    console.print(table)


def tour(quickstart: Quickstart) -> None:
    """Every step in order; the first that fails ends the tour."""
    check_files(quickstart.arguments)
    with step("1/9 Import SmolLM2-135M-Instruct (GGUF -> safetensors, once), while Ray starts"):
        quickstart.launch_ray()
        r1ray("import", "smollm2")
    with step("2/9 Ray head with dashboard"):
        quickstart.services["Ray head"].wait(90)
        console.print(f"    dashboard {quickstart.dashboard}")
    with step("3/9 Data"):
        plan = quickstart.plan()
        quickstart.compile_kernels()
    with step(f"4/9 Fine-tune {plan.name}: Ray Train, 2 workers, DeepSpeed ZeRO, LoRA"):
        quickstart.finish(quickstart.train(plan))
    with step("5/9 Evaluate base and tuned on held-out rows"):
        indexing = quickstart.index(plan)  # while the evaluation loads libraries on one core; its output follows in step 8
        quickstart.finish(quickstart.evaluate(plan))
        scores = check_scores(quickstart.report_path(plan))
    with step("6/9 Gate: better, as safe, truly merged? Then promote"):
        quickstart.finish(quickstart.gate(plan, scores.partition(":")[0]))
    with step("7/9 Sampling sweep: Ray Tune over a few settings"):
        mlflow = quickstart.launch_mlflow()
        quickstart.finish(quickstart.sweep(plan))
    with step("8/9 Index the knowledge base and serve"):
        if indexing:
            quickstart.finish(indexing)
        url = quickstart.serve(plan)
    with step("9/9 One streamed answer through the openai client"):
        ask(url, plan)
        quickstart.services["MLflow"].wait(90)
    console.print()
    summary(
        {
            "scores": scores,
            "API": f"{url}/v1  (OpenAI protocol, model {plan.name})",
            "Ray dashboard": quickstart.dashboard,
            "MLflow": mlflow,
        }
    )


def main() -> int:
    """0 when every step worked; 1 with the reason otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", action="store_true", help="end everything after the first answer")
    parser.add_argument("--data", type=Path, metavar="FILE", help="train on this file in place of the demo")
    parser.add_argument("--test", type=Path, metavar="FILE", help="evaluate on this file; default: a sibling of --data, else 10 %% of it")
    quickstart = Quickstart(parser.parse_args())
    start = time.monotonic()
    try:
        tour(quickstart)
        console.print(f"[green]All steps done in {time.monotonic() - start:.0f} s.[/]")
        if not quickstart.arguments.once:
            console.print("Serving until Ctrl-C.")
            signal.pause()
    except KeyboardInterrupt:
        console.print("\nstopping")
    except R1RayError as error:
        console.print(f"[red]{type(error).__name__}[/]: {escape(str(error))}")
        return 1
    finally:
        with step("Stopping what was started"):
            quickstart.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
