"""The whole way from safetensors to a Q4_K_M file, against conversion and llama-quantize on as many threads.

Ours is one command as a whole process, verification and report included. Theirs is the conversion to F16 and the
encoding (benchmarks/peer_quantize.py), without start-up. Since convert_hf_to_gguf.py is in no package, our own F16 file
without verification stands for the conversion, which is a lower bound: that script reads and writes the same bytes with
the same libraries, and converts more slowly.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.measure import measure
from benchmarks.mixes import calibrated_on, only, run

KEEP = 'recipe: 1\nname: f16\nlayers:\n  - {match: "*", keep: f16}\nexport: [{to: gguf}]\n'


def whole(qtool: Sequence[str], model: Path, work: Path, calibration: str) -> Iterator[tuple[str, float]]:
    """Seconds of both and their ratio, without data and with an importance matrix.

    Args:
        qtool: how the program is called.
        model: a checkpoint whose rows are multiples of 256.
        work: where files go.
        calibration: what the matrix is measured on.
    """
    matrix, recipe = work / "whole.imatrix.gguf", work / "f16.yaml"
    flags = calibrated_on(calibration, samples=16, length=512)
    run([*qtool, "calibrate", model, "-r", "gguf-q4_k_m", "-o", matrix, "--overwrite", *flags])
    recipe.write_text(KEEP, encoding="utf-8")
    command = [*qtool, "quantize", model, "--quiet", "--overwrite"]
    log = work / "whole.log"
    converted = measure([*command, "-r", recipe, "-o", work / "f16", "--no-verify"], log).seconds
    yield "convert_seconds", converted
    for name, ours, theirs in (
        ("data-free", ["--set", "method=rtn"], []),
        ("imatrix", ["--imatrix", matrix], [matrix]),
    ):
        out = work / f"whole-{name}"
        seconds = measure([*command, "-r", "gguf-q4_k_m", "-o", out, *ours], log).seconds
        peer = [Path(__file__).with_name("peer_quantize.py"), only(work / "f16"), only(out), work / "peer.gguf"]
        threads = str(torch.get_num_threads())
        done = subprocess.run([sys.executable, *peer, threads, *theirs], check=True, capture_output=True, text=True)
        encoded = float(done.stdout)
        yield f"{name}_seconds", seconds
        yield f"{name}_ggml_seconds", encoded
        yield f"{name}_time_ratio", seconds / (converted + encoded)
