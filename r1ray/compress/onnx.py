"""What jobs/export_onnx.py runs: a registered version -> a version of kind onnx, compared with the original before it gets a number.

The export keeps tokenizer, template pair, system prompt and collection of its parent, so it serves and evaluates like it.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from r1ray.compress.config import ExportOnnxConfig
from r1ray.compress.graph import WEIGHTS, build_graph
from r1ray.compress.parity import LONGEST, Parity, check_parity, compare
from r1ray.engine.backend import BLOCK_SIZE
from r1ray.engine.hardware import choose_threads
from r1ray.engine.onnx import OnnxBackend, OnnxOptions
from r1ray.errors import InvalidValue, UnsupportedModel
from r1ray.model import template
from r1ray.model.checkpoint import num_parameters, weight_files
from r1ray.model.load import load_tokenizer, merge_adapter
from r1ray.registry import MANIFEST, POLICY, Registry, weights_sha256
from r1ray.settings import Settings
from r1ray.types import Artifact, Manifest

__all__ = ["export_onnx"]

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "adapter_*", MANIFEST, POLICY)

log = logging.getLogger(__name__)


def export_onnx(config: ExportOnnxConfig, settings: Settings | None = None) -> Artifact:
    """The registered export, with the figures of its comparison as metrics.

    Raises:
        UnsupportedModel: an export already, or an architecture that onnxruntime-genai does not know.
        CompressionError: it answers too differently; nothing is registered.
    """
    registry = Registry(settings)
    parent = registry.resolve(config.model)
    if parent.manifest.kind == "onnx":
        raise UnsupportedModel(
            f"{parent.ref} is an ONNX export already. Give the version it was made from: {', '.join(parent.manifest.parents)}."
        )
    token_ids = _token_ids(parent, config, registry.settings)
    with _whole(parent, registry) as source, registry.staging(config.name or parent.manifest.name) as staged:
        started = time.perf_counter()
        _copy_companions(source, staged)
        torch.set_num_threads(choose_threads(None))
        build_graph(source, staged, config)
        _say(f"{config.precision} for {config.device}: {_megabytes(staged):.0f} MB in {time.perf_counter() - started:.0f} s")
        found = compare(source, _backend(staged, config), token_ids, config.parity)
        _say(str(found))
        check_parity(found, config.parity, exact=config.precision == "float32")
        artifact = registry.register(
            staged, _manifest(parent, staged, config, found, num_parameters(weight_files(source))), policy=parent.policy
        )
    _say(f"registered {artifact.ref}; serve it with engine.type=onnx, promote it with r1ray promote {artifact.ref}")
    return artifact


@contextlib.contextmanager
def _whole(parent: Artifact, registry: Registry) -> Iterator[Path]:
    """A directory of full weights: the parent's own, or its adapter merged for the time being."""
    if parent.manifest.kind != "adapter":
        yield parent.path
        return
    registry.settings.cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="merged-", dir=registry.settings.cache) as folder:
        merged = Path(folder) / "model"
        merge_adapter(parent, merged, registry)
        _say(f"merged {parent.ref} into {parent.manifest.base}")
        yield merged


def _token_ids(parent: Artifact, config: ExportOnnxConfig, settings: Settings) -> Sequence[int]:
    """Of the beginning of the text: more characters than so many tokens have in any language, not a whole corpus."""
    text = _text(config.parity.text, settings)
    ids: list[int] = load_tokenizer(parent)(text[: 8 * config.parity.num_tokens], verbose=False)["input_ids"]
    return ids


def _text(path: Path | None, settings: Settings) -> str:
    if path is None:
        from r1ray.data.demo import demo_conversations

        return "\n".join(message.content for dialogue in demo_conversations("train") for message in dialogue.messages)
    try:
        return settings.locate(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidValue(f"parity.text={path} cannot be read: {error}. Give a UTF-8 text file.") from error


def _copy_companions(source: Path, staged: Path) -> None:
    """Tokenizer, config, templates, terms: everything but weights."""
    left_out = {path.name for pattern in _WEIGHTS for path in source.glob(pattern)}
    for file in source.iterdir():
        if file.is_file() and file.name not in left_out:
            shutil.copyfile(file, staged / file.name)


def _backend(staged: Path, config: ExportOnnxConfig) -> OnnxBackend:
    num_rows = config.parity.num_prompts
    options = OnnxOptions(
        precision=config.precision,
        num_blocks=(num_rows + 1) * LONGEST // BLOCK_SIZE,
        num_rows=num_rows,
        context=LONGEST,
        num_threads=choose_threads(None),
        device=config.device,
    )
    return OnnxBackend(staged, options)


def _manifest(parent: Artifact, staged: Path, config: ExportOnnxConfig, found: Parity, num_stored: int) -> Manifest:
    shape = parent.manifest
    return Manifest(
        name=config.name or shape.name,
        kind="onnx",
        family=shape.family,
        weights_sha256=weights_sha256(staged),
        template=template.write(template.read(parent), staged),
        context_length=shape.context_length,
        num_parameters=num_stored,
        data_hash=shape.data_hash,
        config=config.model_dump(mode="json"),
        metrics=found.metrics,
        parents=(parent.ref,),
        collection=shape.collection,
        system_prompt=shape.system_prompt,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _megabytes(staged: Path) -> float:
    return (staged / WEIGHTS).stat().st_size / 1e6


def _say(line: str) -> None:
    print(f"export: {line}", flush=True)
