"""What transforms are worth on the demo model off any grid, and with outliers in its activations."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import models
from qtool.pipeline.events import silent
from qtool.pipeline.prepare import prepare
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.pipeline.transform import transformed
from scripts.prose import prose


@pytest.fixture(scope="module")
def divergence(off_grid_demo: Path, short_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., float]:
    """Mean KL divergence of a recipe's result, on two chunks of 256 tokens unless asked otherwise."""
    work = tmp_path_factory.mktemp("transforms")
    (text := work / "prose.txt").write_text(prose()[:20000], encoding="utf-8")
    folders = {
        "plain": off_grid_demo,
        "outliers": models.off_grid(short_demo, work / "outliers", outliers=30),
    }

    def measure(variant: str, recipe: str, *overrides: str) -> float:
        asked: tuple[Any, ...] = (
            "calibration={data: builtin, samples: 8, length: 256}",
            f"eval={{text: {text}, context: 256, chunks: 2}}",
            "export=[{to: qtool}]",
        )
        options = QuantizeOptions(str(folders[variant]), recipe, work / "out", (*asked, *overrides), overwrite=True)
        (found,) = run(options).evaluations
        assert found.kld_mean is not None
        return found.kld_mean

    return measure


@pytest.mark.demo
@pytest.mark.slow
def test_scaled_weights_are_rounded_better_at_four_bits(divergence: Callable[..., float]) -> None:
    """Every fourth of thirty blocks is rounded; what the first eight alone predict does not tell one from the other."""
    some = '{match: "*", blocks: every 4th, weights: int4-g64}'
    asked = (
        f"layers=[{{match: lm_head, keep: true}}, {some}, {{match: '*', keep: true}}]",
        "calibration.samples=4",
        "eval.chunks=1",
    )
    plain = divergence("plain", "w4a16-rtn-g64", *asked)
    assert 0.1 < plain < 1
    assert divergence("plain", "w4a16-awq", *asked) < 0.6 * plain  # measured: 0.50


@pytest.mark.demo
@pytest.mark.slow
def test_awq_s_search_takes_less_than_a_minute_on_two_cores(short_demo: Path, tmp_path: Path) -> None:
    """44 seconds of processor time for thirty blocks, these are eight; what else the machine does is left out."""
    model = models.off_grid(short_demo, tmp_path / "plain")
    job = prepare(str(model), "w4a16-awq", ("calibration.samples=16", "calibration.length=512"), device="cpu")
    begin = time.process_time()
    _, made = transformed(job, tmp_path, None, silent)
    assert time.process_time() - begin < 32
    assert len(made.edits) == 8 * 4


@pytest.mark.demo
@pytest.mark.slow
def test_smoothing_takes_away_what_outliers_of_inputs_cost(divergence: Callable[..., float]) -> None:
    weights_only = divergence("outliers", "w8a16")
    assert divergence("outliers", "w8a8-int8") > 5 * weights_only
    assert divergence("outliers", "w8a8-int8-smooth") < 1.2 * weights_only
