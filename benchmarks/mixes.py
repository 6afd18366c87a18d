"""Whole GGUF files against llama-quantize's: KL divergence of files of the same types, hence the same size.

For every mix there are three files: ours as shipped (GPTQ), ours rounded with an importance matrix, and ggml's, which
is ours with the bytes of each tensor replaced by those that ggml's own encoder gives with the same matrix. That is
what llama-quantize writes, since mixes and fallbacks are its own (tests/test_mixes.py).
"""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import GGUFReader

from qtool.evaluate.llama_api import library
from qtool.store.imatrix import ImportanceEntry, read_imatrix

MIXES = ("q4_k_m", "q4_k_s", "q3_k_m", "q2_k", "iq4_xs")
SAMPLES, LENGTH = 64, 512
PLAIN = {"F32", "F16", "BF16"}
KEEP = "recipe: 1\nname: f32\nlayers: [{match: 're:.*', keep: f32}]\nexport: [{to: gguf}]\n"


class Row(NamedTuple):
    """One mix: mean KL divergence of each file, by text."""

    mix: str
    megabytes: float
    text: str
    gptq: float
    rtn: float
    ggml: float

    def __str__(self) -> str:
        ratios = f"{self.gptq / self.ggml:7.2f} {self.rtn / self.ggml:7.2f}"
        divergences = f"{self.gptq:8.4f} {self.rtn:8.4f} {self.ggml:8.4f}"
        return f"{self.mix:8} {self.megabytes:7.1f} {self.text:10} {divergences} {ratios}"


HEADER = f"{'mix':8} {'MB':>7} {'text':10} {'GPTQ':>8} {'RTN':>8} {'ggml':>8} {'GPTQ/':>7} {'RTN/':>7}"


def mixes(
    qtool: Sequence[str], model: Path, work: Path, calibration: str, texts: dict[str, Path], chunks: int
) -> Iterator[Row]:
    """Quantizes and evaluates every mix on every text."""
    flags = calibrated_on(calibration, SAMPLES, LENGTH)
    matrix, recipe = work / "mixes.imatrix.gguf", work / "f32.yaml"
    run([*qtool, "calibrate", model, "-r", "gguf-q4_k_m", "-o", matrix, "--overwrite", *flags])
    recipe.write_text(KEEP)
    run([*qtool, "quantize", model, "-r", recipe, "-o", work / "f32", "--overwrite"])
    source, importance = only(work / "f32"), read_imatrix(matrix).entries
    for mix in MIXES:
        files = {}
        for method, extra in (("gptq", flags), ("rtn", ["--imatrix", matrix])):
            out = work / f"{mix}-{method}"
            run([*qtool, "quantize", model, "-r", f"gguf-{mix}", "-o", out, "--overwrite", *extra])
            files[method] = only(out)
        files["ggml"] = work / f"{mix}-ggml.gguf"
        shutil.copy(files["rtn"], files["ggml"])
        encode_by_ggml(files["ggml"], source, importance)
        for name, text in texts.items():
            found = {method: divergence(qtool, file, model, text, chunks) for method, file in files.items()}
            yield Row(mix, files["ggml"].stat().st_size / 1e6, name, found["gptq"], found["rtn"], found["ggml"])


def calibrated_on(data: str, samples: int, length: int) -> list[str]:
    """Flags that set a recipe's calibration: a token source, sequences, and tokens of each."""
    settings = {"data": data, "samples": samples, "length": length}
    return [flag for key, value in settings.items() for flag in ("--set", f"calibration.{key}={value}")]


def run(command: Sequence[str | Path]) -> None:
    """Runs a command to its end; what it prints is shown if it fails."""
    done = subprocess.run([*command, "--quiet"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}: {' '.join(map(str, command))}\n{done.stderr[-2000:]}")


def only(folder: Path) -> Path:
    """The GGUF file in a folder."""
    (file,) = folder.glob("*.gguf")
    return file


def encode_by_ggml(file: Path, source: Path, importance: dict[str, ImportanceEntry]) -> None:
    """Replaces the bytes of a file's quantized tensors by ggml's encoding of a float32 file's."""
    originals = {tensor.name: tensor for tensor in GGUFReader(source).tensors}
    chunk = library().ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    for tensor in GGUFReader(file, "r+").tensors:
        if tensor.tensor_type.name in PLAIN:
            continue
        w = np.ascontiguousarray(originals[tensor.name].data, np.float32)
        entry = importance.get(tensor.name)
        weights = None if entry is None else np.ascontiguousarray(entry.sums[0] / entry.counts[0], np.float32)
        packed = np.empty(tensor.data.nbytes, np.uint8)
        sizes = (ctypes.c_int64(0), ctypes.c_int64(w.shape[0]), ctypes.c_int64(w.shape[1]))
        start, end, counts = (None if a is None else ctypes.c_void_p(a.ctypes.data) for a in (w, packed, weights))
        chunk(int(tensor.tensor_type), start, end, *sizes, counts)
        tensor.data[...] = packed.view(tensor.data.dtype).reshape(tensor.data.shape)


def divergence(
    qtool: Sequence[str], artifact: Path, baseline: Path, text: Path, chunks: int, device: str = "cpu"
) -> float:
    """Mean KL divergence per token, nats."""
    flags = ["--baseline", baseline, "--text", text, "--chunks", str(chunks), "--device", device, "--json", "--quiet"]
    done = subprocess.run([*qtool, "eval", artifact, *flags], check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout)["kld_mean"])
