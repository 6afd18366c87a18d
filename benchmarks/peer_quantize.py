"""What llama-quantize does once it has read its arguments, by ggml's own functions: what qtool is held against.

    python peer_quantize.py F16.gguf LIKE.gguf OUT.gguf THREADS [IMATRIX.gguf]

Takes every tensor of LIKE.gguf from F16.gguf, in the type that it has there, and prints the seconds: from 16 bits to
float32 by numpy, from there by `ggml_quantize_chunk` on all threads, to the file in one piece each. Imports, the choice
of types and the loading of the library do not count. https://github.com/ggml-org/llama.cpp, src/llama-quant.cpp
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from gguf import GGUFReader, ReaderTensor
from xllamacpp import __file__ as package

PLAIN = ("F32", "F16", "BF16")
ROWS = 64
"""Rows that a thread takes at once."""


def importances(path: str | None) -> Mapping[str, np.ndarray]:
    """float32 [K] by the weight's name."""
    if path is None:
        return {}
    found = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    names = [name.removesuffix(".in_sum2") for name in found if name.endswith(".in_sum2")]
    return {name: np.float32(found[f"{name}.in_sum2"] / found[f"{name}.counts"]).reshape(-1) for name in names}


class Encoder:
    """ggml's encoder of whole matrices on some threads."""

    def __init__(self, threads: int) -> None:
        library = ctypes.CDLL(str(next(Path(package).parent.glob("xllamacpp*.so"))))
        self.chunk, self.pool = library.ggml_quantize_chunk, ThreadPoolExecutor(threads)
        self.chunk.restype = ctypes.c_size_t

    def __call__(self, w: np.ndarray, like: ReaderTensor, importance: np.ndarray | None) -> np.ndarray:
        """uint8 [N, bytes of a row] of w, float16 [N, K]."""
        (n, k), packed = w.shape, np.empty(like.data.shape, np.uint8)
        weights = None if importance is None else ctypes.c_void_p(importance.ctypes.data)

        def rows(start: int) -> None:
            count = min(ROWS, n - start)
            part = np.ascontiguousarray(w[start : start + count], np.float32)
            places = ctypes.c_void_p(part.ctypes.data), ctypes.c_void_p(packed[start:].ctypes.data)
            sizes = (ctypes.c_int64(0), ctypes.c_int64(count), ctypes.c_int64(k))
            self.chunk(int(like.tensor_type), *places, *sizes, weights)

        list(self.pool.map(rows, range(0, n, ROWS)))
        return packed


def main(source: str, like: str, out: str, threads: str, imatrix: str | None = None) -> None:
    """Writes the file and prints the seconds."""
    encoder, wanted = Encoder(int(threads)), GGUFReader(like)
    header = wanted.tensors[0].data_offset
    start = time.perf_counter()
    originals = {tensor.name: tensor for tensor in GGUFReader(source).tensors}
    given = importances(imatrix)
    with open(like, "rb") as head, open(out, "wb") as file:
        file.write(head.read(header))
        for tensor in wanted.tensors:
            file.seek(tensor.data_offset)
            data = originals[tensor.name].data
            if tensor.tensor_type.name not in PLAIN:
                data = encoder(data, tensor, given.get(tensor.name))
            file.write(np.ascontiguousarray(data).tobytes())
    print(time.perf_counter() - start)


if __name__ == "__main__":
    main(*sys.argv[1:])
