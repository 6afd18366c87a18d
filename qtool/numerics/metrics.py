"""How far a quantized matrix is from the original, as signal over error in decibels: 6.02 dB is one bit.

Shape letters: N output features, K input features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def all_finite(x: Tensor) -> bool:
    """True if no number is infinite or NaN; a sum, which tells nearly always, takes a third of the time of a look."""
    return math.isfinite(x.sum(dtype=torch.float32)) or bool(x.isfinite().all())


def energy(w: Tensor, gram: Tensor | None = None) -> float:
    """Sum of squares of a matrix, or of its outputs on the calibration tokens.

    The outputs X W^T need not be there: |X W^T|^2 = tr(W G W^T) with G = X^T X.

    Args:
        w: [N, K].
        gram: G, [K, K]; None: the matrix itself.
    """
    other = w if gram is None else w @ gram
    return float(torch.einsum("nk,nk->n", w, other).double().sum())


def ratio_db(signal: float, error: float) -> float:
    """10 log10(signal / error); infinite where there is no error, minus infinite where there is no signal but error."""
    if error <= 0:
        return math.inf
    return 10 * math.log10(signal / error) if signal > 0 else -math.inf
