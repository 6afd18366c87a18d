"""Small floating-point numbers: tables of levels, rounding as a cast does, and error-minimizing scales.

A grid is symmetric and steps grow with magnitude: x lies on it if it is a multiple of

    step(x) = 2^max(floor(log2 |x|), smallest) * 2^-mantissa

below `highest`. That is a minifloat without infinities, subnormals included; with `smallest` = `mantissa` = b - 1 all
steps are 1, and the grid is that of integers of b bits without the lowest one.
Elements of 4, 6 and 8 bits: https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf

A level's index counts from the most negative one, so zero has the index (L - 1) / 2, and the distance from there is
the number's bit pattern without its sign. Negative zero is zero.

Shape letters: N rows, C columns, G groups of C / G columns, L levels, S scales tried.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.scales.search import FAST, prepared
from qtool.numerics.threads.parallel import over_rows

EXPONENT, SIZE = np.int32(0x7F800000), np.int32(0x7FFFFFFF)
"""Bits of a float32: of its exponent, and all but its sign."""
PART = 4096
"""Numbers whose products are summed in float32."""
ROUNDER = np.float32(1.5 * 2**23)
"""A sum with it, times a step, is a multiple of the step, ties even: there float32 has no finer ones."""


class Grid(NamedTuple):
    """Levels of a minifloat or an integer.

    Attributes:
        mantissa: bits of the fraction.
        smallest: exponent of the smallest normal number; below it, steps stay as they are there.
        highest: the largest level.
    """

    mantissa: int
    smallest: int
    highest: float

    @property
    def exponent(self) -> int:
        """Of the largest level: floor(log2(highest))."""
        return int(np.frexp(self.highest)[1]) - 1

    @property
    def step(self) -> float | None:
        """The distance of neighbouring levels where it is the same everywhere; None: it is not."""
        return 2.0 ** (self.smallest - self.mantissa) if self.highest < 2.0 ** (self.smallest + 1) else None

    @property
    def numbers(self) -> tuple[np.int32, np.int32, np.float32]:
        """What kernels take: the bits of 2^smallest in float32, `mantissa`, `highest`."""
        return np.int32((self.smallest + 127) << 23), np.int32(self.mantissa), np.float32(self.highest)

    def levels(self) -> Tensor:
        """float32 [L], ascending."""
        positive = positive_levels(self)
        return torch.tensor([-level for level in reversed(positive)] + [0.0, *positive])


@cache
def positive_levels(grid: Grid) -> tuple[float, ...]:
    """Those above zero, ascending."""
    levels = [2.0 ** (grid.smallest - grid.mantissa)]
    while levels[-1] < grid.highest:
        power = max(int(np.frexp(levels[-1])[1]) - 1, grid.smallest)
        levels.append(levels[-1] + 2.0 ** (power - grid.mantissa))
    return tuple(levels)


@cache
def minifloat(exponent: int, mantissa: int) -> Grid:
    """A float of 1 + exponent + mantissa bits with the usual bias 2^(exponent - 1) - 1.

    All bit patterns are numbers, but for the two types of 8 bits that have others: E4M3 ends at 448 and has two NaN;
    E5M2 ends at 57344 and has infinities, as in IEEE 754. E1My is an integer grid.
    """
    bias = 2 ** (exponent - 1) - 1
    top = 2**exponent - 1 - bias
    highest = {(4, 3): 448.0, (5, 2): 57344.0}.get((exponent, mantissa), 2.0**top * (2 - 2.0**-mantissa))
    return Grid(mantissa, 1 - bias, highest)


def integer(bits: int) -> Grid:
    """-(2^(bits - 1) - 1) to 2^(bits - 1) - 1."""
    return Grid(bits - 1, bits - 1, 2.0 ** (bits - 1) - 1)


def floor_power(x: Tensor) -> Tensor:
    """The largest power of two up to x; zero of zero."""
    return torch.ldexp(torch.where(x > 0, 0.5, 0.0), x.frexp().exponent)


def ceil_power(x: Tensor) -> Tensor:
    """The smallest power of two from x on; zero of zero."""
    below = floor_power(x)
    return torch.where(below == x, x, 2 * below)


def nearest_power(x: Tensor) -> Tensor:
    """The power of two with the least difference to x; zero of zero."""
    return floor_power(x * (4 / 3))


@njit(nogil=True, cache=True, inline="always")
def power_of(y, smallest):  # type: ignore[no-untyped-def]
    """Bits of the power of two that the step at y >= 0 belongs to."""
    return np.int32(max(np.int32(np.float32(y).view(np.int32) & EXPONENT), smallest))


@njit(nogil=True, cache=True, inline="always")
def inverse_step(power, mantissa):  # type: ignore[no-untyped-def]
    """One over the distance of levels from a power of two on."""
    return np.int32(np.int32(np.int32(254 << 23) - power) + np.int32(mantissa << 23)).view(np.float32)


@njit(nogil=True, cache=True, fastmath={"nsz"})
def nearest_level(size, smallest, steps):  # type: ignore[no-untyped-def]
    """The level nearest to a size up to the largest one. steps: `ROUNDER` times the step between 1 and 2.

    What is not allowed here is not done where this is called either, but only because it is said: a compiled function
    takes the freedoms of whoever has it compiled, unless it has some of its own.
    """
    power = np.int32(max(np.int32(np.float32(size).view(np.int32) & EXPONENT), smallest))
    rounder = power.view(np.float32) * steps
    return (size + rounder) - rounder


@njit(nogil=True, cache=True, fastmath={"nnan", "nsz", "contract"}, error_model="numpy")
def round_row(v, s, smallest, mantissa, highest, center, codes):  # type: ignore[no-untyped-def]
    """Fills codes with the indices of the levels nearest to v / s; ties go to the even multiple of the step."""
    shift = np.uint32(np.uint32(23 - mantissa) & np.uint32(31))
    for j in range(len(v)):
        y = v[j] / s[j]
        size = min(abs(y), highest)
        power = power_of(size, smallest)
        whole = np.int32(np.uint32(np.uint32(power - smallest) >> shift))
        code = np.int32(whole + np.int32(np.rint(size * inverse_step(power, mantissa))))
        codes[j] = np.uint8(np.int32(center - code) if y < 0 else np.int32(center + code))


@njit(nogil=True, cache=True)
def round_rows(x, scale, smallest, mantissa, highest, center, codes, start, stop):  # type: ignore[no-untyped-def]
    """Fills codes, uint8 [N, C], for rows start to stop. x [N, C]; scale [N, G]; center: index of zero."""
    width = x.shape[1] // scale.shape[1]
    spread = np.empty(x.shape[1], np.float32)  # so that short groups make no short loops
    for n in range(start, stop):
        for g in range(scale.shape[1]):
            s = scale[n, g]
            spread[g * width : (g + 1) * width] = s if s != 0 else np.float32(np.inf)
        round_row(x[n], spread, smallest, mantissa, highest, center, codes[n])


@njit(nogil=True, cache=True, fastmath=FAST)
def products(v, weight, inverse, smallest, steps, highest):  # type: ignore[no-untyped-def]
    """Sums of weight x level and of weight level^2 of a group, in units of a scale whose inverse is given."""
    xl, ll = np.float32(0.0), np.float32(0.0)
    for j in range(len(v)):
        size = abs(v[j]) * inverse
        level = nearest_level(min(size, highest), smallest, steps)
        weighed = weight[j] * level
        xl += weighed * size
        ll += weighed * level
    return xl, ll


@njit(nogil=True, cache=True)
def long_products(v, weight, inverse, smallest, steps, highest):  # type: ignore[no-untyped-def]
    """As `products`, in float64 beyond a length at which sums in float32 would tell too little."""
    xl, ll = 0.0, 0.0
    for a in range(0, len(v), PART):
        more_xl, more_ll = products(v[a : a + PART], weight[a : a + PART], inverse, smallest, steps, highest)
        xl += more_xl
        ll += more_ll
    return np.float32(xl), np.float32(ll)


@njit(nogil=True, cache=True, fastmath=FAST)
def score_rows(x, importance, tries, free, smallest, mantissa, highest, scale, start, stop):  # type: ignore[no-untyped-def]
    """Fills scale [N, G] with the best of tries [N, G, S] for rows start to stop. x [N, C]; importance [C].

    If `free`, a try is closed by weighted least squares, else it is a scale as it is stored.
    """
    width, steps = x.shape[1] // scale.shape[1], ROUNDER * np.float32(2.0**-mantissa)
    for n in range(start, stop):
        for g in range(scale.shape[1]):
            v, weight = x[n, g * width : (g + 1) * width], importance[g * width : (g + 1) * width]
            best, scale[n, g] = np.float32(-1.0), tries[n, g, 0]
            for i in range(tries.shape[2]):
                s = tries[n, g, i]
                repeated = s == 0
                for k in range(i):
                    repeated |= tries[n, g, k] == s
                if repeated:
                    continue
                if width > PART:
                    xl, ll = long_products(v, weight, np.float32(1.0) / s, smallest, steps, highest)
                else:
                    xl, ll = products(v, weight, np.float32(1.0) / s, smallest, steps, highest)
                ratio = s / max(tries[n, g, 0], np.float32(1e-37))  # squares of small weights would be zero
                moved = xl / ll if free and ll > 0 else np.float32(1.0)
                gain = ratio * ratio * moved * (np.float32(2.0) * xl - moved * ll)
                if gain > best:
                    best, scale[n, g] = gain, s * moved if free else s


@njit(nogil=True, cache=True)
def largest_rows(x, factor, largest, start, stop):  # type: ignore[no-untyped-def]
    """Fills largest int32 [N, G], float32 taken as integers, which sort alike, for rows start to stop of x [N, C].

    factor: float32 [C], or empty.
    """
    width = x.shape[1] // largest.shape[1]
    scaled = np.empty(len(factor), np.float32)
    for n in range(start, stop):
        for j in range(len(factor)):
            scaled[j] = x[n, j] * factor[j]
        bits = (scaled if len(factor) else x[n]).view(np.int32)
        for g in range(largest.shape[1]):
            v, found = bits[g * width : (g + 1) * width], np.int32(0)
            for j in range(width):
                found = max(found, v[j] & SIZE)
            largest[n, g] = found


def largest(x: Tensor, groups: int, factor: Tensor | None = None) -> Tensor:
    """Largest magnitude of each group, NaN if it holds one, times a factor of the column, [C].

    float32 [N, C] -> [N, G].
    """
    if x.device.type != "cpu":
        return (x if factor is None else x * factor).abs().view(len(x), groups, -1).amax(-1)
    factors = np.empty(0, np.float32) if factor is None else factor.contiguous().numpy()
    values, found = x.contiguous().numpy(), np.empty((len(x), groups), np.int32)
    over_rows(lambda a, b: largest_rows(values, factors, found, a, b), len(values))
    return torch.from_numpy(found).view(torch.float32)


def nearest_levels(x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """Indices of the levels nearest to x / scale: float32 [N, C], finite, and [N, G] -> uint8 [N, C].

    As in a saturating cast, ties go to the even multiple of the step, which has the even bit pattern where there is a
    mantissa, and what lies beyond the last level to that level.
    """
    center = len(positive_levels(grid))
    if x.device.type != "cpu":
        return _nearest_apart(x, scale, grid, center)
    codes = np.empty(x.shape, np.uint8)
    arrays = x.contiguous().cpu().numpy(), scale.contiguous().cpu().numpy()
    over_rows(lambda a, b: round_rows(*arrays, *grid.numbers, np.int32(center), codes, a, b), len(codes))
    return torch.from_numpy(codes).to(x.device)


def _nearest_apart(x: Tensor, scale: Tensor, grid: Grid, center: int) -> Tensor:
    """`nearest` by operations of torch, step by step those of `round_row`."""
    groups = torch.where(scale == 0, torch.inf, scale).unsqueeze(-1)
    y = (x.reshape(*scale.shape, -1) / groups).view(x.shape)
    size = y.abs().clamp_max(grid.highest)
    smallest, mantissa = int(grid.numbers[0]), grid.mantissa
    power = (size.view(torch.int32) & int(EXPONENT)).clamp_min(smallest)
    inverse = ((254 << 23) - power + (mantissa << 23)).view(torch.float32)
    code = ((power - smallest) >> (23 - mantissa)) + (size * inverse).round().int()
    return torch.where(y < 0, center - code, center + code).to(torch.uint8)


def best_scale(x: Tensor, importance: Tensor | None, tries: Tensor, grid: Grid, free: bool) -> Tensor:
    """The scale with the least weighted squared error, of those tried.

    Args:
        x: float32 [N, C].
        importance: float32 [C] or None.
        tries: float32 [N, G, S], positive.
        grid: levels to round to.
        free: whether scales may be moved to the optimum for the codes that a try finds; if not, they are as stored.

    Returns:
        float32 [N, G].
    """
    values, weight, _ = prepared(x, importance, x.shape[1] // tries.shape[1])
    found = np.zeros(tuple(tries.shape[:2]), np.float32)
    candidates = tries.contiguous().cpu().numpy()
    over_rows(lambda a, b: score_rows(values, weight, candidates, free, *grid.numbers, found, a, b), len(values))
    return torch.from_numpy(found).to(x.device)
