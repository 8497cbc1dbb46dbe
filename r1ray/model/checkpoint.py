"""A directory of safetensors: is it whole, what tensors does it hold? Read from the files' headers, a weight only when asked for.

Knows the file format and the index of shards; knows no architecture.
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
import re
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1ray.errors import UnsupportedModel
from r1ray.model.fp8 import dequantized, fp8_of

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "HEAD",
    "INDEX",
    "Stored",
    "Tensors",
    "checkpoint_tensors",
    "link_or_copy",
    "num_parameters",
    "read_json",
    "stored_tensors",
    "tensor_shapes",
    "weight_files",
    "write_tensors",
]

Tensors = Callable[[str], "Tensor | None"]
"""A checkpoint: a tensor by its Hugging Face name, None where there is none of that name."""

HEAD = "score.weight"  # of a reward model
INDEX = "model.safetensors.index.json"

_SINGLE = "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    "F8_E8M0": "float8_e8m0fnu",
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
}
_LONGEST_HEADER = 100_000_000  # bytes; the format's own limit
_WIDTH = re.compile(r"\d+")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as a file's header has it; `dtype` in the format's words: BF16, F32, F8_E4M3, ..."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def item_bytes(self) -> int:
        """Of one number: BOOL has one byte, the others as many bits as they are called by."""
        width = _WIDTH.search(self.dtype)
        return int(width[0]) // 8 if width else 1

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.item_bytes


def weight_files(directory: Path) -> list[Path]:
    """The weight files in name order: the shards of the index, or the only file.

    Raises:
        UnsupportedModel: none, pickled weights only, several without an index, or a shard of the index is missing.
    """
    if (directory / INDEX).is_file():
        names = sorted(set(read_json(directory / INDEX).get("weight_map", {}).values()))
        missing = [name for name in names if not (directory / name).is_file()]
        if missing or not names:
            what = f"{len(missing)} of {len(names)} shards, first {missing[0]}" if missing else "any entry in weight_map"
            raise UnsupportedModel(f"{directory} misses {what} of {INDEX}. Finish the download and import again.")
        return [directory / name for name in names]
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    raise UnsupportedModel(_no_weights(directory))


def tensor_shapes(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in `files`.

    Raises:
        UnsupportedModel: a file is no safetensors or shorter than its header says.
    """
    return {name: tuple(entry["shape"]) for file in files for name, entry in _header(file).items()}


def stored_tensors(file: Path) -> dict[str, Stored]:
    """Type and shape of every tensor in `file`, in its order.

    Raises:
        UnsupportedModel: as `tensor_shapes`.
    """
    return {name: Stored(entry["dtype"], tuple(entry["shape"])) for name, entry in _header(file).items()}


def write_tensors(file: Path, stored: Mapping[str, Stored], tensor: Callable[[str], Tensor]) -> None:
    """A safetensors file of which one tensor at a time is in memory: `tensor` gives each, of the type and shape that `stored` says."""
    import torch

    order = sorted(stored, key=lambda name: -stored[name].item_bytes)  # aligned, as safetensors itself lays them out
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        begin, end = end, end + stored[name].num_bytes
        entries[name] = {"dtype": stored[name].dtype, "shape": list(stored[name].shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        for name in order:
            values = tensor(name).contiguous().reshape(-1)
            assert values.nbytes == stored[name].num_bytes, f"{name} is not as promised"
            stream.write(values.view(torch.uint8).numpy().data)


def checkpoint_tensors(directory: Path, *, as_stored: bool = False) -> Tensors:
    """The tensors of a directory, each mapped from its shard when it is asked for and unmapped with its last view.

    A stage of a pipeline reads its own only, and who packs one after the other never has all of them in memory. What is stored in FP8
    comes as bfloat16, unless `as_stored`.

    Raises:
        UnsupportedModel: as `weight_files`, `tensor_shapes` and `fp8_of`; later, a tensor of a type that torch has not.
    """
    places = {name: (file, entry) for file in weight_files(directory) for name, entry in _header(file).items()}
    fp8 = fp8_of(read_json(directory / "config.json"), directory) if (directory / "config.json").is_file() else None

    def tensor(name: str) -> Tensor | None:
        return _mapped(name, *places[name]) if name in places else None

    return tensor if as_stored else dequantized(tensor, fp8)


def _mapped(name: str, file: Path, entry: Mapping[str, Any]) -> Tensor:
    import torch

    if (dtype := getattr(torch, _DTYPES.get(entry["dtype"], ""), None)) is None:
        raise UnsupportedModel(f"{file} holds {name} as {entry['dtype']}; it must be one of {', '.join(_DTYPES)}. Convert the model.")
    begin, end = entry["data_offsets"]
    with file.open("rb") as stream:
        data = 8 + struct.unpack("<Q", stream.read(8))[0]
        begin, end = data + begin, data + end
        if begin == end:
            return torch.empty(entry["shape"], dtype=dtype)
        page = begin - begin % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(stream.fileno(), end - page, access=mmap.ACCESS_COPY, offset=page)
    return torch.frombuffer(mapped, dtype=dtype, count=math.prod(entry["shape"]), offset=begin - page).view(entry["shape"])


def num_parameters(files: Sequence[Path]) -> int:
    """Numbers stored in `files`; tied weights are stored, and counted, once."""
    return sum(math.prod(shape) for shape in tensor_shapes(files).values())


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where both lie on one file system, a copy elsewhere. The source stays."""
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES):
            raise
        shutil.copyfile(source, target)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model directory.

    Raises:
        UnsupportedModel: the file is missing or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UnsupportedModel(f"{file.parent} has no {file.name}: no Hugging Face model directory. Give the one that holds it.") from error
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{file} cannot be read: {error}. Download it again.") from error
    if not isinstance(content, dict):
        raise UnsupportedModel(f"{file} holds a {type(content).__name__}, not an object. Download it again.")
    return content


def _header(file: Path) -> Mapping[str, Mapping[str, Any]]:
    """Format: 8 bytes length, a JSON header, the data; each entry has the end of its data relative to the header's end."""
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _LONGEST_HEADER + 1
        text = stream.read(length) if length <= _LONGEST_HEADER else b""
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        wanted = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise UnsupportedModel(f"{file} is no safetensors file: its header cannot be read. Download it again.") from error
    if (found := file.stat().st_size) < wanted:
        raise UnsupportedModel(f"{file} has {found} bytes, its header promises {wanted}: the download was cut off. Download it again.")
    return dict(entries.items())


def _no_weights(directory: Path) -> str:
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others:
        return f"{directory} holds {', '.join(others[:3])} but neither {_SINGLE} nor {INDEX}. Add the index, or rename a single file."
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        return (
            f"{directory} holds only pickled weights ({pickles[0]}), which can run code when opened. "
            "Convert them with save_pretrained, which writes safetensors, and import that directory."
        )
    return f"{directory} holds no weights (*.safetensors). Finish the download, or give the directory that holds them."
