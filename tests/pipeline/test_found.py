"""Matrices that were found, decoded several at a time and copied in one piece."""

from __future__ import annotations

import pytest
import torch

from qtool.formats._base import Quantized
from qtool.formats.int import Int
from qtool.numerics.threads.ranks import ALIGNED, packed, unpacked
from qtool.pipeline import found
from qtool.pipeline.found import decoded
from qtool.residuals._base import Matrix


def matrix(fmt, rows, seed, k=64):
    w = torch.randn(rows, k, generator=torch.Generator().manual_seed(seed))
    params = fmt.fit(w)
    return Matrix(Quantized(fmt.snap(w, params), params, fmt))


@pytest.mark.parametrize("at_once", [1, 3000, 1 << 24])
def test_small_matrices_are_decoded_as_each_by_itself(at_once, monkeypatch):
    monkeypatch.setattr(found, "AT_ONCE", at_once)
    four, three = Int(bits=4, group=32), Int(bits=3, group=32, symmetric=False)
    formats = [four, three, four, Int(bits=4, group="tensor"), four, three]
    several = {i: matrix(fmt, 16 * (1 + i % 3), i) for i, fmt in enumerate(formats)}
    several[9] = matrix(four, 32, 9, k=96)
    parts, real = [], found.together
    monkeypatch.setattr(found, "together", lambda some: parts.append(len(some)) or real(some))
    seen = dict(decoded(several))
    assert seen.keys() == several.keys()
    for key, w in seen.items():
        assert torch.equal(w, several[key].decode())
    assert parts == {1: [], 3000: [], 1 << 24: [3, 2]}[at_once]


def test_tensors_of_any_type_come_back_from_a_row_of_bytes():
    tensors = [
        torch.arange(7, dtype=torch.uint8),
        torch.randn(3, 5).T,
        torch.tensor(2.5, dtype=torch.float64),
        torch.empty(0, 4),
        torch.tensor([True, False, True]),
        torch.randn(2, 3).bfloat16(),
    ]
    data = packed(tensors, torch.device("cpu"), 500)
    assert data.shape == (500,)
    assert len(packed(tensors, torch.device("cpu"))) == 16 + 64 + 16 + 16 + 16
    back = unpacked(data, [(t.dtype, tuple(t.shape)) for t in tensors])
    for t, b in zip(tensors, back, strict=True):
        assert t.dtype == b.dtype
        assert torch.equal(t, b)
        assert (b.data_ptr() - data.data_ptr()) % ALIGNED == 0 or not b.numel()
