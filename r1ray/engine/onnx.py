"""Backend on ONNX Runtime: runs what jobs/export_onnx.py exported, on CPUs or through the CUDA provider, in its stored precision.

Everything above the logits is the in-house engine's, so sampling, scheduling, prefix cache and limits are the same as with weights.
(onnxruntime-genai's own engine batches continuously on GPUs only, has no bias, no logprobs and no token masks, and was not taken.)
One pass runs the graph once for all decoding streams, then once for each prompt piece. Adapters were merged by the export.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1ray.engine.backend import Immediate, Piece
from r1ray.engine.onnx_rows import Rows
from r1ray.errors import AdapterMismatch, UnsupportedModel

__all__ = ["GRAPH", "WANTED", "OnnxBackend", "OnnxOptions"]

GRAPH = "engine.onnx"
"""The exported graph beside the weights it shares with genai's `model.onnx`: logits of chosen tokens only."""

WANTED = "wanted_tokens"
"""Its extra input: which of the B * T tokens (row by row) the logits are wanted of."""

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxOptions:
    """`context` is the longest stream, `num_rows` the most that are in one pass."""

    precision: str
    num_blocks: int
    num_rows: int
    context: int
    num_threads: int
    device: str = "cpu"


class OnnxBackend(Immediate):
    """The graph in `directory` and its cache.

    Raises:
        UnsupportedModel: no such graph, one of another make, or a device that the installed ONNX Runtime cannot use.
    """

    lacks = frozenset({"adapters"})

    def __init__(self, directory: Path, options: OnnxOptions) -> None:
        self.precision = options.precision
        self.num_blocks = options.num_blocks
        self._session = _open(directory / GRAPH, options)
        inputs = {entry.name: entry for entry in self._session.get_inputs()}
        logits = next(entry for entry in self._session.get_outputs() if entry.name == "logits")
        self.vocab_size = int(logits.shape[-1])
        self._logits_type = _TYPES[logits.type]
        self._has_positions = "position_ids" in inputs
        keys = inputs["past_key_values.0.key"]
        self._num_layers = sum(name.endswith(".key") for name in inputs)
        self._device, _, number = options.device.partition(":")
        self._device_id = int(number or 0)
        self._rows = Rows(
            (2 * self._num_layers, int(keys.shape[1]), int(keys.shape[3])),
            num_blocks=options.num_blocks,
            num_rows=options.num_rows,
            context=options.context,
            kind=(_TYPES[keys.type], options.device),
        )
        self._bound: dict[tuple[int, int], Any] = {}  # (first row, number of rows) -> its binding to the cache
        self._bound_to = self._rows.generation

    def forward(self, pieces: Sequence[Piece]) -> Tensor:
        places = self._rows.place(pieces)
        parts: dict[int, Tensor] = {}
        decoding = sorted((number for number, piece in enumerate(pieces) if len(piece.ids) == 1), key=lambda number: places[number])
        if decoding:
            found = self._run([pieces[number] for number in decoding], 0)
            asked = [number for number in decoding if pieces[number].num_logits]
            parts = {number: found[row : row + 1] for row, number in enumerate(asked)}
        for number, piece in enumerate(pieces):
            if len(piece.ids) > 1:
                parts[number] = self._run([piece], places[number])
        self._rows.keep(pieces, places)
        return torch.cat([parts[number] for number in sorted(parts)]) if parts else torch.empty(0, self.vocab_size)

    def load_adapter(self, name: str, path: Path) -> None:
        raise AdapterMismatch(
            f"An ONNX export takes no adapter beside its weights; {name} at {path} cannot be loaded. Export the adapter's version."
        )

    def unload_adapter(self, name: str) -> None:
        """None is ever loaded."""

    def clear(self, blocks: Sequence[int]) -> None:
        self._rows.clear(blocks)

    def close(self) -> None:
        self._bound.clear()

    def _run(self, pieces: Sequence[Piece], first: int) -> Tensor:
        """The rows from `first` on, one piece each and all of one length: (W, vocab_size) logits."""
        num, length = len(pieces), len(pieces[0].ids)
        starts = torch.tensor([piece.start for piece in pieces])
        total = int(starts.max()) + length
        wanted = [row * length + place for row, piece in enumerate(pieces) for place in range(length - piece.num_logits, length)]
        feeds = {
            "input_ids": torch.tensor([list(piece.ids) for piece in pieces]),
            "attention_mask": (torch.arange(total) < starts[:, None] + length).long(),
            WANTED: torch.tensor(wanted or [0]),  # a product of no rows is not to be had
        }
        if self._has_positions:
            feeds["position_ids"] = starts[:, None] + torch.arange(length)
        binding = self._binding(first, num)
        for name, tensor in feeds.items():
            binding.bind_cpu_input(name, tensor.numpy())
        logits = torch.empty(max(1, len(wanted)), self.vocab_size, dtype=self._logits_type)
        binding.bind_output("logits", "cpu", 0, _numpy(logits.dtype), logits.shape, logits.data_ptr())
        if self._device != "cpu":
            torch.cuda.synchronize(self._device_id)  # the cache is torch's, on a stream that ONNX Runtime does not know
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return logits[: len(wanted)].float()

    def _binding(self, first: int, num: int) -> Any:
        """Past and present are the same memory: attention appends in place."""
        if self._bound_to != self._rows.generation:
            self._bound.clear()
            self._bound_to = self._rows.generation
        if (first, num) not in self._bound:
            self._bound[first, num] = self._bind(first, num)
        return self._bound[first, num]

    def _bind(self, first: int, num: int) -> Any:
        binding = self._session.io_binding()
        for plane in range(2 * self._num_layers):
            tensor = self._rows.plane(plane, first)
            name = f"{plane // 2}.{('key', 'value')[plane % 2]}"
            place = (self._device, self._device_id, _numpy(tensor.dtype), [num, *tensor.shape], tensor.data_ptr())
            binding.bind_input(f"past_key_values.{name}", *place)
            binding.bind_output(f"present.{name}", *place)
        return binding


def _open(graph: Path, options: OnnxOptions) -> Any:
    import onnxruntime

    if not graph.is_file():
        raise UnsupportedModel(f"{graph.parent} has no {graph.name}. Export the model with jobs/export_onnx.py.")
    provider = _PROVIDERS.get(options.device.partition(":")[0])
    if provider not in onnxruntime.get_available_providers():
        raise UnsupportedModel(
            f"engine.device={options.device}: the installed ONNX Runtime has {', '.join(onnxruntime.get_available_providers())}. "
            "Set engine.device=cpu, or install r1ray[gpu] after removing onnxruntime."
        )
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = options.num_threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    # between two passes its threads would spin on the cores that draw the tokens
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(graph), settings, providers=[provider])


def _numpy(dtype: torch.dtype) -> Any:
    import numpy as np

    return {torch.float32: np.float32, torch.float16: np.float16}[dtype]
