"""The structs of decode.cpp, cache.h and product.h, field by field."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from eesd.models.transformer import LayerCaches


class Matrix(Structure):
    _fields_ = [("data", c_void_p), ("bias", c_void_p), ("outputs", c_int32), ("inputs", c_int32), ("format", c_int32)]


class Layer(Structure):
    _fields_ = [(name, Matrix) for name in ("qkv", "o", "gate_up", "down")] + [
        (name, c_void_p) for name in ("attn_norm", "mlp_norm", "q_norm", "k_norm")
    ]


class Shape(Structure):
    _fields_ = [(name, c_int32) for name in ("hidden", "heads", "kv_heads", "dim", "intermediate")] + [
        ("eps", c_float),
        ("is_bf16", c_int32),
    ]


class Call(Structure):
    _fields_ = [
        ("input", c_void_p),
        ("output", c_void_p),
        ("batch", c_int32),
        ("seq", c_int32),
        ("window", c_int32),
        ("slots", c_void_p),
        ("positions", c_void_p),
        ("mask", c_void_p),
        ("mask_stride", c_int64),
        ("cosine", c_void_p),
        ("sine", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_layer", c_int64),
        ("key_batch", c_int64),
        ("key_head", c_int64),
        ("threads", c_int32),
    ]


class Exit(Structure):
    _fields_ = [("layer", Layer), ("fuse", Matrix), ("estimate", Matrix), ("norm", c_void_p)]


class Drafting(Structure):
    _fields_ = [
        ("shape", POINTER(Shape)),
        ("layers", c_void_p),
        ("exit", POINTER(Exit)),
        ("head", POINTER(Matrix)),
        ("embedding", c_void_p),
        ("count", c_int32),
    ]


class Passing(Structure):
    _fields_ = [
        ("shape", POINTER(Shape)),
        ("layers", c_void_p),
        ("head", POINTER(Matrix)),
        ("norm", c_void_p),
        ("eps", c_float),
        ("embedding", c_void_p),
        ("count", c_int32),
        ("cut", c_int32),
    ]


def call_on(window: int | None, caches: LayerCaches, angles: tuple[Tensor, Tensor]) -> Call:
    """A call on these caches, still without rows, of the threads that torch uses; angles: cos and sin of `Rotary`."""
    width = caches.keys.element_size()
    key_layer, key_batch, key_head = caches.keys.stride()[:3]
    return Call(
        window=window or 0,
        cosine=angles[0].data_ptr(),
        sine=angles[1].data_ptr(),
        keys=caches.keys.data_ptr(),
        values=caches.values.data_ptr(),
        key_layer=key_layer * width,
        key_batch=key_batch,
        key_head=key_head,
        threads=torch.get_num_threads(),
    )
