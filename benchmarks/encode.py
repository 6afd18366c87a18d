"""Encoders of GGUF block types against ggml's own, on matrices of the demo model with an importance matrix.

Both run on the same cores and as many threads as torch takes: from float32 in memory to the bytes of the file. ggml is
called through the shared object that the package xllamacpp brings (https://github.com/ggml-org/llama.cpp). The error is
the weighted squared error of the decoded weights, and counts channels as the importance matrix does.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.mixes import calibrated_on, run
from qtool import registry
from qtool.checkpoint.open import open_checkpoint
from qtool.evaluate.llama_api import library
from qtool.formats._ggml import BlockFormat
from qtool.numerics.threads.parallel import over_rows, side_by_side
from qtool.pipeline.solve import rows_abreast
from qtool.store.imatrix import read_imatrix

REPEATS = 3
MATRICES = {"mlp.down_proj": "ffn_down", "mlp.gate_proj": "ffn_gate"}
"""Of the block in the middle: name in the checkpoint, and in GGUF files."""
WIDEST = 256
"""Columns of the largest block; what is left of a row is cut off."""


class Line(NamedTuple):
    """One setting against ggml: times in nanoseconds per weight, the error over ggml's."""

    label: str
    bits: float
    ours: float
    ggml: float
    error: float

    def __str__(self) -> str:
        ratio = self.ours / self.ggml
        return f"{self.label:18} {self.bits:7.4f} {self.ours:8.1f} {self.ggml:8.1f} {ratio:8.2f} {self.error:8.4f}"


HEADER = f"{'type':18} {'bits':>7} {'ns/w':>8} {'ggml':>8} {'time':>8} {'error':>8}"


def encode(qtool: list[str], model: Path, work: Path, calibration: str) -> Iterator[Line]:
    """Every registered block type, searched fast and by default."""
    matrices = list(weights(qtool, model, work, calibration))
    for name in registry.names("formats"):
        family = registry.load("formats", name)
        if not issubclass(family, BlockFormat):
            continue
        theirs = [ggml(w, importance, family()) for w, importance in matrices]
        for search in ("fast", "default"):
            yield line(family(search=search), matrices, theirs)


def weights(qtool: list[str], model: Path, work: Path, calibration: str) -> Iterator[tuple[Tensor, Tensor]]:
    """(float32 [N, K], importance float32 [K]) of some matrices."""
    imatrix = work / "imatrix.gguf"
    if not imatrix.exists():
        flags = calibrated_on(calibration, samples=16, length=512)
        run([*qtool, "calibrate", model, "-r", "gguf-q4_0", "-o", imatrix, *flags])
    entries = read_imatrix(imatrix).entries
    checkpoint = open_checkpoint(str(model))
    block = checkpoint.config["num_hidden_layers"] // 2
    for module, stored in MATRICES.items():
        w = checkpoint.tensor(f"model.layers.{block}.{module}.weight").float()
        entry = entries[f"blk.{block}.{stored}.weight"]
        k = w.shape[1] // WIDEST * WIDEST
        yield w[:, :k].contiguous(), (entry.sums[0] / entry.counts[0])[:k].contiguous()


def line(fmt: BlockFormat, matrices: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, float]]) -> Line:
    """Measures one setting."""
    seconds = ggml_seconds = error = 0.0
    for (w, importance), (packed, ggml_time) in zip(matrices, theirs, strict=True):

        def rows(part: tuple[int, int], w: Tensor = w, importance: Tensor = importance) -> Tensor:
            params = fmt.fit(w[slice(*part)], importance)
            return fmt.pack(fmt.snap(w[slice(*part)], params, importance), params)

        def work(w: Tensor = w, rows: Callable[[tuple[int, int]], Tensor] = rows) -> Tensor:
            return torch.cat(side_by_side(rows, rows_abreast(w, fmt, None)))  # as the pipeline does

        ours, best = timed(work)
        seconds, ggml_seconds = seconds + best, ggml_seconds + ggml_time
        given = fmt.fit(w, importance).get(fmt.matrix_scale or "", torch.ones(1))[0]  # of ours; ggml has none
        found = weighted_error(fmt, ours, w, importance, float(given))
        error += found / weighted_error(fmt, packed, w, importance) / len(matrices)
    count = sum(w.numel() for w, _ in matrices)
    bits = fmt.storage_bits(1, WIDEST) / WIDEST
    return Line(fmt.label, bits, seconds / count * 1e9, ggml_seconds / count * 1e9, error)


def ggml(w: Tensor, importance: Tensor, fmt: BlockFormat) -> tuple[Tensor, float]:
    """(bytes by ggml's encoder, uint8 [N, bytes of a row]; seconds)."""
    n, k = w.shape
    packed = torch.zeros(n, k // fmt.columns * fmt.block_bytes, dtype=torch.uint8)
    chunk = library().ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (w, packed, importance)]

    def rows(start: int, stop: int) -> None:
        sizes = (ctypes.c_int64(start * k), ctypes.c_int64(stop - start), ctypes.c_int64(k))
        chunk(fmt.ggml_type, pointers[0], pointers[1], *sizes, pointers[2])

    return packed, timed(lambda: over_rows(rows, n))[1]


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """(result, seconds of the quickest of some runs, after one that compiles)."""
    result, best = work(), float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return result, best


def weighted_error(fmt: BlockFormat, packed: Tensor, w: Tensor, importance: Tensor, scale: float = 1.0) -> float:
    """Squared error of the weights that a runtime decodes, which multiplies them by the scale of the matrix."""
    return float(((fmt.decode(*fmt.unpack(packed)) * scale - w).square() * importance).double().sum())
