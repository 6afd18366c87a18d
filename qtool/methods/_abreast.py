"""GPTQ of several matrices of one size side by side, on devices that one of them would leave idle most of the time.

Experts of a mixture are small, and a walk goes column by column: a device with thousands of lanes has work for a few
hundred rows then. Matrices with inputs of their own are gone through together here, as far as a format searches its
scales within the walk's kernel.

Shape letters: M matrices, N rows of each, K columns, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.formats._base import Format, Quantized
from qtool.methods._refine import refine
from qtool.numerics.scales.search import IntegerScales, reach, relative
from qtool.numerics.solving.linalg import inverse_factors
from qtool.numerics.solving.split import SMALL, Split
from qtool.numerics.solving.walk import searches

ROWS = 64
"""Rows of a matrix come in multiples of it: the most that a kernel's program takes."""


def rule_of(fmt: Format, k: int) -> IntegerScales | None:
    """How scales are searched; None: matrices of this format and so many columns are solved one by one."""
    if k > SMALL or fmt.free_offset or fmt.group_rows != 1 or fmt.block_columns in (None, k):
        return None
    rule = fmt.on_the_way().search_in_walk()
    return rule if isinstance(rule, IntegerScales) and searches(rule) else None


def walked(w: Tensor, order: Tensor, factor: Tensor, fmt: Format, rule: IntegerScales) -> Quantized:
    """Codes and parameters behind the walk.

    Args:
        w: float32 [M, N, K].
        order: of columns, int64 [M, K].
        factor: float32 [M, K, K], see `linalg.inverse_factor`, in that order.
        fmt: the format.
        rule: its search.

    Returns:
        Those of all rows, [M N, K].
    """
    from qtool.numerics.solving.cuda_integers import walk_integers

    (m, n, k), width = w.shape, rule.columns
    weight = factor.diagonal(dim1=1, dim2=2).square().reciprocal()
    counts = relative(weight.flatten(), m * k, m * k // width).view(m, k)
    columns = order[:, None, :].expand(-1, n, -1)
    found, params = walk_integers(w.gather(2, columns).flatten(0, 1), factor, rule, counts, reach(counts))
    codes = torch.empty(m, n, k, dtype=torch.uint8, device=w.device)
    codes.scatter_(2, columns, found.view(m, n, k))
    groups = (order[:, ::width] // width).argsort(1)[:, None, :].expand(-1, n, -1)
    natural = [p.view(m, n, -1).gather(2, groups).flatten(0, 1) for p in params]
    return Quantized(codes.flatten(0, 1), fmt.of_search(*natural), fmt)


def solve_abreast(
    w: Tensor, grams: Tensor, order: Tensor, fmt: Format, damp: float, rounds: int, sweeps: int
) -> Quantized | None:
    """Walk and refinement of several matrices.

    Args:
        w: float32 [M, N, K].
        grams: of their inputs, float32 [M, K, K].
        order: in which columns are walked, int64 [M, K].
        fmt: a format with a `rule_of`.
        damp: see `GPTQ`.
        rounds: see `GPTQ`.
        sweeps: see `refine`.

    Returns:
        All rows, [M N, K]; None if a Gram matrix cannot be factorized with that damping.
    """
    rule = rule_of(fmt, w.shape[2])
    assert rule is not None
    place = torch.arange(len(w), device=w.device)[:, None, None]
    factor = inverse_factors(grams[place, order[:, :, None], order[:, None, :]], damp)
    if factor is None:
        return None
    quantized = walked(w, order, factor, fmt, rule)
    del factor
    if not rounds:
        return quantized
    damped = grams.clone()
    diagonal = damped.diagonal(dim1=1, dim2=2)
    diagonal += damp * diagonal.mean(1, keepdim=True)
    return refine(w.flatten(0, 1), Split(damped), quantized, rounds, sweeps)
