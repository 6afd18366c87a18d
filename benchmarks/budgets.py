"""Budgets against the mixes they are as large as: KL divergence at the same size, and what another budget costs.

For every mix two files by GPTQ on the same tokens: the mix itself, and its `-fit` sibling, which is no larger. Before,
`qtool plan` divides one budget with nothing known, then ten between the smallest file and the largest.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

from benchmarks.mixes import calibrated_on, divergence, only, run

MIXES = ("q4_k_m", "q3_k_m", "q2_k")
SAMPLES, LENGTH = 32, 512
DIVIDING = {"budget.samples": 4, "budget.held_out": 8, "budget.swaps": 0, "budget.confirm": "false"}
"""Half the samples that recipes say, and costs believed, for time's sake."""


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


class Place(NamedTuple):
    """Where commands run: a device, and how many at a time."""

    device: str = "cpu"
    processes: int = 1


def siblings(
    qtool: Sequence[str],
    model: Path,
    work: Path,
    calibration: str,
    texts: dict[str, Path],
    chunks: int,
    place: Place,
    mixes: Sequence[str] = MIXES,
) -> Iterator[Row]:
    """Quantizes and evaluates mixes and their siblings.

    Raises:
        SystemExit: a file is larger than the mix.
    """
    on, flags = ["--device", place.device], calibrated_on(calibration, SAMPLES, LENGTH)
    fewer = [part for key, value in DIVIDING.items() for part in ("--set", f"{key}={value}")]

    def written(name: str) -> Path:
        scores = [*fewer, "--scores", work / f"{name}.scores"] if name.endswith("-fit") else []
        run([*qtool, "quantize", model, "-r", name, "-o", work / name, "--overwrite", *flags, *on, *scores])
        return only(work / name)

    def judged(case: tuple[Path, Path]) -> float:
        return divergence(qtool, case[0], model, case[1], chunks, place.device)

    names = [f"gguf-{mix}{suffix}" for mix in mixes for suffix in ("", "-fit")]
    with ThreadPoolExecutor(place.processes) as pool:
        files = list(pool.map(written, names))
        found = pool.map(judged, product(files, texts.values()))
        klds = {(file, text): kld for (file, text), kld in zip(product(files, texts), found, strict=True)}
    for mix, own, fit in zip(mixes, files[::2], files[1::2], strict=True):
        sizes = own.stat().st_size, fit.stat().st_size
        if sizes[1] > sizes[0] + 32:  # the name of the recipe inside, padded
            raise SystemExit(f"gguf-{mix}-fit: wanted at most {sizes[0]} bytes, found {sizes[1]}")
        for text in texts:
            yield Row(mix, text, *sizes, klds[own, text], klds[fit, text])


def another(qtool: Sequence[str], model: Path, work: Path, calibration: str) -> Iterator[tuple[str, float]]:
    """Seconds of one budget with nothing known, of ten more, and of one that is measured as well."""
    flags, scores = calibrated_on(calibration, SAMPLES, LENGTH), work / "ten.scores"
    scores.unlink(missing_ok=True)
    plan = [*qtool, "plan", model, "-r", "gguf-fit", "--scores", scores, *flags]
    seconds = [timed([*plan, *extra]) for extra in (("--bits", "4.25"), ("--curve",), ("--bits", "5"))]
    yield from zip(("one_seconds", "ten_more_seconds", "measured_seconds"), seconds, strict=True)
    yield "ten_over_one", sum(seconds[:2]) / seconds[0]


def timed(command: Sequence[str | Path]) -> float:
    """Seconds of a command."""
    begin = time.perf_counter()
    run(command)
    return time.perf_counter() - begin
