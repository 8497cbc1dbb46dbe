"""A registry with a real MLflow on SQLite for each module, and artifacts of three bytes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import pytest

from r1ray.registry import Registry, weights_sha256
from r1ray.settings import Settings
from r1ray.types import Artifact, Manifest, TemplateInfo

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


def fork(target: Callable[..., None], *arguments: object) -> BaseProcess:
    """A second process that has MLflow imported already: a fresh interpreter would spend seconds on that."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process
