"""ggml's searches for the scales of IQ2 and IQ3 types, repeated to the last bit; see `ggml.search`.

These are `quantize_row_iq2_xxs_impl` and its like for IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S of ggml-quants.c
(https://github.com/ggml-org/llama.cpp). Each step of a sweep rounds a group of columns to odd numbers, a vector at a
time; what is no entry of the codebook becomes the best of the entries in the nearest shells around it.

Shape letters: N rows, K columns, S super-blocks of a row, G groups of a row, C columns of a group, M magnitudes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.checks import searchable
from qtool.numerics.codebooks.codebook import Codebook
from qtool.numerics.codebooks.scale_rule import ScaleRule
from qtool.numerics.ggml.search import positive_step
from qtool.numerics.ggml.shells import fill_closest, shells_of
from qtool.numerics.scales.search import FAST
from qtool.numerics.scales.sweep import half
from qtool.numerics.threads.parallel import over_rows

F32 = np.float32
SUPER = 256


class CodebookSearch(NamedTuple):
    """What ggml does for one block type.

    Attributes:
        reach: steps of the sweep on either side of the one that puts the largest weight on the last level.
        shells: of entries around what is no entry.
        least: a group whose largest weight is below is taken for zeros.
        step: how far a step of the sweep moves the largest weight, in levels.
        fitted: the largest weight is that of a fit without a codebook.
        even: whether the number of minus signs of 8 columns is even.
        again: whether entries are looked for again at the final scale even where the numbers were entries themselves.
        stretch: of the super-block's scale.
        spread: an error counts importance * sqrt(spread * mean(x^2) + x^2).
        flat: without importances it counts flat * spread * mean(x^2) + x^2.
        required: ggml needs importances.
    """

    reach: int
    shells: int
    least: float
    step: float = 0.1
    fitted: bool = False
    even: bool = False
    again: bool = False
    stretch: float = 1.0
    spread: float = 2.0
    flat: float = 0.0
    required: bool = False


@njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
def fill_numbers(size, inverse, last, number):  # type: ignore[no-untyped-def]
    """Fills number [C]: the odd numbers nearest to size [C] are 2 * number + 1."""
    for j in range(len(size)):
        level = np.rint(F32(0.5) * (inverse * size[j] - F32(1)))
        number[j] = max(np.int32(min(max(level, F32(0)), last)), np.int32(0))  # NaN is negative


@njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
def fill_levels(number, a, b, levels):  # type: ignore[no-untyped-def]
    """Fills levels[a:b], odd numbers."""
    for j in range(a, b):
        levels[j] = F32(2 * number[j] + 1)


@njit(nogil=True, cache=True, error_model="numpy", forceinline=True)
def products(size, weight, levels):  # type: ignore[no-untyped-def]
    """(sum of weight x level, sum of weight level^2) of a group [C]."""
    xl, ll = F32(0), F32(0)
    for j in range(len(size)):
        xl += weight[j] * size[j] * levels[j]
        ll += weight[j] * levels[j] * levels[j]
    return xl, ll


@njit(nogil=True, cache=True, error_model="numpy")
def group_scale(size, weight, root, width, kind, shells, levels, memory):  # type: ignore[no-untyped-def]
    """The scale of a group [C]; fills levels [C]. root: of weight."""
    tried, number, total = memory
    base, _, begin, numbers = shells  # once: each access to an array is counted
    end, last = F32(2 * base - 1), F32(base - 1)
    levels[:], most = F32(1), size.max()
    if most < F32(kind.least) or most == 0:
        return F32(0)
    scale, away, best = most / end, -1 if kind.again else 0, F32(0)
    if kind.fitted:
        scale = positive_step(size, weight, last + F32(2), tried)
        most = scale * (last + F32(1))
        if most <= 0:
            return F32(0)
    for step in range(-kind.reach, kind.reach + 1):
        inverse = (end + F32(step) * F32(kind.step)) / most
        fill_numbers(size, inverse, last, number)
        gone, step_scale = 0, F32(1) / inverse
        for at in range(0, len(size), width):
            off = fill_closest(size, root, at, width, step_scale, F32(2), F32(1), base, begin, numbers, number, total)
            gone |= int(off) << at
        fill_levels(number, 0, len(size), tried)
        xl, ll = products(size, weight, tried)
        if ll > 0 and xl * xl > best * ll:
            scale, away = xl / ll, gone
            best = scale * xl
            levels[:] = tried
    if (away == 0 and not kind.fitted) or scale <= 0:
        return scale
    fill_numbers(size, F32(1) / scale, last, number)
    for at in range(0, len(size), width):
        if kind.again or away >> at & 1:
            fill_closest(size, root, at, width, scale, F32(2), F32(1), base, begin, numbers, number, total)
            fill_levels(number, at, at + width, levels)
    xl, ll = products(size, weight, levels)
    return xl / ll if ll > 0 else scale


@njit(nogil=True, cache=True, error_model="numpy")
def weigh(x, importance, spread, flat, weight):  # type: ignore[no-untyped-def]
    """Fills weight [256], how much ggml lets errors of a super-block x [256] count."""
    mean = F32(0)
    for j in range(SUPER):
        mean += x[j] * x[j]
    mean = F32(spread) * mean / F32(SUPER)
    for j in range(SUPER):
        square = x[j] * x[j]
        if len(importance):
            weight[j] = importance[j] * np.sqrt(mean + square)
        else:
            weight[j] = F32(flat) * mean + square


@njit(nogil=True, cache=True, error_model="numpy")
def fill_sizes(x, weight, even, size):  # type: ignore[no-untyped-def]
    """Fills size [256] with those of x [256]; where signs have to be even and are not, the cheapest turns negative."""
    for first in range(0, SUPER, 8):
        minus, least, at = 0, F32(np.inf), first
        for j in range(first, first + 8):
            size[j] = abs(x[j])
            minus += x[j] < 0
            cost = weight[j] * x[j] * x[j]
            if cost < least:
                least, at = cost, j
        if even and minus % 2:
            size[at] = -size[at]


@njit(nogil=True, cache=True, error_model="numpy")
def fill_steps(scale, d, top, s):  # type: ignore[no-untyped-def]
    """Fills s [groups], integers in [0, top] with scale ~ d * (2 s + 1)."""
    for g in range(len(scale)):
        level = np.rint(F32(0.5) * (F32(1) / d * scale[g] - F32(1)))
        s[g] = min(max(level, F32(0)), F32(top)) if d > 0 else F32(0)


@njit(nogil=True, cache=True, error_model="numpy", fastmath=FAST)
def relative_error(x, levels, d, s, weight):  # type: ignore[no-untyped-def]
    """Error of x [256] ~ d * (2 s + 1) * levels, in parts of that of zeros; infinite if that is 0. s [groups]."""
    error, energy, group = F32(0), F32(0), SUPER // len(s)
    for g in range(len(s)):
        scale = d * (2 * s[g] + 1)
        for j in range(g * group, (g + 1) * group):
            miss = x[j] - scale * levels[j]
            error += weight[j] * miss * miss
            energy += weight[j] * x[j] * x[j]
    return error / energy if energy > 0 else F32(np.inf)


@njit(nogil=True, cache=True, error_model="numpy")
def codebook_rows(x, importance, weights, values, width, kind, rule, shells, d, s, minus, errors, start, stop):  # type: ignore[no-untyped-def]
    """Fills d, errors [N, S] and s [N, G] for rows start to stop of x [N, K]; see `ggml_codebook_scales`.

    values [M]: what numbers stand for. Nothing is shifted: minus stays empty.
    """
    per, group = s.shape[1] // d.shape[1], rule.group
    weight, root, size, levels = np.empty((4, SUPER), F32)
    scale = np.empty(per, F32)
    memory = np.empty(group, F32), np.empty(group, np.int32), np.empty(shells.most, F32)
    for n in range(start, stop):
        for b in range(d.shape[1]):
            here, steps = slice(b * SUPER, (b + 1) * SUPER), s[n, b * per : (b + 1) * per]
            row = x[n, here]
            weigh(row, importance[here], kind.spread, kind.flat, weight)
            fill_sizes(row, weight, kind.even, size)
            np.sqrt(weight, root)
            for g in range(per):
                part = slice(g * group, (g + 1) * group)
                scale[g] = group_scale(size[part], weight[part], root[part], width, kind, shells, levels[part], memory)
                if scale[g] < 0:
                    scale[g], size[part] = -scale[g], -size[part]
            step = scale.max() / F32(2 * rule.top + 1)
            fill_steps(scale, step, rule.top, steps)
            d[n, b] = step * F32(kind.stretch)
            for j in range(SUPER):
                levels[j] = values[(np.int32(levels[j]) - 1) // 2]
            errors[n, b] = relative_error(size, levels, half(d[n, b]) * F32(rule.unit), steps, weights[here])


def search_rows(
    kernel: Callable[..., None], x: Tensor, importance: Tensor | None, weight: Tensor, rule: ScaleRule, shifts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a kernel finds for all rows.

    Args:
        kernel: called with (x, importance, weight), with what to fill, and with the first row and that behind the last.
        x: float32 [N, K].
        importance: float32 [K] or None.
        weight: float32 [K], of a squared error.
        rule: how scales are stored.
        shifts: of a row.

    Returns:
        d, float32 [N, S]; s, float32 [N, G]; which shifts are down, uint8 [N, shifts]; errors, float32 [N, S].
    """
    counts = np.empty(0, np.float32) if importance is None else importance.float().contiguous().cpu().numpy()
    arrays = searchable(x), counts, weight.cpu().numpy()
    d, s, errors = (np.zeros((len(x), x.shape[1] // width), np.float32) for width in (SUPER, rule.group, SUPER))
    minus = np.zeros((len(x), shifts), np.uint8)
    over_rows(lambda a, b: kernel(arrays, (d, s, minus, errors), a, b), len(x))
    scale, steps, down, error = (torch.from_numpy(part).to(x.device) for part in (d, s, minus, errors))
    return scale, steps, down, error


def ggml_codebook_scales(
    x: Tensor, importance: Tensor | None, weight: Tensor, book: Codebook, rule: ScaleRule, kind: CodebookSearch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What ggml takes.

    Args:
        x: float32 [N, K].
        importance: float32 [K] or None.
        weight: float32 [K], of a squared error.
        book: of the block type.
        rule: how it stores scales.
        kind: what ggml does for it.

    Errors of IQ3_S are too small where a group is all zeros: ggml then writes what follows into the wrong places.

    Returns:
        (d, float32 [N, S], not yet in fp16; s, float32 [N, G] of integers; which shifts are down, [N, 0]; the error of
        ggml's own codes in parts of that of zeros, float32 [N, S], infinite where that is 0).
    """
    fixed = book.magnitudes, book.width, kind, rule, shells_of(book, kind.shells)
    return search_rows(
        lambda arrays, found, a, b: codebook_rows(*arrays, *fixed, *found, a, b), x, importance, weight, rule, 0
    )
