"""Close codes and what they sum up to on CUDA devices, as a Triton kernel; see `batched_search.BlockBatch.products`.

A program takes some spans. Nothing that is as large as the weights times the entries compared leaves the chip.

Shape letters: R super-blocks, G groups of one, S segments of a group, P spans of a program, V columns of a vector,
E entries that are compared, M magnitudes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from qtool.numerics.codebooks.codebook import NEIGHBORS, Codebook

SPANS, WARPS = 32, 4
"""Of a program, and the warps that share them."""


@triton.jit
def key_of(x, power, middles, steps: tl.constexpr):  # type: ignore[no-untyped-def]
    """The nearest magnitudes of vectors [P, V] as numbers in base M, whose digits count as `power` [V] says."""
    digit = tl.zeros(x.shape, tl.int32)
    for m in tl.static_range(steps):
        digit += (x > tl.load(middles + m)).to(tl.int32)
    return tl.sum(digit * power[None, :], 1)


@triton.jit
def products_kernel(  # type: ignore[no-untyped-def]
    x, weight, scale, shift, middles, places, close, exact, values, xl, ll, count, row, group, segment, near,
    shifted: tl.constexpr, signed: tl.constexpr, even: tl.constexpr, steps: tl.constexpr, width: tl.constexpr,
    vectors: tl.constexpr, neighbors: tl.constexpr, among: tl.constexpr, spans: tl.constexpr,
):  # fmt: skip
    """Fills xl and ll [count] of spans, of which `row`, `group` and `segment` share columns, a scale and a shift."""
    p, v, e = tl.program_id(0) * spans + tl.arange(0, spans), tl.arange(0, width), tl.arange(0, among)
    inside = p < count
    s = tl.load(scale + p // group, inside, 0.0)
    inverse, power = tl.where(s != 0, 1 / s, 0.0), tl.load(places + v)
    whole, square, least = tl.zeros([spans], tl.float32), tl.zeros([spans], tl.float32), tl.zeros([spans], tl.float32)
    minus = tl.zeros([spans], tl.int32)
    for u in tl.static_range(vectors):
        at = u * width + v[None, :]
        own = tl.load(x + p[:, None].to(tl.int64) * (width * vectors) + at, inside[:, None], 0.0)
        w = tl.load(weight + (p % row)[:, None] * (width * vectors) + at)
        d = own
        if shifted:
            moved = tl.load(shift + p // segment, inside, 0.0)
            d -= (s * moved)[:, None]
        size = d
        if signed:
            size = tl.abs(d)
            minus += tl.sum((d * s[:, None] < 0).to(tl.int32), 1)
        pull, key = w * size, key_of(size * inverse[:, None], power, middles, steps)
        entries = tl.load(close + key[:, None] * neighbors + e[None, :])
        level = tl.load(values + entries[:, None, :] * width + v[None, :, None])
        cost = tl.sum(level * (level * (s[:, None] * w)[:, :, None] - 2 * pull[:, :, None]), 1)
        fits = tl.load(exact + key) != 0
        if even and vectors == 1:
            flips = minus % 2 == 1
            cost += tl.where(flips[:, None], 4 * tl.min(pull[:, :, None] * level, 1), 0.0)
            fits = fits & (minus % 2 == 0)
        cost = tl.where(e[None, :] < near, cost * s[:, None], float("inf"))
        place = tl.where(fits, 0, tl.argmin(cost, 1))
        chosen = tl.sum(tl.where(e[None, :] == place[:, None], entries, 0), 1)
        q = tl.load(values + chosen[:, None] * width + v[None, :])
        if shifted:
            q += moved[:, None]
            whole += tl.sum(w * q * own, 1)
        else:
            here = pull * q
            whole += tl.sum(here, 1)
            least = tl.minimum(least, tl.min(here, 1)) if u else tl.min(here, 1)
        square += tl.sum(w * q * q, 1)
    if even:
        whole -= tl.where(minus % 2 == 1, 2 * least, 0.0)
    tl.store(xl + p, whole, inside)
    tl.store(ll + p, square, inside)


def products(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    book: Codebook,
    near: int,
    tables: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """(sum of weight x level, sum of weight level^2) of spans, float32 [R, spans of one].

    Args:
        x: float32 [R, C], contiguous.
        weight: float32 [C].
        scale: float32 [R, G].
        shift: float32 [R, segments of a super-block]; None: there are none.
        book: what is allowed.
        near: entries near a vector that are compared.
        tables: middles, places, close, exact and values, see `batched_search.Lookup`.
    """
    spans = x.shape[1] // book.span
    xl, ll = x.new_empty(len(x), spans), x.new_empty(len(x), spans)
    moved = scale if shift is None else shift
    products_kernel[(cdiv(xl.numel(), SPANS),)](
        x, weight, scale, moved, *tables, xl, ll, xl.numel(), spans, spans // scale.shape[1], spans // moved.shape[1],
        near, shift is not None, book.signs != "none", book.signs == "even", len(book.magnitudes) - 1, book.width,
        book.span // book.width, NEIGHBORS, next_power_of_2(near), SPANS, num_warps=WARPS,
    )  # fmt: skip
    return xl, ll
