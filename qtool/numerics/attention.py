"""Causal attention of bfloat16 tensors on the processor, in about half the time of torch's own.

Some queries at a time, scores are a matrix product in float32, a compiled kernel makes them weights in one pass over
each row, and weights times values is a product in bfloat16. That is how torch rounds as well: scores stay in float32
until they are weights.

Shape letters: S samples, H heads of queries, A heads of keys and values, T tokens, D numbers of a head, R rows of
scores, W columns of them.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.scales.search import FAST
from qtool.numerics.threads.parallel import over_rows

QUERIES = 64
"""Tokens whose scores are computed at a time: what lies beyond the last of them is not multiplied at all."""

LOG2_E = np.float32(1.4426950408889634)
TERMS = tuple(np.float32(0.6931471805599453**i / f) for i, f in enumerate((1, 1, 2, 6, 24, 120)))
"""Taylor's series of 2^x, right to 3e-6 within +-1/2."""

SIGN, INFINITY, NAN = np.int32(0x7FFFFFFF), np.int32(0x7F800000), np.uint16(0x7FC0)


@njit(nogil=True, cache=True, inline="always")
def ordered(bits):  # type: ignore[no-untyped-def]
    """The bits of a float32 as an int32 that is ordered as the numbers are, and back."""
    return np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & SIGN))


@njit(nogil=True, cache=True, fastmath=FAST)
def weigh_rows(scores, weights, first, queries, start, stop):  # type: ignore[no-untyped-def]
    """Fills weights [R, W], bits of bfloat16, with the softmax of scores, float32 [R, W], for rows start to stop.

    Row r belongs to query r % queries of some heads, which sees columns up to first + r % queries. A row with an
    infinite score becomes NaN.
    """
    terms, bits = np.empty(scores.shape[1], np.float32), scores.view(np.int32)
    terms_bits = terms.view(np.uint32)
    for r in range(start, stop):
        seen = first + r % queries + 1
        row, row_bits, out = scores[r], bits[r], weights[r]
        top_bits = np.int32(-(2**31))
        for j in range(seen):  # integers, because a maximum of floats is not vectorized
            top_bits = max(top_bits, ordered(row_bits[j]))
        if top_bits >= INFINITY:
            out[:] = NAN
            continue
        top, total = ordered(top_bits).view(np.float32), np.float32(0.0)
        for j in range(seen):
            x = max((row[j] - top) * LOG2_E, np.float32(-126.0))
            whole = np.rint(x)
            y = x - whole
            power = TERMS[0] + y * (TERMS[1] + y * (TERMS[2] + y * (TERMS[3] + y * (TERMS[4] + y * TERMS[5]))))
            exponent = np.int32(np.int32(whole) << np.int32(23))
            terms[j] = np.int32(np.float32(power).view(np.int32) + exponent).view(np.float32)
            total += terms[j]
        inverse = np.float32(1.0) / total
        for j in range(seen):
            terms[j] *= inverse
        for j in range(seen):
            out[j] = np.uint16(np.uint32(terms_bits[j] + np.uint32(0x8000)) >> np.uint32(16))
        out[seen:] = np.uint16(0)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Every token attends to itself and to those before it.

    Args:
        query: bfloat16 [S, H, T, D], on the CPU; H is a multiple of A.
        key: bfloat16 [S, A, T, D].
        value: bfloat16 [S, A, T, any].
        scaling: of the scores.

    Returns:
        bfloat16 [S, T, H, any].
    """
    samples, heads, length, _ = query.shape
    shared = key.shape[1]
    output = query.new_empty(samples, length, heads, value.shape[-1])
    for s in range(samples):
        q = (query[s].float() * scaling).view(shared, heads // shared, length, -1)
        k, v = key[s].float().transpose(1, 2), value[s]
        for a in range(0, length, QUERIES):
            b = min(a + QUERIES, length)
            scores = torch.bmm(q[:, :, a:b].flatten(1, 2), k[:, :, :b])
            weights = weigh(scores.flatten(0, 1), a, b - a).view(scores.shape)
            output[s, a:b] = torch.bmm(weights, v[:, :b]).view(heads, b - a, -1).transpose(0, 1)
    return output


def weigh(scores: Tensor, first: int, queries: int) -> Tensor:
    """Softmax of float32 [R, W] over what each query sees, bfloat16 [R, W]; see `weigh_rows`."""
    weights = torch.empty(scores.shape, dtype=torch.bfloat16)
    arrays = scores.numpy(), weights.view(torch.int16).numpy().view(np.uint16)
    over_rows(lambda start, stop: weigh_rows(*arrays, first, queries, start, stop), len(scores))
    return weights
