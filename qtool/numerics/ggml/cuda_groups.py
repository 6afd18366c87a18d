"""Scales of single groups as ggml's encoders find them, as Triton kernels; see `ggml.groups`, whose steps these are.

A lane takes a group, so that its sums are in ggml's order; kernels are compiled without fused operations, and quotients
are rounded as processors do: results are those of the CPU, bit by bit. Weights lie transposed: column c of group g is
x[c, g], and errors count as they do without importances.

Shape letters: C columns of a group, G groups of all rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qtool.numerics.solving.cuda_pieces import MAGIC

EPSILON = tl.constexpr(1e-15)
PASSES = tl.constexpr(5)
BITS = tl.constexpr(3)
"""Of a code that is improved by itself: those of Q3_K are all that ggml treats so."""
CODE = tl.constexpr(7)


@triton.jit
def nearest(x):  # type: ignore[no-untyped-def]
    """The nearest integer, ties even, of numbers below 2^22; larger ones stay large."""
    return (x + MAGIC) - MAGIC


@triton.jit
def column(x, c, g, groups):  # type: ignore[no-untyped-def]
    """Column c of groups."""
    return tl.load(x + c * groups + g, g < groups, 0.0)


@triton.jit
def missed(error, absolute: tl.constexpr):  # type: ignore[no-untyped-def]
    """How much an error counts."""
    return tl.abs(error) if absolute else error * error


@triton.jit
def shifted_level(v, low, inverse, levels):  # type: ignore[no-untyped-def]
    """The level of a value, from 0 on, at a step with an inverse."""
    y = inverse * (v - low)
    return tl.where(y > 0, nearest(tl.where(y < levels, y, levels)), 0.0)


@triton.jit
def shifted_start(  # type: ignore[no-untyped-def]
    x, g, groups, width: tl.constexpr, levels, flat, absolute: tl.constexpr
):
    """(low, high, least weight, scale, error) of groups from their range; see `groups.shifted_start`."""
    low = column(x, 0, g, groups)
    high, square = low, low * 0
    for c in range(width):
        v = column(x, c, g, groups)
        low, high = tl.minimum(low, v), tl.maximum(high, v)
        square += v * v
    base = flat * tl.sqrt_rn(tl.div_rn(square, square * 0 + width))
    low = tl.where(low < 0, low, 0.0)
    inverse = tl.div_rn(low * 0 + levels, high - low)
    s = tl.where(high > low, tl.div_rn(low * 0 + 1.0, inverse), 0.0)
    error = low * 0
    for c in range(width):
        v = column(x, c, g, groups)
        level = nearest(inverse * (v - low))
        error += (base + tl.abs(v)) * missed(s * tl.where(level < levels, level, levels) + low - v, absolute)
    return low, high, base, s, error


@triton.jit
def shifted_kernel(  # type: ignore[no-untyped-def]
    x, scale, minimum, lengths, groups, width: tl.constexpr, levels, flat, steps,
    absolute: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    """`groups.shifted_scales`: scale and minimum [G]. x [C, G]; an error counts |x| + flat * root mean square.

    lengths: of the grid over a group's range, in levels, float32 [steps].
    """
    g = tl.program_id(0) * lanes + tl.arange(0, lanes)
    low, high, base, s, best = shifted_start(x, g, groups, width, levels, flat, absolute)
    total, mean = low * 0, low * 0
    for c in range(width):
        v = column(x, c, g, groups)
        total += base + tl.abs(v)
        mean += (base + tl.abs(v)) * v
    for step in range(steps):
        inverse = tl.div_rn(low * 0 + tl.load(lengths + step), high - low)
        l, ll, xl = low * 0, low * 0, low * 0  # noqa: E741
        for c in range(width):
            v = column(x, c, g, groups)
            level = shifted_level(v, low, inverse, levels)
            weighed = (base + tl.abs(v)) * level
            l += weighed  # noqa: E741
            ll += weighed * level
            xl += weighed * v
        spread = total * ll - l * l
        t, o = tl.div_rn(total * xl - mean * l, spread), tl.div_rn(ll * mean - l * xl, spread)
        t, o = tl.where(o > 0, tl.div_rn(xl, ll), t), tl.where(o > 0, 0.0, o)
        found = tl.where((spread > 0) & (high > low), 0.0, float("inf"))
        for c in range(width):
            v = column(x, c, g, groups)
            error = missed(t * shifted_level(v, low, inverse, levels) + o - v, absolute)
            found += (base + tl.abs(v)) * error
        better = found < best
        best, s, low = tl.where(better, found, best), tl.where(better, t, s), tl.where(better, o, low)
    tl.store(scale + g, s, g < groups)
    tl.store(minimum + g, -low, g < groups)


@triton.jit
def extreme_of(x, g, groups, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first of the values that are largest in size, of each group."""
    extreme = column(x, 0, g, groups)
    for c in range(width):
        v = column(x, c, g, groups)
        extreme = tl.where(tl.abs(v) > tl.abs(extreme), v, extreme)
    return extreme


@triton.jit
def signed_kernel(  # type: ignore[no-untyped-def]
    x, scale, inverse, lengths, groups, width: tl.constexpr, levels, steps, lanes: tl.constexpr
):
    """`groups.signed_scales`: scale and inverse [G]. x [C, G]; an error counts x^2.

    lengths: where the extreme lands, float32 [steps].
    """
    g = tl.program_id(0) * lanes + tl.arange(0, lanes)
    extreme = extreme_of(x, g, groups, width)
    some = tl.abs(extreme) >= EPSILON
    best, best_scale, best_inverse = extreme * 0, extreme * 0, extreme * 0
    for i in range(steps):
        step = tl.where(some, tl.div_rn(extreme * 0 + tl.load(lengths + i), tl.where(some, extreme, 1.0)), 0.0)
        xl, ll = extreme * 0, extreme * 0
        for c in range(width):
            v = column(x, c, g, groups)
            level, weight = tl.minimum(tl.maximum(nearest(step * v), -levels), levels - 1), v * v
            xl += weight * v * level
            ll += weight * level * level
        better = (step * 0 + i == 0) | ((ll > 0) & (xl * xl > best * ll))
        found = tl.where(ll != 0, tl.div_rn(xl, tl.where(ll != 0, ll, 1.0)), 0.0)
        best, best_scale = tl.where(better, found * xl, best), tl.where(better, found, best_scale)
        best_inverse = tl.where(better, step, best_inverse)
    tl.store(scale + g, best_scale, g < groups)
    tl.store(inverse + g, best_inverse, g < groups)


@triton.jit
def polished_kernel(x, scale, groups, width: tl.constexpr, levels, lanes: tl.constexpr):  # type: ignore[no-untyped-def]
    """`groups.polished_scales`: scale [G]. x [C, G], C at most 21, levels at most 4; an error counts x^2."""
    g = tl.program_id(0) * lanes + tl.arange(0, lanes)
    extreme = extreme_of(x, g, groups, width)
    some = tl.abs(extreme) >= EPSILON
    inverse = tl.where(some, tl.div_rn(extreme * 0 - levels, tl.where(some, extreme, 1.0)), 0.0)
    codes, xl, ll = g.to(tl.int64) * 0, extreme * 0, extreme * 0
    for c in range(width):
        v = column(x, c, g, groups)
        level, weight = tl.minimum(tl.maximum(nearest(inverse * v), -levels), levels - 1), v * v
        codes += (level + levels).to(tl.int64) << (BITS * c)
        xl += weight * v * level
        ll += weight * level * level
    for _ in range(PASSES):
        for c in range(width):
            v = column(x, c, g, groups)
            old, weight = ((codes >> (BITS * c)) & CODE).to(tl.float32) - levels, v * v
            weighed = weight * v
            a, b = xl - weighed * old, ll - weight * old * old
            wanted = nearest(tl.div_rn(v * b, tl.where(a > 0, a, 1.0)))
            level = tl.where(a > 0, tl.minimum(tl.maximum(wanted, -levels), levels - 1), old)
            a, b = a + weighed * level, b + weight * level * level
            better = (level != old) & (b > 0) & (a * a * ll > xl * xl * b)
            codes += tl.where(better, level - old, 0.0).to(tl.int64) << (BITS * c)
            xl, ll = tl.where(better, a, xl), tl.where(better, b, ll)
    tl.store(scale + g, tl.where(ll > 0, tl.div_rn(xl, tl.where(ll > 0, ll, 1.0)), 0.0), g < groups)
