"""Inputs as a runtime rounds them: token by token, or all with one scale that calibration found."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.checkpoint._base import Layer, Static
from qtool.formats._base import Format
from qtool.numerics.histogram import Histogram

FACTORS = torch.logspace(0, -5, 41, 2.0).tolist()
"""Ranges tried, relative to the one that covers everything; 1 is the first."""


def rounded(x: Tensor, layer: Layer) -> Tensor:
    """Rounds a layer's inputs, [..., K], if it wants that; not before it is known how, where calibration finds out."""
    if layer.activations is None:
        return x
    if layer.activations.static:
        return x if layer.static is None else quantize_static(x, layer.activations, layer.static)
    return quantize_tokens(x, layer.activations)


def quantize_tokens(x: Tensor, fmt: Format) -> Tensor:
    """Rounds every token's vector as a runtime does, by that vector alone: [..., K] -> same shape and dtype."""
    rows, fmt = x.flatten(0, -2).float(), fmt.at_run_time()
    params = fmt.fit(rows)
    return fmt.decode(fmt.snap(rows, params), params).to(x.dtype).view(x.shape)


def quantize_static(x: Tensor, fmt: Format, static: Static) -> Tensor:
    """Rounds all numbers with one scale: any shape -> same shape and dtype."""
    row = x.reshape(1, -1).float()
    params = {name: p.to(x.device) for name, p in static.params().items()}
    return fmt.decode(fmt.snap(row, params), params).to(x.dtype).view(x.shape)


def fit_static(values: Histogram, fmt: Format) -> Static:
    """The scale, and zero point, that inputs are rounded with.

    Args:
        values: of the inputs on calibration tokens.
        fmt: with one scale for a whole matrix. Where it covers everything (`scales: minmax`), so does the result;
            else the range is the one that least squared error is left with, its ends searched one after the other.
    """
    covering = fmt.model_copy(update={"scales": "minmax"})
    centers = values.centers().view(1, -1)

    def fitted(ends: tuple[float, float]) -> Static:
        found = covering.fit(torch.tensor([[values.low * ends[0], values.high * ends[1]]]))
        return Static(float(found["scale"]), int(found.get("zero", 0)))

    def error(ends: tuple[float, float]) -> float:
        rounded = quantize_static(centers, fmt, fitted(ends))
        return float(((rounded - centers).double().square() * values.counts).sum())

    if covering == fmt:
        return fitted((1.0, 1.0))
    both = min(FACTORS, key=lambda f: error((f, f)))
    low = min(FACTORS, key=lambda f: error((f, both)))
    return fitted((low, min(FACTORS, key=lambda f: error((low, f)))))
