"""The structs of decode.cpp and attention.h, field by field."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p


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
        ("key_dim", c_int64),
        ("threads", c_int32),
    ]


class Exit(Structure):
    _fields_ = [("layer", Layer), ("fuse", Matrix), ("estimate", Matrix), ("norm", c_void_p)]
