"""Rounding with gradients on a CUDA device: values, gradients and steps are those of torch on the processor."""

from __future__ import annotations

import pytest
import torch

from qtool.formats._spelling import parse_format
from qtool.methods._fixed import FixedRounding
from qtool.methods._optimizers import optimizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("label", ["int4-g128", "int3-g64-asym", "int8-channel", "q4_k", "nf4-g64", "nvfp4", "mxfp4"])
def test_rounding_with_scales_that_stay(label: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(37, 768, generator=generator)
    fmt = parse_format(label)
    fmt = fmt.with_largest(float(w.abs().max())) if fmt.needs_largest else fmt
    params, found = fmt.fit(w), []
    begin = torch.rand(w.shape, generator=generator) * (len(fmt.levels()) + 3) - 2
    begin[0, :40] = torch.arange(40) / 2 - 1  # ties, and the ends from where on gradients are 0
    gradient = torch.randn(w.shape, generator=generator).to(dtype)
    for device in ("cpu", "cuda"):
        fixed = FixedRounding(fmt, {name: p.to(device) for name, p in params.items()})
        y = begin.to(device, copy=True).requires_grad_()
        values = fixed(y, dtype)
        values.backward(gradient.to(device))
        assert values.dtype == dtype and y.grad is not None
        found.append((values.detach().cpu(), y.grad.cpu()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][1].any() and not found[0][1].all()


def test_steps_down_signs() -> None:
    generator = torch.Generator().manual_seed(2)
    begin, gradient = torch.randn(2, 5, 1001, generator=generator)
    gradient[0] = 0
    found = []
    for device in ("cpu", "cuda"):
        leaf = begin.clone().to(device).requires_grad_()
        leaf.grad = gradient.to(device)
        optimizer("sign", [(leaf, 0.005)])(0.37)
        assert leaf.grad is None
        found.append(leaf.detach().cpu())
    assert torch.equal(*found)
    assert torch.equal(found[0][0], begin[0])
    torch.testing.assert_close((found[0] - begin)[1:].abs(), torch.full((4, 1001), 0.00185), rtol=0.01, atol=1e-6)
