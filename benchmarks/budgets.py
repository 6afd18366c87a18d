"""Budgets against the mixes they are as large as: KL divergence at the same size, and what another budget costs.

For every mix two files by GPTQ on the same tokens: the mix itself, and its `-fit` sibling, which is no larger. Then
`qtool plan` divides ten budgets between the smallest and the largest file, the first with nothing known.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.mixes import calibrated_on, divergence, only, run

MIXES = ("q4_k_m", "q3_k_m", "q2_k")
SAMPLES, LENGTH = 32, 512
BUDGETS = 10


class Row(NamedTuple):
    """One mix on one text: sizes in bytes, and mean KL divergence of both files."""

    mix: str
    text: str
    mix_bytes: int
    fit_bytes: int
    mix_kld: float
    fit_kld: float

    def __str__(self) -> str:
        sizes = f"{self.mix_bytes:13,} {self.fit_bytes:13,}"
        return f"{self.mix:8} {self.text:10} {sizes} {self.mix_kld:8.4f} {self.fit_kld:8.4f} {self.ratio:6.2f}"

    @property
    def ratio(self) -> float:
        """Of divergences: below 1 where dividing the bytes anew was worth it."""
        return self.fit_kld / self.mix_kld


HEADER = f"{'mix':8} {'text':10} {'bytes':>13} {'fit bytes':>13} {'KLD':>8} {'fit KLD':>8} {'ratio':>6}"


def siblings(
    qtool: Sequence[str], model: Path, work: Path, calibration: str, texts: dict[str, Path], chunks: int
) -> Iterator[Row]:
    """Quantizes and evaluates every mix and its sibling.

    Raises:
        SystemExit: a file is larger than the mix.
    """
    flags, scores = calibrated_on(calibration, SAMPLES, LENGTH), work / "budgets.scores"
    for mix in MIXES:
        files = {}
        for name, extra in ((f"gguf-{mix}", []), (f"gguf-{mix}-fit", ["--scores", scores])):
            run([*qtool, "quantize", model, "-r", name, "-o", work / name, "--overwrite", *flags, *extra])
            files[name] = only(work / name)
        sizes = [file.stat().st_size for file in files.values()]
        if sizes[1] > sizes[0] + 32:  # the name of the recipe inside, padded
            raise SystemExit(f"gguf-{mix}-fit: wanted at most {sizes[0]} bytes, found {sizes[1]}")
        for name, text in texts.items():
            found = [divergence(qtool, file, model, text, chunks) for file in files.values()]
            yield Row(mix, name, *sizes, *found)


def another(qtool: Sequence[str], model: Path, work: Path, calibration: str) -> Iterator[tuple[str, float]]:
    """Seconds of planning for one budget, and for ten."""
    flags, scores = calibrated_on(calibration, SAMPLES, LENGTH), work / "ten.scores"
    scores.unlink(missing_ok=True)
    begin = time.perf_counter()
    for i in range(BUDGETS):
        bits = 3.5 + 3 * i / (BUDGETS - 1)
        run([*qtool, "plan", model, "-r", "gguf-fit", "--bits", f"{bits:.3f}", "--scores", scores, *flags])
        if i == 0:
            yield "one_seconds", (one := time.perf_counter() - begin)
    yield "ten_seconds", (ten := time.perf_counter() - begin)
    yield "ten_over_one", ten / one
