"""A table of latencies for budgets: microseconds that llama.cpp takes for a token and a million weights, by K-quant.

The demo model in rows of whole blocks is rounded to one format, and writes tokens. What it takes beside its matrices
(attention, norms) is the same for all formats and small, and counts as theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.mixes import only, run
from qtool.evaluate.llamacpp import speed_of

FORMATS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q8_0")
RUNS = 3
RECIPE = """\
recipe: 1
name: FORMAT
layers: [{match: "role:embedding", weights: FORMAT}, {match: "*", weights: FORMAT}]
export: [{to: gguf}]
"""


def times(qtool: Sequence[str], model: Path, work: Path, weights: int) -> Iterator[tuple[str, float]]:
    """Formats, and microseconds for a million weights, of the quickest of some runs.

    Args:
        qtool: command.
        model: folder; embedding and output layer share a matrix.
        work: folder for files.
        weights: of all matrices.
    """
    for label in FORMATS:
        recipe, out = work / f"latency-{label}.yaml", work / f"latency-{label}"
        recipe.write_text(RECIPE.replace("FORMAT", label), encoding="utf-8")
        if not out.exists():
            run([*qtool, "quantize", model, "-r", recipe, "-o", out, "--set", "method=rtn"])
        quickest = max(speed_of(only(out)).written for _ in range(RUNS))
        yield label, 1e6 / quickest / (weights / 1e6)
