"""Inputs as a runtime rounds them: token by token, or with scales for all tokens that calibration found.

Shape letters: R rows, each with a scale of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qtool.checkpoint._base import Layer, Static
from qtool.formats._base import Format
from qtool.numerics.grids.through import through
from qtool.numerics.histogram import Histogram

FACTORS = torch.logspace(0, -5, 41, 2.0)
"""Ranges tried, relative to the one that covers everything; 1 is the first."""


def rounded(x: Tensor, layer: Layer) -> Tensor:
    """Rounds a layer's inputs, [..., K], if it wants that; not before it is known how, where calibration finds out.

    Gradients go straight through.
    """
    if layer.activations is None:
        return x
    if x.requires_grad:
        return through(x, rounded(x.detach(), layer))
    if layer.activations.static:
        return x if layer.static is None else quantize_static(x, layer.activations, layer.static)
    return quantize_tokens(x, layer.activations)


def quantize_tokens(x: Tensor, fmt: Format) -> Tensor:
    """Rounds every token's vector as a runtime does, by that vector alone: [..., K] -> same shape and dtype."""
    rows, fmt = x.flatten(0, -2).float(), fmt.at_run_time()
    params = fmt.fit(rows)
    return fmt.decode(fmt.snap(rows, params), params).to(x.dtype).view(x.shape)


def quantize_static(x: Tensor, fmt: Format, static: Static) -> Tensor:
    """Rounds all inputs, [..., K], with one scale, and with those of groups inside of it: -> same shape and dtype."""
    rows = x.reshape(1, -1) if fmt.group_columns is None else x.flatten(0, -2)
    return quantize_rows(rows, fmt, (static,)).view(x.shape)


def quantize_rows(rows: Tensor, fmt: Format, statics: Sequence[Static]) -> Tensor:
    """Rounds each of R rows, [R, ...], with a scale of its own, or all of them with one: -> same shape and dtype."""
    x = rows.float()
    static = {
        "scale": torch.tensor([[s.scale] for s in statics], dtype=torch.float64, device=x.device),
        "zero": torch.tensor([[s.zero] for s in statics], dtype=torch.int8, device=x.device),
    }

    def nearest(part: Tensor) -> Tensor:
        params = fmt.completed(part, static)
        return fmt.decode(fmt.snap(part, params), params)

    found = nearest(x)
    if count := fmt.augmented:
        found[:, :count] += nearest((x - found)[:, :count])
    return found.to(rows.dtype)


def fit_static(values: Histogram, fmt: Format) -> tuple[Static, ...]:
    """The scales, and zero points, that numbers of a distribution are rounded with; one for each of its rows.

    Args:
        values: what calibration saw.
        fmt: with one scale a row; see `Format.ranges` for how it wants it to be chosen.
    """
    if fmt.ranges == "search":
        low, high = searched(values, fmt)
    elif isinstance(fmt.ranges, str):
        low, high = values.low, values.high
    else:
        low, high = values.inner(fmt.ranges / 100)
    found = fmt.covering(low, high)
    zeros = found["zero"].flatten().tolist() if "zero" in found else [0] * len(low)
    return tuple(map(Static, found["scale"].flatten().tolist(), zeros))


def searched(values: Histogram, fmt: Format) -> tuple[Tensor, Tensor]:
    """The range that leaves the least squared error, (low, high), float32 [R]; one end is found after the other."""
    centers = values.centers()

    def best(ends: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        errors = []
        for factor in FACTORS:
            params = fmt.covering(*ends(factor))
            apart = fmt.decode(fmt.snap(centers, params), params) - centers
            errors.append((apart.double().square_() * values.counts).sum(1))
        return FACTORS[torch.stack(errors).argmin(0)]

    both = best(lambda f: (values.low * f, values.high * f))
    below = best(lambda f: (values.low * f, values.high * both))
    above = best(lambda f: (values.low * below, values.high * f))
    return values.low * below, values.high * above
