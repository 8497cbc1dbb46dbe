"""Quantised weights: that they are not trained, and a version in FP8 as one in bfloat16, made once.

    r1ray dequantise r1        # -> r1-bf16@1, which can be trained

DeepSeek-V3 and R1 are published in FP8 (fp8.py). Where that is loaded for training, transformers makes plain numbers of it on some GPUs
and keeps float8 on others, and under ZeRO-3 every worker reads all of it. Here files are mapped and one tensor at a time is in memory,
so that 671 billion weights need disk and no large machine. Knows no training.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from r1ray.errors import DiskFull, UnsupportedModel
from r1ray.model import template
from r1ray.model.checkpoint import INDEX, Stored, checkpoint_tensors, num_parameters, read_json, stored_tensors, weight_files, write_tensors
from r1ray.model.family import quantisation
from r1ray.model.fp8 import SCALE, fp8_of
from r1ray.registry import MANIFEST, POLICY, Registry, weights_sha256
from r1ray.types import Artifact

if TYPE_CHECKING:
    import torch

__all__ = ["check_trainable", "dequantised_version"]

_FLOAT8 = "F8_"  # begins the names of the format's types


def check_trainable(base: Artifact) -> None:
    """Before anything is started.

    Raises:
        UnsupportedModel: the base's weights are quantised; says what makes plain ones of them.
    """
    method = quantisation(read_json(base.path / "config.json"))
    if method is None:
        return
    way_out = (
        f"Make bfloat16 of them once, r1ray dequantise {base.ref}, and train that version."
        if method == "fp8"
        else "Import the model as it was before it was quantised."
    )
    raise UnsupportedModel(f"The weights of {base.ref} are stored in {method}, which keeps them from being trained. {way_out}")


def dequantised_version(ref: str, registry: Registry, name: str | None = None) -> Artifact:
    """Write the weights of `ref` in bfloat16 and register them as `name` (default: its own with -bf16).

    Raises:
        UnsupportedModel: `ref` is not in FP8, or a factor is missing or of the wrong shape; nothing is registered.
        DiskFull: no room for twice the bytes.
    """
    source = registry.resolve(ref)
    config = read_json(source.path / "config.json")
    if fp8_of(config, source.path) is None:
        raise UnsupportedModel(f"The weights of {source.ref} are not quantised. Train it as it is.")
    name = name or f"{source.manifest.name}-bf16"
    with registry.staging(name) as staged:
        _check_room(source.path, staged)
        _write(source.path, staged)
        _copy_companions(source.path, staged)
        left_out = ("quantization_config", "compression_config", "torch_dtype")
        plain = {key: value for key, value in config.items() if key not in left_out} | {"dtype": "bfloat16"}
        (staged / "config.json").write_text(json.dumps(plain, indent=2, ensure_ascii=False), encoding="utf-8")
        manifest = source.manifest.model_copy(
            update={
                "name": name,
                "weights_sha256": weights_sha256(staged),
                "template": template.write(template.read(source), staged),
                "num_parameters": num_parameters(weight_files(staged)),
                "metrics": {},
                "parents": (source.ref,),
                "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
        return registry.register(staged, manifest, policy=source.policy)


def _check_room(source: Path, out: Path) -> None:
    wanted = sum(stored.num_bytes for file in weight_files(source) for stored in _plain(stored_tensors(file)).values())
    if (free := shutil.disk_usage(out).free) < wanted:
        raise DiskFull(
            f"In bfloat16 {source.name} takes {wanted / 2**30:.1f} GiB, and {out.parent} has {free / 2**30:.1f} GiB free. Free some, "
            "or move R1RAY_HOME to a larger disk."
        )


def _write(source: Path, out: Path) -> None:
    """File by file under the same names; the index without the factors."""
    tensors, files = checkpoint_tensors(source), weight_files(source)

    def tensor(name: str) -> torch.Tensor:
        found = tensors(name)
        assert found is not None, "its header has it"
        return found

    places: dict[str, str] = {}
    total = 0
    for file in _progress(files, f"dequantising {source.name}"):
        plain = _plain(stored_tensors(file))
        write_tensors(out / file.name, plain, tensor)
        places |= dict.fromkeys(plain, file.name)
        total += sum(stored.num_bytes for stored in plain.values())
    if (source / INDEX).is_file():
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (out / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _plain(found: Mapping[str, Stored]) -> dict[str, Stored]:
    """What is written of a file's tensors, and as what; factors belong to a float8 tensor and go with it."""
    return {
        name: Stored("BF16", stored.shape) if stored.dtype.startswith(_FLOAT8) else stored
        for name, stored in found.items()
        if not name.endswith(SCALE)
    }


def _copy_companions(source: Path, out: Path) -> None:
    """Tokenizer, templates, terms: all that is no weight and describes none."""
    for file in source.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and file.name not in {INDEX, MANIFEST, POLICY, "config.json"}:
            shutil.copyfile(file, out / file.name)


def _progress(files: Sequence[Path], label: str) -> Iterator[Path]:
    """A bar on a terminal; nothing in a log."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(files, description=label, console=console, disable=not console.is_terminal)
