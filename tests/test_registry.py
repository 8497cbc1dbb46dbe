"""The registry with a real MLflow on SQLite: atomicity, aliases, lineage, clean-up, and several processes at once."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from r1ray.errors import ArtifactInvalid, DiskFull, InvalidValue, ModelNotFound, RegistryError, VersionNotFound
from r1ray.observe import client as mlflow_client
from r1ray.registry import MANIFEST, POLICY, Registry, directory, weights_sha256
from r1ray.registry.known import KnownVersions
from r1ray.settings import Settings
from r1ray.types import Artifact, Manifest, Sampling, SamplingPolicy, TemplateInfo

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """One home for the module; each test uses model names of its own."""
    return Registry(Settings(home=tmp_path_factory.mktemp("home")))


def manifest(name: str, **fields: object) -> Manifest:
    known = {"kind": "full", "family": "llama", "weights_sha256": "", "context_length": 512, "num_parameters": 3}
    return Manifest.model_validate(
        {**known, "name": name, "template": TemplateInfo(sha256="t"), "created_at": "2026-01-01T00:00:00+00:00", **fields}
    )


def add(registry: Registry, name: str, content: bytes = b"abc", **fields: object) -> Artifact:
    with registry.staging(name) as staged:
        (staged / WEIGHTS).write_bytes(content)
        (staged / "tokenizer").mkdir()
        (staged / "tokenizer" / "vocab.json").write_text("{}")
        return registry.register(staged, manifest(name, weights_sha256=weights_sha256(staged), **fields))


def leftovers(registry: Registry) -> list[Path]:
    return list((registry.settings.artifacts / ".staging").glob("*"))


def fork(target: Callable[..., None], *arguments: object) -> BaseProcess:
    """A second process that has MLflow imported already: a fresh interpreter would spend seconds on that."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def stage_and_wait(registry: Registry, told: Connection) -> None:
    with registry.staging("killed") as staged:
        (staged / WEIGHTS).write_bytes(b"half")
        told.send(staged)
        time.sleep(60)


def die_while_numbering(registry: Registry, told: Connection, *, numbered: bool) -> None:
    create_version = registry._create_version

    def killed(place: Path, *arguments: Any) -> int:
        if numbered:
            create_version(place, *arguments)
        told.send(place)
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    registry._create_version = killed  # type: ignore[method-assign]
    add(registry, "numbering")


def register_five(registry: Registry, told: Connection) -> None:
    mlflow_client._empty_database.cache_clear()  # so that both really make the tables
    told.send([add(registry, "race").version for _ in range(5)])


def test_importing_the_registry_loads_neither_mlflow_nor_torch_nor_ray():
    code = "import sys, r1ray.registry; print([m for m in ('mlflow', 'torch', 'ray', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_registered_model_resolves_by_name_number_and_alias(shared):
    first, second = add(shared, "names"), add(shared, "names", b"second")
    assert (first.version, second.version) == (1, 2)
    assert shared.resolve("names").version == 2, "the newest while nothing is promoted"
    shared.promote("names@1")
    assert shared.resolve("names").version == 1
    assert shared.resolve("names@production").ref == "names@1"
    assert shared.resolve("names@2").path == second.path
    assert shared.resolve("names@latest").version == 2


def test_the_manifest_lists_every_file_with_its_size(shared):
    artifact = add(shared, "files")
    assert artifact.manifest.files == {WEIGHTS: 3, "tokenizer/vocab.json": 2}
    assert shared.open(artifact.path).manifest == artifact.manifest
    assert shared.open(artifact.path).version == 0


def test_an_unknown_model_or_version_is_named_with_what_exists(shared):
    add(shared, "known")
    with pytest.raises(ModelNotFound, match=r"'nowhere'.*known"):
        shared.resolve("nowhere")
    with pytest.raises(VersionNotFound, match="'7'; it has 1"):
        shared.resolve("known@7")
    with pytest.raises(VersionNotFound, match="'production'"):
        shared.resolve("known@production")


@pytest.mark.parametrize("name", ["", "a/b", "../up", "a@1", ".hidden", "a b", "x" * 129, "a'b"])
def test_a_name_that_is_no_directory_name_is_refused(shared, name):
    with pytest.raises(InvalidValue, match="no model name"), shared.staging(name):
        pass


@pytest.mark.parametrize("numbered", [False, True])
def test_a_writer_killed_around_its_version_number_leaves_a_version_or_nothing(tmp_path, numbered):
    registry = Registry(Settings(home=tmp_path))
    add(registry, "numbering")
    here, there = multiprocessing.Pipe()
    writer = fork(functools.partial(die_while_numbering, numbered=numbered), registry, there)
    place = here.recv()
    writer.join()
    assert place.is_dir()
    elsewhere = Registry(Settings(home=tmp_path, registry=f"sqlite:///{tmp_path}/other.db"))
    add(elsewhere, "other")
    assert place.is_dir(), "another registry does not know whose it is"
    add(registry, "another")
    assert place.is_dir() == numbered
    assert len(registry.versions("numbering")) == 1 + numbered
    assert not list((registry.settings.artifacts / ".announced").iterdir())


def test_known_versions_resolve_without_mlflow(shared):
    first = add(shared, "known-before")
    known = pickle.dumps(KnownVersions([first], shared.settings))
    code = f"import pickle, sys; print(pickle.loads({known!r}).resolve('{first.ref}').path); print('mlflow' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert shown == [str(first.path), "False"]
    second = add(shared, "known-before", b"second")
    assert pickle.loads(known).resolve("known-before").ref == second.ref


def test_an_exception_while_staging_leaves_nothing(shared):
    with pytest.raises(ValueError, match="stop"), shared.staging("failing") as staged:
        (staged / WEIGHTS).write_bytes(b"half")
        raise ValueError("stop")
    assert not leftovers(shared)


def test_a_staged_directory_that_is_not_registered_disappears(shared):
    with shared.staging("unused") as staged:
        (staged / WEIGHTS).write_bytes(b"abc")
    assert not staged.exists()


def test_an_empty_directory_is_no_artifact(shared):
    with shared.staging("empty") as staged, pytest.raises(ArtifactInvalid, match="empty"):
        shared.register(staged, manifest("empty"))


def test_a_link_is_refused_because_it_breaks_when_the_artifact_moves(shared, tmp_path):
    (tmp_path / "elsewhere").write_text("x")
    with shared.staging("links") as staged:
        (staged / WEIGHTS).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(ArtifactInvalid, match="is a link"):
            shared.register(staged, manifest("links"))


def test_a_full_disk_is_a_clear_error_and_leaves_nothing(shared):
    with pytest.raises(DiskFull, match=r"No room for full in .* MB are free"), shared.staging("full") as staged:
        (staged / "config.json").write_text("{}")
        with Path("/dev/full").open("wb", buffering=0) as device:  # the kernel's own ENOSPC
            device.write(b"weights")
    assert not leftovers(shared)


def test_a_full_disk_behind_a_librarys_own_error_is_recognised(shared):
    with pytest.raises(DiskFull), shared.staging("wrapped"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


def test_a_failure_at_mlflow_removes_the_moved_directory(shared, monkeypatch):
    def refuse(*_args: object) -> int:
        raise RegistryError("no")

    monkeypatch.setattr(Registry, "_create_version", refuse)
    with pytest.raises(RegistryError):
        add(shared, "refused")
    assert not list((shared.settings.artifacts / "refused").glob("*"))


def test_a_killed_writer_leaves_nothing_that_resolves_and_is_swept(shared):
    heard, told = multiprocessing.Pipe()
    child = fork(stage_and_wait, shared, told)
    staged = heard.recv()
    assert staged.exists()
    with shared.staging("other"):
        assert staged.exists(), "the writer lives: its staging is not swept"
    child.kill()
    child.join()
    with pytest.raises(ModelNotFound):
        shared.resolve("killed")
    with pytest.raises(ArtifactInvalid, match=r"no manifest\.json"):
        shared.open(staged)
    with shared.staging("other"):
        assert not staged.exists()


def test_another_hosts_staging_is_swept_only_after_a_week(tmp_path):
    foreign = tmp_path / ".staging" / "model~otherhost~1~1~abc"
    foreign.mkdir(parents=True)
    assert directory.sweep(tmp_path) == []
    os.utime(foreign, (0, 0))
    assert directory.sweep(tmp_path) == [foreign]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / WEIGHTS).write_bytes(b"ab"), "2 bytes, the manifest says 3"),
        (lambda path: (path / WEIGHTS).unlink(), f"misses {WEIGHTS}"),
        (lambda path: (path / MANIFEST).unlink(), "no manifest.json"),
        (lambda path: (path / MANIFEST).write_text("{"), "cannot be read"),
        (lambda path: (path / MANIFEST).write_text((path / MANIFEST).read_text().replace("llama", "qwen2")), "was altered"),
        (lambda path: (path / POLICY).write_text('{"default": 3}'), "cannot be read"),
        (shutil.rmtree, "no manifest.json"),
    ],
)
def test_a_damaged_artifact_does_not_resolve(shared, damage, message):
    artifact = add(shared, "damaged")
    damage(artifact.path)
    with pytest.raises(ArtifactInvalid, match=message):
        shared.resolve(artifact.ref)


def test_verify_finds_a_flipped_byte_that_the_size_hides(shared):
    artifact = add(shared, "flipped")
    assert shared.verify(artifact.ref) == artifact
    (artifact.path / WEIGHTS).write_bytes(b"abd")
    shared.resolve(artifact.ref)
    with pytest.raises(ArtifactInvalid, match="have hash"):
        shared.verify(artifact.ref)


def test_a_damaged_version_is_not_promoted(shared):
    good, bad = add(shared, "guarded"), add(shared, "guarded")
    shared.promote(good.ref)
    (bad.path / WEIGHTS).unlink()
    with pytest.raises(ArtifactInvalid):
        shared.promote(bad.ref)
    assert shared.resolve("guarded").ref == good.ref


def test_rollback_restores_the_previous_version_repeatedly(shared):
    for _ in range(3):
        shared.promote(add(shared, "back").ref)
    shared.promote("back@3")
    assert shared.rollback("back").version == 2
    assert shared.rollback("back").version == 1
    with pytest.raises(VersionNotFound, match="no earlier production"):
        shared.rollback("back")
    assert shared.resolve("back").version == 1


def test_an_alias_moved_in_mlflows_own_ui_still_rolls_back(shared):
    for _ in range(2):
        add(shared, "moved")
    shared.promote("moved@1")
    mlflow_client.client(shared.settings.registry_uri).set_registered_model_alias("moved", "production", "2")
    assert shared.rollback("moved").version == 1


def test_aliases_have_histories_of_their_own(shared):
    for _ in range(2):
        add(shared, "aliases")
    shared.promote("aliases@1")
    shared.promote("aliases@2", alias="canary")
    assert {info.version: info.aliases for info in shared.versions("aliases")} == {2: ("canary",), 1: ("production",)}


@given(st.lists(st.integers(min_value=0, max_value=3), max_size=8))
@example([1, 2, 1, 0, 0])
@hypothesis_settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_production_follows_a_stack_of_promotions(shared, actions):
    """0 rolls back, n promotes version n: the alias is always the top of the stack of distinct promotions."""
    name = f"stack-{len(shared.models())}"
    for _ in range(3):
        add(shared, name)
    stack: list[int] = []
    for action in actions:
        if action:
            shared.promote(f"{name}@{action}")
            stack += [action] if stack[-1:] != [action] else []
        elif len(stack) > 1:
            stack.pop()
            assert shared.rollback(name).version == stack[-1]
        assert shared.resolve(name).version == (stack[-1] if stack else 3)


def test_keep_deletes_the_oldest_but_never_what_is_in_use(shared):
    base = add(shared, "kept-base")
    for _ in range(3):
        add(shared, "kept-base")
    artifacts = [add(shared, "kept", kind="adapter", base=base.ref)]
    artifacts.append(add(shared, "kept", parents=(artifacts[0].ref,)))
    artifacts += [add(shared, "kept") for _ in range(3)]
    shared.promote("kept@2")
    assert shared.keep("kept", 2) == [3], "4 and 5 are the newest, 2 is promoted, 1 is its parent"
    assert not artifacts[2].path.exists()
    assert shared.keep("kept-base", 1) == [2, 3], "1 is the base of a version that stays"
    assert [info.version for info in shared.versions("kept")] == [5, 4, 2, 1]
    assert add(shared, "kept").version == 6, "numbers are not used again"


def test_rollback_passes_over_deleted_versions(shared):
    for _ in range(4):
        shared.promote(add(shared, "gaps").ref)
    assert shared.keep("gaps", 1) == [1, 2, 3]
    with pytest.raises(VersionNotFound):
        shared.rollback("gaps")


def test_lineage_lists_the_ancestors_nearest_first(shared):
    base = add(shared, "line-base")
    adapter = add(shared, "line", kind="adapter", base=base.ref, parents=(base.ref,), data_hash="d1", metrics={"loss": 0.5})
    pruned = add(shared, "line", kind="pruned", parents=(adapter.ref,))
    assert [artifact.ref for artifact in shared.lineage("line")] == [pruned.ref, adapter.ref, base.ref]
    info = shared.versions("line")[1]
    assert (info.data_hash, info.base, info.parents, info.metrics) == ("d1", base.ref, (base.ref,), {"loss": 0.5})


def test_a_missing_ancestor_is_logged_and_left_out(shared, caplog):
    orphan = add(shared, "orphan", parents=("orphan@99", "never@1"))
    assert [artifact.ref for artifact in shared.lineage("orphan")] == [orphan.ref]
    assert "orphan@99" in caplog.text or "'99'" in caplog.text


def test_a_sampling_policy_is_attached_and_travels(shared):
    artifact = add(shared, "policy")
    assert artifact.policy is None
    policy = SamplingPolicy(default=Sampling(temperature=0.2), tasks={"code": Sampling(temperature=0)}, provenance={"run": "r"})
    assert shared.attach_policy("policy", policy).policy == policy
    assert shared.resolve("policy").policy == policy
    assert POLICY not in shared.resolve("policy").manifest.files


def test_evaluations_add_metrics_to_a_version(shared):
    add(shared, "measured", metrics={"loss": 0.5})
    shared.annotate("measured@1", {"intent_accuracy": 0.9, "loss": 0.4})
    assert shared.versions("measured")[0].metrics == {"loss": 0.4, "intent_accuracy": 0.9}


def test_models_are_listed_by_name_with_their_aliases(tmp_path):
    registry = Registry(Settings(home=tmp_path))
    assert registry.models() == []
    for name in ("zeta", "alpha"):
        add(registry, name)
    registry.promote("zeta@1")
    assert [(model.name, dict(model.aliases), len(model.versions)) for model in registry.models()] == [
        ("alpha", {}, 1),
        ("zeta", {"production": 1}, 1),
    ]


def test_a_moved_home_still_resolves(tmp_path):
    registry = Registry(Settings(home=tmp_path / "old"))
    add(registry, "mover")
    (tmp_path / "old").rename(tmp_path / "new")
    assert Registry(Settings(home=tmp_path / "new")).resolve("mover").path.is_relative_to(tmp_path / "new")


def test_a_registry_is_picklable_for_rays_workers(shared):
    add(shared, "pickled")
    assert pickle.loads(pickle.dumps(shared)).resolve("pickled").version == 1


def test_two_processes_that_start_together_get_distinct_versions(tmp_path):
    registry = Registry(Settings(home=tmp_path))
    pipes = [multiprocessing.Pipe() for _ in range(2)]
    children = [fork(register_five, registry, told) for _, told in pipes]
    versions = [version for heard, _ in pipes for version in heard.recv()]
    for child in children:
        child.join()
    assert sorted(versions) == list(range(1, 11))
    assert {registry.resolve(f"race@{version}").version for version in versions} == set(versions)


def test_a_server_that_does_not_answer_is_a_clear_error(tmp_path):
    registry = Registry(Settings(home=tmp_path, registry="http://127.0.0.1:9"))
    with pytest.raises(RegistryError, match=r"No MLflow server answers at http://127\.0\.0\.1:9"):
        registry.resolve("any")


def test_the_weights_hash_depends_on_content_and_order_of_names(tmp_path):
    (tmp_path / "b.safetensors").write_bytes(b"2")
    (tmp_path / "a.safetensors").write_bytes(b"1")
    before = weights_sha256(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert weights_sha256(tmp_path) == before
    (tmp_path / "a.safetensors").rename(tmp_path / "c.safetensors")
    assert weights_sha256(tmp_path) != before
