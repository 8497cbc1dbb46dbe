"""Artifact directories: all of one or nothing, whatever happens to the writer, the disk or the files later."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from r1ray.errors import ArtifactInvalid, DiskFull, ModelNotFound
from r1ray.registry import MANIFEST, POLICY, Registry, directory, weights_sha256
from tests.registry.conftest import WEIGHTS, add, fork, manifest


def leftovers(registry: Registry) -> list[Path]:
    return list((registry.settings.artifacts / ".staging").glob("*"))


def stage_and_wait(registry: Registry, told: Connection) -> None:
    with registry.staging("killed") as staged:
        (staged / WEIGHTS).write_bytes(b"half")
        told.send(staged)
        time.sleep(60)


def test_the_manifest_lists_every_file_with_its_size(shared):
    artifact = add(shared, "files")
    assert artifact.manifest.files == {WEIGHTS: 3, "tokenizer/vocab.json": 2}
    assert shared.open(artifact.path).manifest == artifact.manifest
    assert shared.open(artifact.path).version == 0


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


def test_the_weights_hash_depends_on_content_and_order_of_names(tmp_path):
    (tmp_path / "b.safetensors").write_bytes(b"2")
    (tmp_path / "a.safetensors").write_bytes(b"1")
    before = weights_sha256(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert weights_sha256(tmp_path) == before
    (tmp_path / "a.safetensors").rename(tmp_path / "c.safetensors")
    assert weights_sha256(tmp_path) != before
