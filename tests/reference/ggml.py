"""ggml's own encoders and decoders, as the shared object of xllamacpp exports them."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from qtool.evaluate.llama_api import library

FLOAT_P = ctypes.POINTER(ctypes.c_float)


def ggml_quantize(w: Tensor, ggml_type: int, row_bytes: int, importance: Tensor | None = None) -> Tensor:
    """uint8 [N, row_bytes] by ggml's own encoder."""
    values = np.ascontiguousarray(w.numpy())
    packed = np.zeros((values.shape[0], row_bytes), np.uint8)
    chunk = library().ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    weights = None if importance is None else importance.contiguous().numpy().ctypes.data_as(FLOAT_P)
    sizes = (ctypes.c_int64(0), ctypes.c_int64(values.shape[0]), ctypes.c_int64(values.shape[1]))
    written = chunk(ggml_type, values.ctypes.data_as(FLOAT_P), packed.ctypes.data_as(ctypes.c_void_p), *sizes, weights)
    assert written == packed.size
    return torch.from_numpy(packed)


def ggml_dequantize(packed: Tensor, name: str, k: int) -> Tensor:
    """float32 [N, K] by ggml's own decoder."""
    source = np.ascontiguousarray(packed.numpy())
    out = np.zeros((source.shape[0], k), np.float32)
    decode = getattr(library(), f"dequantize_row_{name.removesuffix('_k') + '_K' * name.endswith('_k')}")
    decode.restype = None
    decode(source.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(FLOAT_P), ctypes.c_int64(out.size))
    return torch.from_numpy(out)
