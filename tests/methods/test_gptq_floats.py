"""GPTQ on floats, shared exponents and two-level scales: the same walk as on integers, through the protocol alone."""

from __future__ import annotations

import pytest
import torch

from qtool.formats._base import Format
from qtool.formats._spelling import parse_format
from qtool.methods.gptq import GPTQ
from qtool.methods.rtn import RTN
from qtool.stats.gram import Gram
from tests.methods.test_gptq import by_activation, loss, problem
from tests.reference.gptq import gptq

GAIN_DB = {  # over rounding with the same importance-weighted search: scales fixed first, scales fitted on the way
    "fp8-channel": (4.6, 4.6),
    "fp6-e2m3-g32": (3.6, 3.6),
    "fp4-g16": (3.4, 3.7),
    "fp4-channel": (4.3, 4.3),
    "fp8-block": (5.1, 4.6),
    "mxfp8": (5.0, 4.5),
    "mxfp6": (4.7, 4.3),
    "mxfp4": (4.6, 4.1),
    "mxint8": (4.6, 4.2),
    "bfp4-g16": (4.2, 3.9),
    "nvfp4": (3.3, 3.7),
    "nvfp4-minmax": (4.7, 4.7),
    "nvint4": (3.3, 3.6),
}


def known(label: str, w: torch.Tensor) -> Format:
    """A format as the pipeline gives it to methods."""
    fmt = parse_format(label)
    return fmt.with_largest(float(w.abs().max())) if fmt.needs_largest else fmt


@pytest.mark.parametrize("order", ["none", "activation"])
@pytest.mark.parametrize("label", [label for label in GAIN_DB if label != "fp8-block"])
def test_codes_equal_the_plain_loop(label: str, order: str) -> None:
    w, stats = problem()
    fmt = known(label, w)
    q = GPTQ(fit="before", rounds=0, order=order, damp=0.01).solve(w, stats, fmt).quantized
    columns = by_activation(stats) if order == "activation" else list(range(64))
    expected = gptq(w, stats[Gram].matrix, 0.01, columns, fmt, q.params)
    wrong = (q.codes != expected).sum().item()
    assert wrong <= 0.004 * w.numel()  # float32 against float64: a weight that lies between two levels may tip over


@pytest.mark.parametrize("label", GAIN_DB)
def test_output_error_is_below_rounding(label: str) -> None:
    w, stats = problem(n=128, k=256, tokens=2048)
    fmt = known(label, w)
    rounded = loss(w, RTN(importance=True).solve(w, stats, fmt).quantized, stats)
    for fit, floor in zip(("before", "walk"), GAIN_DB[label], strict=True):
        solved = GPTQ(fit=fit).solve(w, stats, fmt).quantized
        gain = 10 * torch.tensor(rounded / loss(w, solved, stats)).log10()
        assert floor <= gain <= floor + 1.0
        assert bool((solved.codes < len(fmt.levels())).all())
        shapes = {name: p.shape for name, p in fmt.fit(w).items()}
        assert {name: p.shape for name, p in solved.params.items()} == shapes


@pytest.mark.parametrize("label", ["fp4-g16", "mxfp4", "nvfp4", "bfp4-g16"])
def test_rounds_of_scales_and_codes_lower_the_objective(label: str) -> None:
    w, stats = problem(n=48, k=128, tokens=1024)
    fmt = known(label, w)
    losses = [loss(w, GPTQ(rounds=r, damp=1e-4).solve(w, stats, fmt).quantized, stats) for r in (0, 1, 2)]
    assert losses == sorted(losses, reverse=True)
    assert losses[1] < 0.97 * losses[0]


@pytest.mark.parametrize("label", GAIN_DB)
def test_rows_of_zeros_stay_zero_and_disturb_no_other(label: str) -> None:
    w, stats = problem(n=24, k=128)  # rows enough to fill vector registers
    w[::3] = 0
    fmt = known(label, w)
    found = GPTQ().solve(w, stats, fmt).quantized.decode()
    assert not found[::3].any()
    if fmt.by_rows:
        alone = torch.cat([w[1::3], w[2::3]])
        expected = GPTQ().solve(alone, stats, fmt).quantized.decode()
        assert torch.equal(torch.cat([found[1::3], found[2::3]]), expected)


def test_scales_that_rows_share_stay_shared() -> None:
    w, stats = problem(n=40, k=128)
    for label, rows in (
        ("fp8-block", 128),
        ("fp4-b16x32", 16),
        ("int4-b16x32", 16),
        ("fp8-tensor", 40),
        ("int8-tensor", 40),
    ):
        scale = GPTQ().solve(w, stats, parse_format(label)).quantized.params["scale"].float()
        for a in range(0, 40, rows):
            assert torch.equal(scale[a : a + rows], scale[a : a + 1].expand(len(scale[a : a + rows]), -1))


@pytest.mark.parametrize("constraint", ["power", "ratio"])
def test_constraints_on_scales_hold_after_the_last_round(constraint: str) -> None:
    w, stats = problem(n=24, k=128)
    fmt = parse_format("fp4-g16").model_copy(update={"constraint": constraint})
    scale = GPTQ(rounds=2).solve(w, stats, fmt).quantized.params["scale"].float()
    base = scale.amax(1, keepdim=True) if constraint == "ratio" else 1.0
    assert bool(((scale / base).frexp().mantissa == 0.5).all())
    if constraint == "ratio":
        assert bool((scale.frexp().mantissa != 0.5).any())
