"""The `r1ray` command: models and aliases on a real registry, the doctor, and chat against a small server that streams as r1ray does."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner

from r1ray.cli import app, doctor, gpus
from r1ray.cli.chat import Chat, converse
from r1ray.cluster import Cluster, Node
from r1ray.errors import ServerUnreachable
from r1ray.registry import Registry, weights_sha256
from r1ray.retrieval.config import IndexConfig
from r1ray.retrieval.index import build_index
from r1ray.settings import Settings
from r1ray.types import Manifest, Sampling, SamplingPolicy, TemplateInfo


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two models: `bank` with three versions, the third made from the first, and its base."""
    home = tmp_path_factory.mktemp("home")
    registry = Registry(Settings(home=home))
    for name, parents in (("base", ()), ("bank", ("base@1",)), ("bank", ()), ("bank", ("bank@1",))):
        with registry.staging(name) as staged:
            (staged / "model.safetensors").write_bytes(b"abc")
            fields = {"kind": "full", "family": "llama", "context_length": 8, "num_parameters": 1, "metrics": {"intent_accuracy": 0.875}}
            manifest = Manifest(
                name=name,
                parents=parents,
                weights_sha256=weights_sha256(staged),
                template=TemplateInfo(sha256="t"),
                created_at="2026-01-02T03:04:05+00:00",
                **fields,
            )
            registry.register(staged, manifest)
    return home


@pytest.fixture
def cli(home, monkeypatch):
    monkeypatch.setenv("R1RAY_HOME", str(home))
    monkeypatch.setenv("R1RAY_RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setenv("COLUMNS", "200")
    runner = CliRunner()
    return lambda *words: runner.invoke(app, list(words), catch_exceptions=False)


def test_models_and_versions_are_listed(cli):
    listed = cli("models").stdout
    assert [line.split()[:2] for line in listed.splitlines()[1:]] == [["bank", "3"], ["base", "1"]]
    versions = cli("models", "bank").stdout.splitlines()
    assert versions[1].split() == ["3", "full", "intent_accuracy", "0.875", "bank@1", "2026-01-02T03:04:05"]


def test_promote_and_roll_back_move_the_alias(cli):
    assert cli("promote", "bank@1").stdout == "production is now bank@1\n"
    assert cli("promote", "bank@2").stdout == "production is now bank@2\n"
    assert "production=2" in cli("models").stdout
    assert cli("rollback", "bank").stdout == "production is now bank@1\n"


def test_lineage_shows_the_ancestors(cli):
    assert [line.split()[0] for line in cli("lineage", "bank@3").stdout.splitlines()[1:]] == ["bank@3", "bank@1", "base@1"]


def test_a_users_mistake_is_one_line_and_exit_code_one(cli):
    done = cli("promote", "nowhere@1")
    assert done.exit_code == 1
    assert done.stderr.startswith("ModelNotFound: No model 'nowhere'")
    assert done.stderr.count("\n") == 1


def test_an_import_of_nothing_is_one_line_on_stderr(cli, tmp_path):
    done = cli("import", str(tmp_path / "nowhere"))
    assert done.exit_code == 1
    assert "Error" not in done.stdout
    assert len(done.stderr.strip().splitlines()) == 1


def test_demo_data_writes_both_sets_and_the_knowledge_base(cli, tmp_path):
    done = cli("demo-data", str(tmp_path / "demo"))
    assert done.exit_code == 0
    assert all(Path(line).exists() for line in done.stdout.split())
    assert len(done.stdout.split()) == 3


def test_the_environment_is_printed_as_exports_for_a_shell():
    script = 'eval "$(r1ray environment --fast-serve)"; echo $RAY_AUTH_MODE $RAY_worker_niceness $RAY_SERVE_ENABLE_HA_PROXY'
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "R1RAY_"))}
    clean["PATH"] = f"{Path(sys.executable).parent}:{clean['PATH']}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=clean | {"RAY_AUTH_MODE": "token"}, check=True)
    assert done.stdout.split() == ["token", "0", "1"]


def test_the_doctor_reports_and_fails_when_the_cluster_is_away(home, tmp_path):
    """In a process of its own: this one may be connected to the session's cluster."""
    lock = tmp_path / "py311" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    variables = {"TORCH_EXTENSIONS_DIR": tmp_path, "R1RAY_HOME": home, "R1RAY_RAY_ADDRESS": "127.0.0.1:9", "COLUMNS": 200}
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    command = [Path(sys.executable).with_name("r1ray"), "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    for expected in ("python", "ray 2.60", "GB free", "stale lock", "bank, base", "No Ray cluster answers at 127.0.0.1:9"):
        assert expected in " ".join(done.stdout.split())


def test_a_lock_of_a_running_compiler_is_not_stale(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "lock").touch()
    assert doctor.stale_locks() == []


def test_the_doctor_counts_what_fits():
    nodes = (Node(id="n1", resources={"CPU": 4, "GPU": 1, "memory": 8e9}), Node(id="n2", resources={"CPU": 8, "GPU": 2}, planned=True))
    text = " ".join(finding.text for finding in doctor.cluster_findings(Cluster(address="head:1", nodes=nodes)))
    assert "1 nodes, up to 1 more by the autoscaler" in text
    assert "4 CPU, 1 GPU, 8.0 GB" in text
    assert "12 training workers with 1 CPU or 3 with 1 CPU and 1 GPU, or 24 CPU model replicas" in text


H100, T4 = (9, 0), (7, 5)
KERNELS = ("sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")


@pytest.mark.parametrize(
    ("driver", "cuda", "capability", "said"),
    [
        ("580.65.06", "13.0", H100, None),
        (
            "535.104.05",
            "13.0",
            H100,
            "wants CUDA 13.0 and so an NVIDIA driver of at least 580; this machine has 535.104.05. Update",
        ),
        ("535.104.05", "12.8", H100, None),
        ("580.65.06", None, H100, "was built for CPUs. Install its CUDA build: scripts/setup"),
        ("580.65.06", "13.0", T4, "no kernels for compute capability 7.5, only sm_80, sm_86"),
        ("580.65.06", "13.0", (8, 9), None),  # runs what was made for 8.6
        ("580.65.06", "13.0", (13, 0), None),  # compute_120 is translated
        (None, "13.0", H100, None),
    ],
)
def test_the_doctor_says_what_keeps_torch_from_the_gpus(driver, cuda, capability, said):
    found = gpus.Gpus(driver=driver, lines=["H100"], capabilities=[capability])
    complaint = gpus.complaint(found, gpus.Installed(version="2.13.0", cuda=cuda, kernels=KERNELS))
    assert complaint is None if said is None else said in complaint


def test_the_doctor_asks_the_driver_for_versions_and_capabilities(monkeypatch, tmp_path):
    """A driver that answers as NVIDIA's does."""
    command = tmp_path / "nvidia-smi"
    told = "NVIDIA H100, 81559 MiB, 535.104.05"
    command.write_text(f'#!/bin/sh\ncase "$1" in *compute_cap*) echo 9.0; echo 9.0;; *) echo "{told}"; echo "{told}";; esac\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = gpus.find_gpus()
    assert found == gpus.Gpus(driver="535.104.05", lines=[told] * 2, capabilities=[(9, 0), (9, 0)])
    findings = list(doctor._accelerators())
    assert [finding.subject for finding in findings] == ["accelerator", "torch on GPUs"]


def test_without_a_gpu_the_doctor_says_nothing_of_cuda(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(gpus, "_PROC", tmp_path / "none")
    assert [finding.subject for finding in doctor._accelerators()] == ["accelerator"]


def test_a_driver_without_nvidia_smi_is_read_from_the_kernel(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for text, version in (
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version:  gcc 12\n", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n", "580.65.06"),
    ):
        (tmp_path / "version").write_text(text)
        monkeypatch.setattr(gpus, "_PROC", tmp_path / "version")
        assert gpus.find_gpus() == gpus.Gpus(driver=version)


def test_the_installed_torch_is_read_from_its_files():
    import torch

    installed = gpus.installed_torch()
    assert installed is not None
    assert (installed.version, installed.cuda) == (torch.__version__, torch.version.cuda)


def sse(*chunks):
    return b"".join(b"data: " + (chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode()) + b"\n\n" for chunk in chunks)


def delta(**fields):
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}


ANSWER = [
    delta(role="assistant", content=""),
    delta(reasoning_content="Think ", reasoning="Think "),
    delta(reasoning="hard."),
    delta(content="卡已"),
    delta(content="冻结 [citation:1]"),
    {
        "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}],
        "citations": [{"index": 1, "id": "cards#2", "source": "cards.md", "heading": "Lost"}],
    },
    {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}},
    b"[DONE]",
]


@pytest.fixture
def server():
    """An endpoint that answers every chat with `server.stream`, and remembers the requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply(200, json.dumps({"data": [{"id": "bank"}, {"id": "other"}]}).encode())

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.requests.append((body, self.headers.get("Authorization")))
            self.reply(*self.server.stream)

        def reply(self, status, content):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.requests, listening.stream = [], (200, sse(*ANSWER))
    listening.url = f"http://127.0.0.1:{listening.server_port}/v1"
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield listening
    listening.shutdown()
    listening.server_close()


def transcript(chat, *, once=None, typed=""):
    out = io.StringIO()
    console = Console(file=out, width=100, force_terminal=True, color_system="standard", highlight=False)
    lines = iter(typed.splitlines())
    console.input = lambda _prompt: next(lines, "/quit")
    converse(chat, console, once=once)
    return out.getvalue()


def test_an_answer_streams_with_dimmed_reasoning_sources_and_usage(server):
    text = transcript(Chat.connect(server.url), once="hello")
    assert "\x1b[2mThink \x1b[0m\x1b[2mhard.\x1b[0m" in text, "reasoning sent under both names is shown once, dimmed"
    assert "卡已冻结 [citation:1]" in text
    assert "[1] cards.md / Lost (cards#2)" in text
    assert "7 + 5 tokens" in text


def test_a_conversation_remembers_answers_without_their_reasoning_until_new(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    chat = Chat.connect(server.url, model="bank", system="Be brief.", max_tokens=9)
    transcript(chat, typed="one\n\ntwo\n/new\nthree\n/quit\nnever")
    roles = [[message["role"] for message in body["messages"]] for body, _ in server.requests]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]
    body, authorization = server.requests[1]
    assert body["messages"][2]["content"] == "卡已冻结 [citation:1]"
    assert (body["model"], body["max_tokens"], body["stream"], authorization) == ("bank", 9, True, "Bearer secret")


def test_openai_style_annotations_are_sources_too(server):
    cited = {"type": "url_citation", "url_citation": {"url": "http://x", "title": "X"}}
    server.stream = (200, sse(delta(content="a", annotations=[cited]), b"[DONE]"))
    assert "[1] X (http://x)" in transcript(Chat.connect(server.url), once="q")


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        ((200, sse(delta(content="half"), {"error": {"message": "replica died"}})), "replica died"),
        ((200, sse(delta(content="half"))), "ended before the answer did"),
        ((429, b'{"error": {"message": "queue is full"}}'), "answers 429: queue is full"),
        ((500, b"oops"), "answers 500: oops"),
        ((200, b"data: {broken\n\n"), "No answer"),
    ],
)
def test_a_broken_answer_is_an_error_and_is_not_remembered(server, stream, message):
    server.stream = stream
    chat = Chat.connect(server.url)
    with pytest.raises(ServerUnreachable, match=message):
        list(chat.ask("q"))
    assert chat.messages == []
    assert message in " ".join(transcript(chat, typed="q").split()), "in a conversation it is a line, not the end"


def test_an_absent_server_and_an_unknown_model_are_clear_errors(server, cli):
    done = cli("chat", "--url", "http://127.0.0.1:9/v1", "--once", "hi")
    assert done.exit_code == 1
    assert "ServerUnreachable: No answer from http://127.0.0.1:9/v1/models" in done.stderr
    assert "serve run serve_config.yaml" in done.stderr
    with pytest.raises(ServerUnreachable, match="does not serve 'nope'; it has bank, other"):
        Chat.connect(server.url, model="nope")


def test_split_holds_out_the_same_rows_of_every_label(cli, tmp_path):
    rows = [f"question {n} about {label},{label}" for label in ("card_lost", "transfer_fee") for n in range(10)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "\n".join(rows), encoding="utf-8")
    assert cli("split", str(tmp_path / "rows.csv"), str(tmp_path / "out"), "--share", "0.2").exit_code == 0
    sizes = [pq.read_metadata(tmp_path / "out" / f"{name}.parquet").num_rows for name in ("train", "test")]
    assert sizes == [16, 4]


def test_a_collection_is_searched(cli, home):
    folder = home / "kb"
    folder.mkdir()
    (folder / "cards.md").write_text("# Cards\n\n## Lost card\n\nBlock your card in the [app].\n", encoding="utf-8")
    build_index(IndexConfig(collection="bank", sources=("kb",), embedding="none"), Settings(home=home), progress=lambda _: None)
    done = cli("search", "bank", "my card is lost", "-k", "1")
    assert done.exit_code == 0
    assert "cards.md > Cards > Lost card (cards.md#lost-card" in done.stdout
    assert "Block your card in the [app]." in done.stdout
    missing = cli("search", "banc", "my card is lost")
    assert (missing.exit_code, missing.stderr.startswith("CollectionNotFound: No collection 'banc'")) == (1, True)


def test_old_versions_are_deleted_but_not_what_others_were_made_from(tmp_path, monkeypatch):
    monkeypatch.setenv("R1RAY_HOME", str(tmp_path))
    registry = Registry(Settings(home=tmp_path))
    for parents in ((), (), (), ("bank@1",)):
        with registry.staging("bank") as staged:
            (staged / "model.safetensors").write_bytes(b"abc")
            fields = {
                "kind": "full",
                "family": "llama",
                "context_length": 8,
                "num_parameters": 1,
                "created_at": "2026-01-02T03:04:05+00:00",
            }
            sha256, template = weights_sha256(staged), TemplateInfo(sha256="t")
            registry.register(staged, Manifest(name="bank", parents=parents, weights_sha256=sha256, template=template, **fields))
    done = CliRunner().invoke(app, ["prune", "bank", "--keep", "1"], catch_exceptions=False)
    assert done.stdout == "deleted bank@2, bank@3\n"
    assert [info.version for info in registry.versions("bank")] == [4, 1]
    assert CliRunner().invoke(app, ["prune", "bank", "--keep", "1"]).stdout == "nothing to delete\n"


def test_a_table_with_columns_of_its_own_is_split(cli, tmp_path):
    rows = "".join(f"问题{i}？,答案{i}\n" for i in range(20))
    (tmp_path / "faq.csv").write_text(f"客户说,坐席答\n{rows}", encoding="utf-8-sig")
    arguments = ("split", str(tmp_path / "faq.csv"), str(tmp_path / "out"))
    assert "data.question_column" in cli(*arguments).stderr
    done = cli(*arguments, "--share", "0.2", "question_column=客户说", "data.answer_column=坐席答")
    assert done.exit_code == 0, done.stderr
    assert [pq.read_metadata(tmp_path / "out" / f"{name}.parquet").num_rows for name in ("train", "test")] == [16, 4]
    assert "Unknown key 'question_colum'" in cli(*arguments, "question_colum=客户说").stderr


def test_the_sampling_policy_of_a_version_is_shown_and_reset(cli, home):
    assert "DeepSeek-R1's recommendation" in cli("policy", "base@1").stdout
    policy = SamplingPolicy(
        default=Sampling(temperature=0.25),
        tasks={"faq": Sampling(temperature=0)},
        provenance={"default": {"setting": "search-3", "sweep": "sampling-base-1", "rule": "surely better"}},
    )
    Registry(Settings(home=home)).attach_policy("base@1", policy)
    shown = " ".join(cli("policy", "base@1").stdout.split())
    assert "default temperature 0.25, top_p 0.95" in shown
    assert "search-3 of sampling-base-1: surely better" in shown
    assert "faq temperature 0.0" in shown
    cli("policy", "base@1", "--reset")
    assert Registry(Settings(home=home)).resolve("base@1").policy == SamplingPolicy()
