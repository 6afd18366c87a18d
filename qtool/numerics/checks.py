"""What numbers have to be: finite; for searches, weights whose squares do not overflow and comparable importances.

Shape letters: N rows, C columns.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.errors import NumericsError
from qtool.numerics.metrics import all_finite
from qtool.numerics.threads.parallel import over_rows

LARGEST = 2.0**48
"""The largest weight that is searched: its square, weighted and summed over a row, stays below the end of float32."""
USUAL = 40
"""Exponents of importances that are left as they are, above zero and below."""
MOST = np.float32(LARGEST).view(np.int32)
SIZE = np.int32(0x7FFFFFFF)
"""Bits of a float32: all but its sign. Taken as integers, they sort as the numbers do, NaN and infinity last."""


@njit(nogil=True, cache=True)
def largest_bits(bits, found, start, stop):  # type: ignore[no-untyped-def]
    """Fills found [N], the largest of the bits of sizes in each row of int32 [N, C], for rows start to stop."""
    for n in range(start, stop):
        most = np.int32(0)
        for j in range(bits.shape[1]):
            most = max(most, bits[n, j] & SIZE)
        found[n] = most


WATCH = threading.local()


@contextmanager
def checked_later() -> Iterator[None]:
    """Within it, this thread waits for no number only to refuse it; what is kept is computed anew outside."""
    before = getattr(WATCH, "later", False)
    WATCH.later = True
    try:
        yield
    finally:
        WATCH.later = before


def unwatched(x: Tensor) -> bool:
    """Whether numbers are not to be waited for: they are checked later, or operations are recorded to be replayed."""
    return getattr(WATCH, "later", False) or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def searchable(w: Tensor) -> np.ndarray:
    """float32 [N, C] on the CPU, rows in order. Raises NumericsError: NaN, or larger than `LARGEST`."""
    values = w.float().contiguous().cpu().numpy()
    found = np.zeros(len(values), np.int32)
    over_rows(lambda a, b: largest_bits(values.view(np.int32), found, a, b), len(values))
    if len(found) and found.max() > MOST:
        refuse_large(float(found.max().view(np.float32)), LARGEST)
    return values


def refuse_unsearchable(w: Tensor) -> None:
    """Raises NumericsError where a matrix is, [N, C]: NaN, or larger than `LARGEST`."""
    if w.numel() and not (most := float(torch.stack(w.aminmax()).abs().max())) <= LARGEST:
        refuse_large(most, LARGEST)


def refuse_large(largest: float, limit: float) -> None:
    """Raises NumericsError: no scale is searched for weights beyond a limit."""
    what = "weights are out of the range in which scales are searched"
    raise NumericsError(what, wanted=f"at most {limit:g} in size", found=f"{largest:g}")


def importances(importance: Tensor | None, columns: int) -> Tensor:
    """How much columns count, float32 [C]; ones where nothing is known.

    Very large or small ones are multiplied by a power of two, which no comparison notices, so that no sum overflows.

    Raises:
        NumericsError: one is negative, infinite or NaN.
    """
    if importance is None:
        return torch.ones(columns)
    exact = importance.double()
    least, most = torch.stack(exact.aminmax()).tolist()  # one look at a device; NaN shows in both
    if not (least >= 0 and most < math.inf):
        odd = exact[~((exact >= 0) & (exact < torch.inf))][0]
        raise NumericsError("importances of inputs", wanted="finite numbers from 0 on", found=f"{float(odd):g}")
    exponent = math.frexp(most)[1]
    return (exact if abs(exponent) < USUAL else exact * 2.0**-exponent).float()


def finite(tensor: Tensor, name: str, hint: str | None = None) -> Tensor:
    """Returns the tensor unchanged. An error says its name, and the hint.

    Raises:
        NumericsError: it holds NaN or Inf.
    """
    if all_finite(tensor):
        return tensor
    good = torch.isfinite(tensor)
    first = int(good.reshape(-1).to(torch.uint8).argmin())
    index = [int(i) for i in torch.unravel_index(torch.tensor(first), tensor.shape)]
    value = float(tensor.reshape(-1)[first])
    bad = int((~good).sum())
    found = f"{value} at {index}, {bad} of {tensor.numel()} values"
    raise NumericsError(f"tensor {name} is not finite", found=found, hint=hint)
