"""llama.cpp's library for pictures (mtmd) by ctypes: what it makes of a picture.

https://github.com/ggml-org/llama.cpp/blob/master/tools/mtmd/mtmd.h. Parameters are the library's own defaults, handed
back to it as they are.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np

from qtool.evaluate.llama_api import Runtime, library

POINTER, IMAGE = ctypes.c_void_p, 1


class Params(ctypes.Structure):
    """`mtmd_context_params`, with room for what it grows by."""

    _fields_ = (("all", ctypes.c_uint64 * 64),)


class Text(ctypes.Structure):
    """`mtmd_input_text`."""

    _fields_ = (("text", ctypes.c_char_p), ("add_special", ctypes.c_bool), ("parse_special", ctypes.c_bool))


def embeddings(model: Path, beside: Path, pixels: np.ndarray, width: int) -> np.ndarray:
    """float32 [tokens, width] of a picture, uint8 [H, W, 3], by the vision tower beside a model."""
    lib, runtime = library(), Runtime(model, 256, 1)
    for name in ("init_from_file", "bitmap_init", "input_chunks_init", "input_chunks_get"):
        getattr(lib, f"mtmd_{name}").restype = POINTER
    lib.mtmd_context_params_default.restype, lib.mtmd_default_marker.restype = Params, ctypes.c_char_p
    lib.mtmd_get_output_embd.restype = ctypes.POINTER(ctypes.c_float)
    for name in ("input_chunks_size", "input_chunk_get_n_tokens"):
        getattr(lib, f"mtmd_{name}").restype = ctypes.c_size_t
    context = lib.mtmd_init_from_file(str(beside).encode(), runtime.model, lib.mtmd_context_params_default())
    assert context, f"mtmd does not load {beside}"
    context, chunks = POINTER(context), POINTER(lib.mtmd_input_chunks_init())
    height, wide, _ = pixels.shape
    bitmap = POINTER(lib.mtmd_bitmap_init(ctypes.c_uint32(wide), ctypes.c_uint32(height), pixels.tobytes()))
    text = Text(lib.mtmd_default_marker(), False, True)
    assert lib.mtmd_tokenize(context, chunks, ctypes.byref(text), (POINTER * 1)(bitmap), ctypes.c_size_t(1)) == 0
    found = []
    for i in range(lib.mtmd_input_chunks_size(chunks)):
        chunk = POINTER(lib.mtmd_input_chunks_get(chunks, ctypes.c_size_t(i)))
        if lib.mtmd_input_chunk_get_type(chunk) == IMAGE:
            assert lib.mtmd_encode_chunk(context, chunk) == 0
            shape = lib.mtmd_input_chunk_get_n_tokens(chunk), width
            found.append(np.ctypeslib.as_array(lib.mtmd_get_output_embd(context), shape).copy())
    lib.mtmd_input_chunks_free(chunks)
    lib.mtmd_bitmap_free(bitmap)
    lib.mtmd_free(context)
    return np.concatenate(found)
