"""What no format may fail at: weights and importances beyond all sense, codes and scales that no fit has made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool import registry
from qtool.errors import NumericsError
from qtool.formats._base import Format
from qtool.formats._spelling import parse_format

OPTIONS = {
    "int": ("int4-g128", "int8-channel", "int4-g64-asym"),
    "fp": ("fp8-channel", "fp8-tensor", "fp4-g16"),
    "biased": ("biased4-g64",),
    "qoq": ("qoq-g128",),
    "bfp": ("bfp4-g16",),
    "bilevel": ("bilevel3-g16",),
    "lut": ("nf4-g64", "ternary-g64"),
    "codeless": (),
}
"""Of formats that have no meaning without; one has nothing that could err."""
LABELS = [label for name in registry.names("formats") for label in OPTIONS.get(name, (name,))]
K = 256


def weights() -> Tensor:
    return torch.randn(3, K, generator=torch.Generator().manual_seed(0))


def relative_error(fmt: Format, w: Tensor, importance: Tensor | None = None) -> float:
    params = fmt.fit(w, importance)
    w_hat = fmt.decode(fmt.snap(w, params, importance), params)
    return float((w_hat.double() - w.double()).square().sum() / w.double().square().sum())


@pytest.mark.parametrize("label", LABELS)
def test_huge_weights_are_refused_or_held(label: str) -> None:
    w, fmt = weights(), parse_format(label)
    one = w.clone()
    one[1, 7] = -3e38
    for huge in (w.sign() * 3e38, one, w * 1e20):
        try:
            assert relative_error(fmt, huge) < 1
        except NumericsError as error:
            assert "too large" in str(error) or "at most" in str(error)


@pytest.mark.parametrize("label", LABELS)
def test_weights_next_to_nothing_become_no_more_than_that(label: str) -> None:
    for size in (1e-30, 1e-41):
        assert relative_error(parse_format(label), weights() * size) <= 1.0001


@pytest.mark.parametrize("label", LABELS)
def test_importances_may_have_any_size(label: str) -> None:
    """A factor says nothing; none at all count as all alike."""
    fmt, w = parse_format(label), weights() * 0.02
    importance = torch.rand(K, generator=torch.Generator().manual_seed(1)) + 0.5
    usual = relative_error(fmt, w, importance)
    for factor in (2.0**124, 2.0**-120):
        assert relative_error(fmt, w, importance * factor) == pytest.approx(usual, rel=1e-3)
    assert relative_error(fmt, w, torch.zeros(K)) == pytest.approx(relative_error(fmt, w, torch.ones(K)), rel=1e-3)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0])
def test_importances_that_are_none_are_refused(label: str, bad: float) -> None:
    importance = torch.ones(K)
    importance[7] = bad
    with pytest.raises(NumericsError, match=r"importances of inputs: wanted finite numbers from 0 on, found"):
        parse_format(label).fit(weights() * 0.02, importance)


@pytest.mark.parametrize("label", LABELS)
def test_codes_and_scales_that_no_fit_has_made_are_read_within_bounds(label: str) -> None:
    fmt, w = parse_format(label), weights() * 0.02
    params = fmt.fit(w)
    count = len(fmt.levels())
    decoded = fmt.decode(torch.full(w.shape, 255, dtype=torch.uint8), params)
    assert decoded.shape == w.shape
    for bad in (torch.nan, torch.inf, 0.0):
        hostile = {n: torch.full_like(p, bad) if p.is_floating_point() else p for n, p in params.items()}
        codes = fmt.snap(w, hostile)
        assert codes.shape == w.shape
        assert bad != 0.0 or int(codes.max()) < count
    assert fmt.snap(torch.full_like(w, torch.nan), params).shape == w.shape
