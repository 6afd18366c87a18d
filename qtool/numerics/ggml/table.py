"""ggml's encoder of IQ4_NL and IQ4_XS, `quantize_row_iq4_nl_impl`, repeated to the last bit; see `ggml.search`."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.checks import searchable
from qtool.numerics.ggml.groups import EPSILON, F32
from qtool.numerics.threads.parallel import over_rows

TRIES = 7


@njit(nogil=True, cache=True, error_model="numpy")
def weigh_row(x, importance, block, side, weight):  # type: ignore[no-untyped-def]
    """Fills side and weight [C, G], the values of a row [K] side by side and how much ggml lets their errors count.

    importance [K], or [0] where there is none; block: columns whose mean of x^2 counts.
    """
    width = len(side)
    for s in range(len(x) // block):
        mean = F32(0)
        for j in range(s * block, (s + 1) * block):
            mean += x[j] * x[j]
        mean *= F32(2) / F32(block)
        for g in range(s * block // width, (s + 1) * block // width):
            for c in range(width):
                value = x[g * width + c]
                side[c, g], weight[c, g] = value, value * value
                if len(importance):
                    weight[c, g] = importance[g * width + c] * np.sqrt(mean + value * value)


@njit(nogil=True, cache=True, error_model="numpy")
def sweep_row(x, weight, table, low, scale, work):  # type: ignore[no-untyped-def]
    """Fills scale [G] of x [C, G] ~ scale * level; for `table` and `low` see `table_search.look_up`; work [5, G]."""
    extreme, inverse, best, xl, ll = work[0], work[1], work[2], work[3], work[4]
    extreme[:], scale[:], best[:], last = F32(0), F32(0), F32(0), F32(len(table) - 1)
    for c in range(len(x)):
        for g in range(len(scale)):
            extreme[g] = x[c, g] if abs(x[c, g]) > abs(extreme[g]) else extreme[g]
    for turn in range(-TRIES - 1, TRIES + 1):
        first = turn < -TRIES
        for g in range(len(scale)):
            inverse[g] = F32(1) / (-extreme[g] / low) if first else (F32(turn) + low) / extreme[g]
            inverse[g] = inverse[g] if abs(extreme[g]) >= EPSILON else F32(0)
        xl[:], ll[:] = F32(0), F32(0)
        for c in range(len(x)):
            for g in range(len(scale)):
                at = (inverse[g] * x[c, g] - low) * F32(2)
                at = at if at > 0 else F32(0)
                level = table[max(np.int32(at if at < last else last), np.int32(0))]
                xl[g] += weight[c, g] * level * x[c, g]
                ll[g] += weight[c, g] * level * level
        for g in range(len(scale)):
            if ll[g] > 0 and (first or xl[g] * xl[g] > best[g] * ll[g]):
                scale[g] = xl[g] / ll[g]
                best[g] = scale[g] * xl[g]
    for g in range(len(scale)):
        scale[g] = scale[g] if abs(extreme[g]) >= EPSILON else F32(0)


@njit(nogil=True, cache=True, error_model="numpy")
def table_rows(x, importance, table, low, limit, d, m, start, stop):  # type: ignore[no-untyped-def]
    """Fills d [N, S] and m [N, G] for rows start to stop of x [N, K]; see `ggml_table_scales`."""
    groups, blocks = m.shape[1], d.shape[1]
    per, width = groups // blocks, x.shape[1] // groups
    side, weight = np.empty((width, groups), F32), np.empty((width, groups), F32)
    work, scale = np.empty((5, groups), F32), np.empty(groups, F32)
    for n in range(start, stop):
        weigh_row(x[n], importance, per * width, side, weight)
        sweep_row(side, weight, table, low, scale, work)
        for s in range(blocks):
            largest = F32(0)
            for g in range(s * per, (s + 1) * per):
                largest = scale[g] if abs(scale[g]) > abs(largest) else largest
            d[n, s] = largest if per == 1 else -largest / limit
            inverse = F32(1) / d[n, s] if d[n, s] != 0 else F32(0)
            for g in range(s * per, (s + 1) * per):
                m[n, g] = 1 if per == 1 else min(max(np.rint(inverse * scale[g]), -limit), limit - F32(1))


def ggml_table_scales(
    x: Tensor, importance: Tensor | None, table: np.ndarray, low: float, groups: int, limit: int
) -> tuple[Tensor, Tensor]:
    """What ggml takes.

    Args:
        x: float32 [N, K].
        importance: float32 [K] or None.
        table: of levels, see `table_search.look_up`.
        low: the first level.
        groups: of 32 columns in a block; one alone has the multiplier 1.
        limit: multipliers lie in [-limit, limit - 1].

    Returns:
        (d, float32 [N, S], not yet in fp16; multipliers, float32 [N, G] of integers).
    """
    known = np.empty(0, np.float32) if importance is None else importance.float().contiguous().cpu().numpy()
    values = searchable(x)
    m = np.zeros((len(x), x.shape[1] // 32), np.float32)
    d = np.zeros((len(x), m.shape[1] // groups), np.float32)
    ends = np.float32(low), np.float32(limit)
    over_rows(lambda a, b: table_rows(values, known, table, *ends, d, m, a, b), len(values))
    return torch.from_numpy(d).to(x.device), torch.from_numpy(m).to(x.device)
