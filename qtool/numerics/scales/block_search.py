"""Error-minimizing scales, and minima, of blocks of 32 columns with one fp16 scale each: GGUF's classic types.

    w_hat = d * l + m        levels l are consecutive integers; d and m fp16, m is 0 where a type has none

Every block takes the better of a wide sweep over clipping ratios that is closed by least squares, and of
another choice, such as ggml's; from there codes and parameters alternate.

Shape letters: N rows, C columns, G blocks of a row, T trials of a sweep.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.scales.kquant import FLOOR, group_error, moments
from qtool.numerics.scales.search import FAST, prepared
from qtool.numerics.scales.sweep import F32, free_offset, free_scale, half, offset_trials, signed_trials
from qtool.numerics.threads.parallel import over_rows

WIDTH = 32


class Block(NamedTuple):
    """One block type.

    Attributes:
        lowest, highest: first and last level.
        minima: whether blocks have m.
    """

    lowest: np.float32
    highest: np.float32
    minima: bool


class BlockEffort(NamedTuple):
    """How hard to search.

    Attributes:
        trials: of the sweep.
        near: see `sweep.free_offset`.
        rounds: alternations after the sweep.
    """

    trials: int
    near: np.float32
    rounds: int


EFFORT = {
    "fast": BlockEffort(32, F32(0.4), 0),
    "default": BlockEffort(64, F32(0.75), 3),
    "thorough": BlockEffort(160, F32(0.75), 10),
}


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def closed_form(x, weight, scale, offset, kind):  # type: ignore[no-untyped-def]
    """(scale, offset) by least squares for the codes that a present pair gives."""
    w, wl, wll, wr, wrl = moments(x, weight, scale, offset, kind.lowest, kind.highest)
    if not kind.minima:
        return (scale + wrl / wll if wll > 0 else scale), F32(0)
    spread = w * wll - wl * wl
    if spread <= F32(1e-6) * w * wll:
        return scale, offset
    return scale + (w * wrl - wl * wr) / spread, offset + (wll * wr - wl * wrl) / spread


@njit(nogil=True, cache=True, fastmath=FAST, error_model="numpy")
def swept(x, weight, reach, near, kind, table, sums):  # type: ignore[no-untyped-def]
    """(scale, offset) of our own sweep."""
    if kind.minima:
        found = free_offset(x, weight, reach, near, F32(np.inf), table, kind.highest, sums)
        return found[0], found[1]
    return free_scale(x, weight, reach, near, table, kind.lowest, kind.highest, sums)[0], F32(0)


@njit(nogil=True, cache=True, error_model="numpy")
def block_rows(x, weight, reach, kind, effort, table, other, scale, offset, start, stop):  # type: ignore[no-untyped-def]
    """Fills scale, offset [N, G] for rows start to stop. x [N, C], weight and reach [C], table [2, T].

    other: scale and offset found another way (ggml's), or empty ones.
    """
    sums = np.empty((4, table.shape[1]), F32)
    for n in range(start, stop):
        for g in range(x.shape[1] // WIDTH):
            part = slice(g * WIDTH, (g + 1) * WIDTH)
            xg, wg = x[n, part], weight[part]
            s, o = swept(xg, wg, reach[part], effort.near, kind, table, sums)
            scale[n, g], offset[n, g] = half(s), half(o)
            least = group_error(xg, wg, scale[n, g], offset[n, g], kind.lowest, kind.highest)
            for attempt in range(0 if len(other[0]) else 1, effort.rounds + 1):
                if attempt == 0:
                    s, o = other[0][n, g], other[1][n, g]
                else:
                    s, o = closed_form(xg, wg, scale[n, g], offset[n, g], kind)
                s, o = half(s), half(o)
                found = group_error(xg, wg, s, o, kind.lowest, kind.highest)
                if found < least:
                    least, scale[n, g], offset[n, g] = found, s, o
                elif attempt > 0:
                    break


def search_blocks(
    x: Tensor, importance: Tensor | None, kind: Block, effort: BlockEffort, other: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Parameters of all blocks.

    Args:
        x: float32 [N, C].
        importance: float32 [C] or None.
        kind: the block type.
        effort: how hard to search.
        other: parameters found another way (ggml's), from which the search goes on where they are the better start.

    Returns:
        (d, m), float32 [N, G], on the device of x.
    """
    values, weight, reach = prepared(x, importance, WIDTH)
    weight = np.maximum(weight, np.float32(FLOOR))
    found = [np.zeros((x.shape[0], x.shape[1] // WIDTH), np.float32) for _ in range(2)]
    starts = tuple(p.contiguous().cpu().numpy() for p in other or (torch.empty(0, 0),) * 2)
    trials, end = (offset_trials, kind.highest) if kind.minima else (signed_trials, kind.lowest)
    table = trials(int(end), effort.trials)
    over_rows(lambda a, b: block_rows(values, weight, reach, kind, effort, table, starts, *found, a, b), len(values))
    return torch.from_numpy(found[0]).to(x.device), torch.from_numpy(found[1]).to(x.device)
