from __future__ import annotations

import torch

from qtool.numerics.product import float32_product


def test_slices_make_the_whole_product() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 24, generator=generator).bfloat16() for n in (5, 50))
    found = float32_product(x, w, 24 * 7)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), x.double() @ w.double().T, rtol=1e-5, atol=1e-5)
