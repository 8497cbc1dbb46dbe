"""A GGUF file into a Hugging Face directory in bfloat16, once: the result is cached by the file's content.

Llama and Qwen2 (the bodies of R1's distills) are dequantised tensor by tensor here, which takes a third of the time and a
fraction of the memory of transformers' own loader; every other architecture, and any variation of these two, goes through it.
The result has lost what the quantisation lost. Knows no registry.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r1ray.errors import UnsupportedModel
from r1ray.model.checkpoint import INDEX

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PretrainedConfig
    from transformers.integrations.gguf.reader import TensorInfo

__all__ = ["convert_gguf"]

_SHARD_BYTES = 4 << 30
_log = logging.getLogger(__name__)

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
_TENSOR = re.compile(r"(?:blk\.(?P<layer>\d+)\.)?(?P<part>\w+)\.(?P<kind>weight|bias)")
# Keys that change the arithmetic in a way that only transformers' mapping knows.
_VARIATIONS = ("rope.scaling", "expert_count", "attention.sliding_window", "attention.key_length")


def convert_gguf(file: Path, cache: Path) -> Path:
    """The directory with config, tokenizer and safetensors made from `file`; made at the first call for this content.

    Raises:
        UnsupportedModel: no GGUF file, or an architecture or quantisation that cannot be read.
    """
    place = cache / "gguf" / _content_hash(file)
    if place.is_dir():
        return place
    started = time.monotonic()
    _log.info("converting %s (%.0f MB) to safetensors, once", file.name, file.stat().st_size / 1e6)
    place.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        staged.chmod(0o755)
        _convert(file, staged)
        if not place.exists():
            staged.rename(place)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    _log.info("converted %s in %.1f s", file.name, time.monotonic() - started)
    return place


@dataclass(frozen=True, slots=True)
class _Header:
    """What a GGUF file says of itself: arrays of strings, the vocabulary above all, as their length only."""

    metadata: Mapping[str, Any]
    tensors: Sequence[TensorInfo]
    data_start: int

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    def own(self, key: str) -> Any:
        """The value of `<architecture>.key`, None where the file has none."""
        return self.metadata.get(f"{self.architecture}.{key}")


def _convert(file: Path, out: Path) -> None:
    header = _open(file)
    try:
        config = _known_config(header)
        if config is not None:
            _save_shards(_tensors(file, header, config), out)
            config.save_pretrained(out)
        else:
            _convert_with_transformers(file, out)
        _tokenizer_class(config).from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(out)
    except (NotImplementedError, ValueError, KeyError) as error:
        raise UnsupportedModel(f"{file} cannot be converted: {error}. Give the model's safetensors directory instead.") from error


def _tokenizer_class(config: PretrainedConfig | None) -> Any:
    """AutoTokenizer would choose the same, after reading the file with gguf's own reader: five seconds for 49,000 tokens."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

    if config is None:
        return AutoTokenizer
    return Qwen2Tokenizer if config.model_type == "qwen2" else PreTrainedTokenizerFast


def _open(file: Path) -> _Header:
    from transformers.integrations.gguf.reader import GgufHeader, read_gguf_metadata

    try:
        metadata, _ = read_gguf_metadata(str(file))
        header = GgufHeader.from_file(str(file))
    except (ValueError, KeyError, OSError, IndexError, struct.error) as error:
        raise UnsupportedModel(f"{file} is no complete GGUF file: {error}. Download it again.") from error
    wanted = header.data_start + max((tensor.offset + tensor.nbytes for tensor in header.tensors), default=0)
    if (found := file.stat().st_size) < wanted:
        raise UnsupportedModel(f"{file} is no complete GGUF file: it has {found} bytes of {wanted}. Download it again.")
    return _Header(metadata, header.tensors, header.data_start)


def _known_config(header: _Header) -> PretrainedConfig | None:
    """The config of a plain Llama or Qwen2 file, else None."""
    from transformers import LlamaConfig, Qwen2Config

    arch, own = header.architecture, header.own
    classes: dict[str, Callable[..., PretrainedConfig]] = {"llama": LlamaConfig, "qwen2": Qwen2Config}
    if arch not in classes or any(_target(tensor.name) is None for tensor in header.tensors):
        return None
    if any(name.startswith(f"{arch}.{key}") for name in header.metadata for key in _VARIATIONS):
        return None
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    tokens = {f"{name}_token_id": header.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _TOKENS.items()}
    return classes[arch](
        architectures=["LlamaForCausalLM" if arch == "llama" else "Qwen2ForCausalLM"],
        vocab_size=shapes["token_embd.weight"][0],
        hidden_size=own("embedding_length"),
        intermediate_size=own("feed_forward_length"),
        num_hidden_layers=own("block_count"),
        num_attention_heads=own("attention.head_count"),
        num_key_value_heads=own("attention.head_count_kv") or own("attention.head_count"),
        max_position_embeddings=own("context_length"),
        rms_norm_eps=own("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": own("rope.freq_base") or 10000.0},
        tie_word_embeddings="output.weight" not in shapes,
        dtype="bfloat16",
        **tokens,
    )


_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding"}


def _target(name: str) -> str | None:
    """transformers' name of a GGUF tensor; None for one that a plain Llama or Qwen2 does not have."""
    match = _TENSOR.fullmatch(name)
    if match is None:
        return None
    layer, part, kind = match.group("layer", "part", "kind")
    stem = _TOP.get(part) if layer is None else _LAYER.get(part)
    return None if stem is None else f"{stem}.{kind}" if layer is None else f"model.layers.{layer}.{stem}.{kind}"


def _tensors(file: Path, header: _Header, config: PretrainedConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor by transformers' name, one at a time: the file is mapped, not read."""
    import numpy as np

    mapped = np.memmap(file, mode="r", dtype=np.uint8)
    for tensor in _progress(header.tensors, f"converting {file.name}"):
        start = header.data_start + tensor.offset
        yield _tensor(tensor, mapped[start : start + tensor.nbytes], config)


def _tensor(tensor: TensorInfo, data: np.ndarray[Any, Any], config: PretrainedConfig) -> tuple[str, torch.Tensor]:
    import gguf
    import torch

    rows = data.reshape(*tensor.shape[:-1], -1)  # many short rows, not one long: gguf dequantises a few at a time
    values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(tensor.ggml_type)).reshape(tensor.shape)
    if config.model_type == "llama" and ".attn_q." in tensor.name:
        values = _unpermute(values, config.num_attention_heads)
    if config.model_type == "llama" and ".attn_k." in tensor.name:
        values = _unpermute(values, config.num_key_value_heads)
    name = _target(tensor.name)
    assert name is not None
    return name, torch.tensor(values, dtype=torch.bfloat16)


def _unpermute(values: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """GGUF's Llama keeps rotary pairs side by side, transformers keeps them half a head apart."""
    halves = values.reshape(num_heads, values.shape[0] // num_heads // 2, 2, *values.shape[1:])
    return halves.swapaxes(2, 1).reshape(values.shape)


def _save_shards(tensors: Iterable[tuple[str, torch.Tensor]], out: Path) -> None:
    """Write each full shard before the next tensor is read, so that one shard is all that memory must hold."""
    from safetensors.torch import save_file

    shards: list[list[str]] = []
    total = 0
    for shard in _shards(tensors):
        total += sum(tensor.nbytes for tensor in shard.values())
        save_file(shard, out / f"{len(shards)}.part", metadata={"format": "pt"})
        shards.append(list(shard))
    if len(shards) == 1:
        (out / "0.part").rename(out / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (out / f"{number}.part").rename(out / file)
        weight_map.update(dict.fromkeys(names, file))
    (out / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2), encoding="utf-8")


def _shards(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > _SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _convert_with_transformers(file: Path, out: Path) -> None:
    """Every architecture that transformers maps; needs the whole model in memory."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(out, max_shard_size=_SHARD_BYTES)


def _progress(tensors: Sequence[TensorInfo], label: str) -> Iterator[TensorInfo]:
    """A bar on a terminal; nothing in a log."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    yield from track(tensors, description=label, console=console, disable=not console.is_terminal)


def _content_hash(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:24]
    except OSError as error:
        raise UnsupportedModel(f"{file} cannot be read: {error}. Give an existing GGUF file.") from error
