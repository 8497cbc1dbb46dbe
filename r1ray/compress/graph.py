"""A Hugging Face directory -> an ONNX graph with its weights, by onnxruntime-genai's builder.

Two graphs share one file of weights: `model.onnx`, as onnxruntime-genai and its tools expect it, with `genai_config.json` beside it, and
`engine.onnx` for r1ray's engine, which multiplies with the head only where a logit is wanted. Knows no registry and judges no accuracy.
"""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path
from typing import Any

from r1ray.compress.config import ExportOnnxConfig
from r1ray.engine.onnx import GRAPH, WANTED
from r1ray.errors import CompressionError, UnsupportedModel
from r1ray.model.checkpoint import read_json

__all__ = ["WEIGHTS", "build_graph"]

BUILT = "model.onnx"
WEIGHTS = "model.onnx.data"
SETTINGS = "genai_config.json"

_PRECISIONS = {"float32": "fp32", "float16": "fp16", "int8": "int8", "int4": "int4"}


def build_graph(source: Path, out: Path, config: ExportOnnxConfig) -> None:
    """Write both graphs, the weights and genai's settings into `out`.

    Raises:
        UnsupportedModel: the builder does not know the architecture, or its attention keeps no cache that can be shared.
        CompressionError: the extra `onnx` is not installed, or the builder failed.
    """
    _run_builder(source, out, config)
    decoder = read_json(out / SETTINGS)
    if not decoder["search"].get("past_present_share_buffer"):
        raise UnsupportedModel(f"{source}: the exported attention copies its cache in every step, which the engine does not take.")
    _write_engine_graph(out, int(decoder["model"]["decoder"]["head_size"]))


def _run_builder(source: Path, out: Path, config: ExportOnnxConfig) -> None:
    try:
        from onnxruntime_genai.models import builder
    except ImportError as error:
        raise CompressionError(f"Exports need the extra onnx, which is not whole: {error}. pip install 'r1ray[onnx]'.") from error
    for chatty in ("onnxruntime.quantization", "neural_compressor"):  # a line per node, and an error for each that may not be touched
        logging.getLogger(chatty).setLevel(logging.CRITICAL)
    precision, cache, said = _PRECISIONS[config.precision], str(out / ".cache"), io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            options = builder.parse_extra_options("", str(source), str(out), precision, config.device, cache, _options(config))
            builder.create_model("", str(source), str(out), precision, config.device, cache, **options)
    except NotImplementedError as error:
        raise UnsupportedModel(f"onnxruntime-genai cannot export {source}: {error} Serve it with engine.type=torch.") from error
    except Exception as error:
        tail = " | ".join(said.getvalue().splitlines()[-3:])
        raise CompressionError(f"onnxruntime-genai could not export {source}: {type(error).__name__}: {error}. It said: {tail}") from error
    finally:
        with contextlib.suppress(OSError):
            Path(cache).rmdir()


def _options(config: ExportOnnxConfig) -> list[str]:
    options = ["hf_token=false"]
    if config.precision in ("int8", "int4"):
        options.append(f"block_size={config.block_size}")
    if config.precision == "int4":
        options.append(f"algo_config={config.int4_method}")
        if config.int4_mixed:
            options.append("matmul_mixed_precision=last_matmul:int8,mixed_layers:int8")
    return options


def _write_engine_graph(out: Path, head_size: int) -> None:
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load(str(out / BUILT), load_external_data=False)
    graph = model.graph
    head = _head(graph)
    hidden = head.input[0]
    head.input[0] = "r1ray/wanted"
    at = list(graph.node).index(head)
    graph.node.insert(at, helper.make_node("Gather", ["r1ray/tokens", WANTED], ["r1ray/wanted"], axis=0, name="r1ray/wanted"))
    graph.node.insert(at, helper.make_node("Flatten", [hidden], ["r1ray/tokens"], axis=2, name="r1ray/tokens"))
    graph.input.append(helper.make_tensor_value_info(WANTED, TensorProto.INT64, ["num_wanted"]))
    logits = next(output for output in graph.output if output.name == "logits")
    kind = logits.type.tensor_type
    logits.CopyFrom(helper.make_tensor_value_info("logits", kind.elem_type, ["num_wanted", kind.shape.dim[-1].dim_value]))
    for value in [*graph.input, *graph.output]:
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[3].dim_value = head_size
    produced = {name for node in graph.node[at:] for name in node.output}
    kept = [info for info in graph.value_info if info.name not in produced]  # their shapes have changed
    del graph.value_info[:]
    graph.value_info.extend(kept)
    onnx.save(model, str(out / GRAPH))


def _head(graph: Any) -> Any:
    """The product with the head: what makes the logits, before any cast or cap."""
    maker = {name: node for node in graph.node for name in node.output}
    node = maker["logits"]
    while node.op_type not in ("MatMul", "MatMulNBits", "Gemm"):
        if node.input[0] not in maker:
            raise UnsupportedModel(f"The exported graph makes its logits by {node.op_type}, not by a matrix product.")
        node = maker[node.input[0]]
    return node
