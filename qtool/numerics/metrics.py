"""How far a quantized matrix is from the original, as signal over error in decibels: 6.02 dB is one bit.

Shape letters: N output features, K input features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ratio_db(signal: float, error: float) -> float:
    """10 log10(signal / error); infinite where there is no error, minus infinite where there is no signal but error."""
    if error <= 0:
        return math.inf
    return 10 * math.log10(signal / error) if signal > 0 else -math.inf


def sqnr_db(w: Tensor, w_hat: Tensor) -> float:
    """Signal to quantization noise, 10 log10(|W|^2 / |W - W_hat|^2), of two [N, K] matrices."""
    return ratio_db(energy(w), energy(w - w_hat))


def output_error_db(w: Tensor, w_hat: Tensor, gram: Tensor) -> float:
    """The same of the outputs X W^T on the calibration tokens, known from their Gram matrix alone.

    |X W^T|^2 = tr(W G W^T) with G = X^T X.

    Args:
        w: [N, K].
        w_hat: [N, K], what a runtime multiplies with.
        gram: G, [K, K].
    """
    error = w - w_hat
    return ratio_db(energy(w, gram), energy(error, gram))


def energy(w: Tensor, gram: Tensor | None = None) -> float:
    """|W|^2, or tr(W G W^T), summed in float64."""
    other = w if gram is None else w @ gram
    return float(torch.einsum("nk,nk->n", w, other).double().sum())
