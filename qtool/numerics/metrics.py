"""How far a quantized matrix is from the original, as signal over error in decibels: 6.02 dB is one bit.

Shape letters: N output features, K input features, S blocks of a row, M matrices.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.solving.gram import strips
from qtool.numerics.threads.parallel import over_rows


def all_finite(x: Tensor) -> bool:
    """True if no number is infinite or NaN; a sum, which tells nearly always, takes a third of the time of a look."""
    return math.isfinite(x.sum(dtype=torch.float32)) or bool(x.isfinite().all())


def energy(w: Tensor, gram: Tensor | None = None) -> float:
    """Sum of squares of a matrix, or of its outputs on the calibration tokens.

    The outputs X W^T need not be there: |X W^T|^2 = tr(W G W^T) with G = X^T X, of which one triangle tells all.

    Args:
        w: [N, K].
        gram: G, [K, K]; None: the matrix itself.
    """
    if gram is None:
        return float(torch.linalg.vector_norm(w, dim=1).double().square().sum())
    rows = torch.zeros(len(w), dtype=torch.float64, device=w.device)
    for a, b in strips(w.shape[1], w.device):
        here = w[:, a:b]
        seen = here @ gram[a:b, a:b]
        seen.addmm_(w[:, b:], gram[b:, a:b], alpha=2)
        rows += seen.mul_(here).sum(1)  # sooner than einsum, which makes a product of matrices of every row
    return float(rows.sum())


def energies(w: Tensor, grams: Tensor | None = None) -> Tensor:
    """`energy` of several matrices, where they are: [M, N, K] and [M, K, K] -> float64 [M]."""
    if grams is None:
        return torch.einsum("mnk,mnk->mn", w, w).double().sum(1)
    rows = torch.zeros(w.shape[:2], dtype=torch.float64, device=w.device)
    for a, b in strips(w.shape[2], w.device):
        here = w[..., a:b]
        seen = torch.baddbmm(here @ grams[:, a:b, a:b], w[..., b:], grams[:, b:, a:b], alpha=2)
        rows += torch.einsum("mnk,mnk->mn", here, seen)
    return rows.sum(1)


def ratio_db(signal: float, error: float) -> float:
    """10 log10(signal / error); infinite where there is no error, minus infinite where there is no signal but error."""
    if error <= 0:
        return math.inf
    return 10 * math.log10(signal / error) if signal > 0 else -math.inf


@njit(nogil=True, cache=True)
def block_error_rows(w, w_hat, importance, errors, start, stop):  # type: ignore[no-untyped-def]
    """Fills errors [N, S] for rows start to stop."""
    width = w.shape[1] // errors.shape[1]
    for n in range(start, stop):
        for s in range(errors.shape[1]):
            total = 0.0
            for k in range(s * width, (s + 1) * width):
                error = np.float64(w_hat[n, k]) - np.float64(w[n, k])
                total += np.float64(importance[k]) * error * error
            errors[n, s] = total


def block_errors(w: Tensor, w_hat: Tensor, importance: Tensor | None, blocks: int) -> Tensor:
    """Weighted squared error of every block of a row, summed in 64 bits.

    Args:
        w: float32 [N, K].
        w_hat: float32 [N, K], what a runtime decodes.
        importance: float32 [K] or None.
        blocks: S.

    Returns:
        float64 [N, S], on the device of w.
    """
    weight = torch.ones(w.shape[1]) if importance is None else importance.float()
    errors = np.empty((len(w), blocks))
    arrays = [t.contiguous().cpu().numpy() for t in (w, w_hat, weight)]
    over_rows(lambda a, b: block_error_rows(*arrays, errors, a, b), len(errors))
    return torch.from_numpy(errors).to(w.device)
