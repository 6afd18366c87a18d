"""The column walk on CUDA devices that searches the scales of integers on its way, as Triton kernels; see `cuda_walk`.

Shape letters: M matrices, N rows of all, K columns, P pieces of S columns of a tile, C rows of a program, G groups.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from qtool.numerics.scales.cuda_search import TINY, on_device, rounded
from qtool.numerics.scales.search import IntegerScales, clip_ratios
from qtool.numerics.solving.cuda_pieces import BLOCK, MAGIC, PIECE, ROWS, WARPS, apart, entry, fed, piece_of
from qtool.numerics.solving.split import subtract_product

STORED = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""How kernels call the types that scales are rounded to."""


@triton.jit
def total(x):  # type: ignore[no-untyped-def]
    """Sums over a tile's columns: [P, S, C] -> [C]."""
    return tl.sum(tl.sum(x, 0), 0)


@triton.jit
def symmetric_scale(v, w, near_v, ratios, trials, lowest, highest):  # type: ignore[no-untyped-def]
    """Scales [C] of groups v [P, S, C], zero elsewhere, w [P, S, 1]; near_v: v times reach. See `symmetric_rows`."""
    far, near = tl.max(tl.max(tl.abs(v), 0), 0), tl.max(tl.max(tl.abs(near_v), 0), 0)
    best, scale, weighed = far * 0 - 1, far * 0, w * v
    for i in range(trials):
        t = i / (trials - 1.0)
        extent = far + (near - far) * t
        end = highest + (-lowest - highest) * t
        inverse = tl.where(near > TINY, end * tl.load(ratios + i) / tl.where(near > TINY, extent, 1.0), 0.0)
        scaled = v * inverse[None, None, :]
        level = rounded(scaled, lowest, highest)
        xl, ll = total(weighed * level), total(w * level * level)
        better = (ll > 0) & (xl * xl > best * ll)
        best, scale = tl.where(better, xl * xl / ll, best), tl.where(better, xl / ll, scale)
        level = rounded(scaled, -highest, -lowest)
        xl, ll = total(weighed * level), total(w * level * level)
        better = (ll > 0) & (xl * xl > best * ll)
        best, scale = tl.where(better, xl * xl / ll, best), tl.where(better, -xl / ll, scale)
    return scale


@triton.jit
def scale_and_zero(v, w, near_v, ratios, trials, lowest, highest):  # type: ignore[no-untyped-def]
    """Scales and zero points [C], the rest as above; see `search.zero_point_rows`."""
    far_low, far_high = tl.minimum(tl.min(tl.min(v, 0), 0), 0.0), tl.maximum(tl.max(tl.max(v, 0), 0), 0.0)
    near_low = tl.minimum(tl.min(tl.min(near_v, 0), 0), 0.0)
    near_high = tl.maximum(tl.max(tl.max(near_v, 0), 0), 0.0)
    best, scale, zero, weighed = far_low * 0 - 1, far_low * 0, far_low * 0, w * v
    some = near_high - near_low > TINY
    for i in range(4 * trials):
        t = (i // 4) / (trials - 1.0)
        shift = tl.where(i % 2 == 0, -0.5, 0.5) * tl.where(i % 4 < 2, 1.0, 3.0)
        low, high = far_low + (near_low - far_low) * t, far_high + (near_high - far_high) * t
        inverse = tl.where(some, (highest - lowest) * tl.load(ratios + i // 4) / tl.where(some, high - low, 1.0), 0.0)
        middle = (lowest + highest) * 0.5 - (((low + high) * 0.5 * inverse + MAGIC) - MAGIC)
        z = rounded(middle + shift, lowest, highest)
        level = rounded(v * inverse[None, None, :], (lowest - z)[None, None, :], (highest - z)[None, None, :])
        xl, ll = total(weighed * level), total(w * level * level)
        better = (ll > 0) & (xl * xl > best * ll)
        best, scale = tl.where(better, xl * xl / ll, best), tl.where(better, xl / ll, scale)
        zero = tl.where(better, z, zero)
    return scale, zero


@triton.jit
def integer_kernel(  # type: ignore[no-untyped-def]
    w, factor, matrix_stride, factor_stride, weights, reaches, weight_stride, ratios, codes, error, scales, zeros,
    rows, each, columns, lowest, highest, trials, width: tl.constexpr, with_zeros: tl.constexpr, stored: tl.constexpr,
    pieces: tl.constexpr, piece: tl.constexpr, count: tl.constexpr,
):  # fmt: skip
    """`walk_kernel` that chooses scales of groups of `width` columns on its way; fills scales, zeros [G, rows].

    Every `each` rows have a factor, weights and reaches of their own.
    """
    matrix = (tl.program_id(0) * count // each).to(tl.int64)
    factor += matrix * matrix_stride
    weights += matrix * weight_stride
    reaches += matrix * weight_stride
    n = tl.program_id(0) * count + tl.arange(0, count)
    j, column = tl.arange(0, piece), tl.arange(0, pieces)[:, None] * piece + tl.arange(0, piece)[None, :]
    inside = (column[:, :, None] < columns) & (n[None, None, :] < rows)
    tile = tl.load(w + column[:, :, None] * rows + n[None, None, :], inside, 0.0)
    for g in range(columns // width):
        of_group = column // width == g
        weight = tl.load(weights + column, of_group, 0.0)[:, :, None]
        v = tl.where(of_group[:, :, None], tile, 0.0)
        near_v = v * tl.load(reaches + column, of_group, 0.0)[:, :, None]
        if with_zeros:
            s, z = scale_and_zero(v, weight, near_v, ratios, trials, lowest, highest)
        else:
            s = symmetric_scale(v, weight, near_v, ratios, trials, lowest, highest)
            z = s * 0
        if stored == 1:
            s = s.to(tl.bfloat16).to(tl.float32)
        if stored == 2:
            s = s.to(tl.float16).to(tl.float32)
        s = tl.where(s == 0, 1.0, s)
        tl.store(scales + g * rows + n, s, n < rows)
        if with_zeros:
            tl.store(zeros + g * rows + n, z, n < rows)
        o = -s * z
        for p in range(g * width // piece, (g + 1) * width // piece):
            first = p * piece
            x, e = piece_of(tile, p, pieces), tl.zeros([piece, count], tl.float32)
            for k in range(piece):
                here = entry(x, k, j)
                row = factor + (first + k) * factor_stride + first
                u = tl.load(row + j, j > k, 0.0)
                level = rounded((here - o) / s, lowest, highest)
                here = (here - (s * level + o)) / tl.load(row + k)
                tl.store(codes + (first + k) * rows + n, (level - lowest).to(tl.int32).to(tl.uint8), n < rows)
                e = tl.where(j[:, None] == k, here[None, :], e)
                x -= u[:, None] * here[None, :]
            tl.store(error + (first + j[:, None]) * rows + n[None, :], e, n[None, :] < rows)
            later = (column >= first + piece) & (column < columns)
            tile = fed(tile, factor, factor_stride, first, columns, e, later, pieces, piece)


def walk_integers(
    w: Tensor, factor: Tensor, rule: IntegerScales, weight: Tensor, reach: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """GPTQ's walk where the scale of each group of integers is searched when the walk gets there.

    Args:
        w: float32 [N, K], columns in walking order, those of a group side by side.
        factor: float32 [K, K], U of `linalg.inverse_factor`, in the same order; or [M, K, K], for as many rows each,
            a multiple of `ROWS`.
        rule: how scales are chosen; groups of a multiple of `PIECE` columns that divides `BLOCK`.
        weight: float32 [K], see `search.relative`, in the same order; or [M, K].
        reach: float32 [K], of them; or [M, K].

    Returns:
        Codes, uint8 [N, K], in walking order; scales and, if there are any, zero points, float32 [N, G] each.
    """
    rest, width = w.T.contiguous(), rule.columns
    k, rows = rest.shape
    codes, error = torch.empty_like(rest, dtype=torch.uint8), rest.new_empty(BLOCK, rows)
    found = rest.new_empty(1 + rule.zeros, k // width, rows)
    tried = clip_ratios(rule.highest - rule.lowest + 1)
    ratios = on_device(tuple(tried.tolist()), w.device)
    stride, each = apart(factor, rows, ROWS)
    for a in range(0, k, BLOCK):
        b = min(a + BLOCK, k)
        groups = slice(a // width, b // width)
        integer_kernel[(cdiv(rows, ROWS),)](
            rest[a:b], factor[..., a:b, a:b], stride, factor.stride(-2), weight[..., a:b],
            reach[..., a:b], k if stride else 0, ratios, codes[a:b], error, found[0, groups], found[-1, groups],
            rows, each, b - a, float(rule.lowest), float(rule.highest), len(tried),
            width, rule.zeros, STORED[rule.dtype], BLOCK // PIECE, PIECE, ROWS, num_warps=WARPS,
        )  # fmt: skip
        subtract_product(rest[b:], factor[..., a:b, b:].mT, error[: b - a])
    return codes.T, tuple(p.T for p in found)
