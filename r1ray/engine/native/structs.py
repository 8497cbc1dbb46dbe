"""kernels.cpp's structs as ctypes: same order, same widths; a test compares the sizes that both sides see."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_void_p

__all__ = ["Batch", "Layer", "Linear", "Lora", "Model", "Segment"]


class Linear(ctypes.Structure):
    _fields_ = [
        ("n", c_int32),
        ("k", c_int32),
        ("kind", c_int32),
        ("group", c_int32),
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("bias", c_void_p),
    ]


class Lora(ctypes.Structure):
    _fields_ = [("rank", c_int32), ("k", c_int32), ("n", c_int32), ("offset", c_int32), ("a", c_void_p), ("b", c_void_p)]


class Layer(ctypes.Structure):
    _fields_ = [
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("qkv", Linear),
        ("o", Linear),
        ("gate_up", Linear),
        ("down", Linear),
        ("keys", c_void_p),
        ("values", c_void_p),
    ]


class Model(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab")),
        *((name, c_int32) for name in ("num_layers", "num_threads", "kv_kind", "embedding_kind")),
        ("eps", c_float),
        ("scale", c_float),
        ("layers", ctypes.POINTER(Layer)),
        ("final_norm", c_void_p),
        ("head", Linear),
        ("embedding", c_void_p),
        ("cosine", c_void_p),
        ("sine", c_void_p),
    ]


class Segment(ctypes.Structure):
    _fields_ = [(name, c_int32) for name in ("first", "num", "start", "table", "adapter")]


class Batch(ctypes.Structure):
    _fields_ = [
        *((name, c_int32) for name in ("num_tokens", "num_segments", "max_blocks", "num_outputs", "num_adapters")),
        ("ids", c_void_p),
        ("segments", ctypes.POINTER(Segment)),
        ("tables", c_void_p),
        ("outputs", c_void_p),
        ("hidden", c_void_p),
        ("logits", c_void_p),
        ("loras", ctypes.POINTER(Lora)),
    ]
