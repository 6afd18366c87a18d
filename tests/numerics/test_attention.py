"""Causal attention against softmax(Q K^T) V in double precision."""

from __future__ import annotations

import math

import pytest
import torch

from qtool.numerics.attention import QUERIES, causal_attention


def tensors(length, heads, shared, width, values, spread=1.0):
    torch.manual_seed(length)
    query = (torch.randn(2, length, heads, width) * spread).bfloat16().transpose(1, 2)  # as models lay them out
    key = (torch.randn(2, length, shared, width) * spread).bfloat16().transpose(1, 2)
    value = (torch.randn(2, length, shared, values) + 0.5).bfloat16().transpose(1, 2)
    return query, key, value


def plain(query, key, value, scaling):
    """float64 [S, T, H, D], one query after the other."""
    samples, heads, length, _ = query.shape
    shared = heads // key.shape[1]
    out = torch.empty(samples, length, heads, value.shape[-1], dtype=torch.float64)
    for s in range(samples):
        for h in range(heads):
            q, k, v = (x.double() for x in (query[s, h], key[s, h // shared], value[s, h // shared]))
            for t in range(length):
                scores = [
                    math.exp(float(x)) for x in (k[: t + 1] @ q[t] * scaling) - (k[: t + 1] @ q[t]).max() * scaling
                ]
                out[s, t, h] = torch.tensor(scores, dtype=torch.float64) @ v[: t + 1] / sum(scores)
    return out


@pytest.mark.parametrize(
    ("length", "heads", "shared", "values"),
    [(1, 2, 1, 8), (7, 4, 4, 8), (QUERIES, 2, 1, 16), (2 * QUERIES + 3, 6, 2, 8)],
)
@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0])
def test_as_the_formula_says(length, heads, shared, values, spread):
    query, key, value = tensors(length, heads, shared, 8, values, spread)
    found, wanted = causal_attention(query, key, value, 0.3), plain(query, key, value, 0.3)
    assert found.dtype == torch.bfloat16
    assert (found.double() - wanted).norm() < 0.004 * wanted.norm()
    torch_s = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    assert (found.double() - wanted).norm() < 1.6 * (torch_s.double() - wanted).norm() + 1e-9


def test_what_comes_later_does_not_count():
    query, key, value = tensors(100, 2, 2, 8, 8)
    before = causal_attention(query, key, value, 0.3)
    key[:, :, 70:] *= 100
    value[:, :, 70:] = 1e30
    assert torch.equal(causal_attention(query, key, value, 0.3)[:, :70], before[:, :70])


def test_what_is_infinite_is_not_hidden():
    query, key, value = tensors(100, 2, 2, 8, 8)
    key[0, 1, 50] = 3e38
    query[0, 1, 60] = 3e38
    found = causal_attention(query, key, value, 0.3)
    assert found[0, 60, 1].isnan().all()
    assert found[0, 60, 0].isfinite().all()
