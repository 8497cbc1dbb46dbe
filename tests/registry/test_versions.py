"""Versions: numbering by several writers at once, promotion and rolling back, lineage, clean-up."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from r1ray.errors import ArtifactInvalid, RegistryError, VersionNotFound
from r1ray.observe import client as mlflow_client
from r1ray.registry import POLICY, Registry
from r1ray.settings import Settings
from r1ray.types import Sampling, SamplingPolicy
from tests.registry.conftest import WEIGHTS, add, fork


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


def test_a_failure_at_mlflow_removes_the_moved_directory(shared, monkeypatch):
    def refuse(*_args: object) -> int:
        raise RegistryError("no")

    monkeypatch.setattr(Registry, "_create_version", refuse)
    with pytest.raises(RegistryError):
        add(shared, "refused")
    assert not list((shared.settings.artifacts / "refused").glob("*"))


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
