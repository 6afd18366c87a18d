"""Sums of outer products, X^T X, grown batch by batch.

On processors that multiply 8-bit integers natively, a batch in bfloat16 is rounded to integers first, a step per
channel, and their products are summed exactly: three times as fast as in float32. Rounding adds to the diagonal about
REACH^2 / (12 * 127^2) of it, 0.3 percent, where methods add several times as much for stability, and the sum stays
positive semidefinite, as that of products of rounded inputs. Tokens with a number that stands out from its channel are
summed in float32.

Shape letters: T tokens, K channels.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.numerics.threads.parallel import CPU, over_rows, side_by_side
from qtool.numerics.threads.processor import has

REACH = 24.0
"""Largest number that is rounded, relative to its channel's root mean square in ordinary tokens of the first batch."""

ORDINARY = 64.0
"""Largest energy of an ordinary token, relative to the median; first tokens may exceed it a million times."""

QUIET = 1e-6
"""Smallest root mean square that a channel is given, relative to the mean over channels."""

PANEL, DEVICE_PANEL = 144, 1024
"""Smallest width of the strips in which the lower half is summed, on the CPU and on other devices."""

ENOUGH = 4096
"""Tokens whose products keep a CUDA device busy; an expert's wait until there are so many."""

FUSED = "dtype" in torch.ops.aten.mm.overloads()  # type: ignore[no-untyped-call]
"""Whether this torch can multiply 16-bit numbers into a float32 total."""

MOST_TOKENS = 1 << 17
"""Products of integers are moved to float32 after so many tokens; 2^31 / 127^2 of them fit."""

ROUNDED = 1 << 25
"""Bytes of rounded tokens that wait to be multiplied together: each product costs a pass over the matrix as well."""


def counts_fast() -> bool:
    """Whether the processor has instructions for sums of 8-bit products."""
    return has("avx512_vnni")


@njit(nogil=True, cache=True, error_model="numpy")
def round_tokens(bits, inverse, codes, far, start, stop):  # type: ignore[no-untyped-def]
    """Rounds tokens times inverse [K] to codes int8 [T, K]; one beyond +-127 becomes zeros and is `far`.

    `bits` uint16 [T, K] are those of bfloat16: the upper half of float32's.
    """
    for t in range(start, stop):
        near = True
        for k in range(bits.shape[1]):
            y = np.uint32(bits[t, k] << 16).view(np.float32) * inverse[k]
            near &= abs(y) <= np.float32(127)
            codes[t, k] = np.int8(np.rint(min(max(y, np.float32(-127)), np.float32(127))))
        far[t] = not near
        if far[t]:
            codes[t] = 0


@njit(nogil=True, cache=True)
def unfold_rows(lower, products, step, start, stop):  # type: ignore[no-untyped-def]
    """Adds products int32 [K, K], if there are any, in steps [K] to lower [K, K], and mirrors it at the diagonal."""
    for i in range(start, stop):
        if len(products):
            for j in range(i + 1):
                lower[i, j] += products[i, j] * (step[i] * step[j])
        for j in range(i):
            lower[j, i] = lower[i, j]


def strips(k: int, device: torch.device = CPU) -> list[tuple[int, int]]:
    """(start, stop) of the columns of strips that reach from the diagonal of a [K, K] matrix down.

    A symmetric matrix takes little more than half the work that way.
    """
    width = max(PANEL if device.type == "cpu" else DEVICE_PANEL, -(-k // 8))
    return [(a, min(a + width, k)) for a in range(0, k, width)]


def fuses(x: Tensor) -> bool:
    """Whether products of numbers of that type, on that device, can be summed in float32 without being float32."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and FUSED


def add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Adds X^T Y to a total, float32 [K, L]; x [T, K] and y [T, L] of one type, float32 or one that `fuses`."""
    if fuses(x):
        torch.addmm(total, x.T, y, torch.float32, out=total)
    else:
        total.addmm_(x.T, y)


class GramSum:
    """X^T X so far.

    Args:
        k: K.
        device: where it is summed.
    """

    def __init__(self, k: int, device: torch.device | str = "cpu") -> None:
        self.lower = torch.zeros(k, k, device=device)
        self.products = torch.zeros(0, 0, dtype=torch.int32)
        self.step = torch.zeros(0)
        self.summed = 0
        """Tokens in `products`."""
        self.codes: list[Tensor] = []
        self.few: list[Tensor] = []
        """Tokens that wait to be multiplied: rounded ones, and others."""

    def add(self, x: Tensor) -> None:
        """Counts tokens, [T, K] of any float type."""
        rounds = 0 < len(x) <= MOST_TOKENS and x.dtype == torch.bfloat16 and x.device.type == "cpu" and counts_fast()
        if rounds:
            x = self._round(x)
        if rounds or x.is_cuda:
            self.few.append(x)
            if sum(map(len, self.few)) >= ENOUGH:
                self._add_few()
        else:
            self._add_product(x.float())

    def _add_few(self) -> None:
        """Counts the tokens that wait and are not rounded."""
        if self.few:
            x = self.few[0] if len(self.few) == 1 else torch.cat(self.few)
            self.few = []
            self._add_product(x if fuses(x) else x.float())

    def _add_product(self, x: Tensor) -> None:
        """Counts tokens in float32."""
        for a, b in strips(len(self.lower), x.device) if len(x) else []:
            add_product(self.lower[a:, a:b], x[:, a:], x[:, a:b])

    def _round(self, x: Tensor) -> Tensor:
        """Has what can be rounded wait to be counted; returns the tokens that cannot, bfloat16 [T', K]."""
        if not len(self.step):
            squares = x.float().square_()
            energy = squares.sum(1)
            ordinary = (energy <= ORDINARY * energy.median()).float()
            size = (ordinary @ squares / ordinary.sum()).sqrt()
            self.step = torch.maximum(size, QUIET * size.mean()).clamp_min(1e-30) * (REACH / 127)
        codes, far = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x), dtype=torch.bool)
        bits = x.contiguous().view(torch.int16).numpy().view(np.uint16)
        arrays = [bits, *(t.numpy() for t in (1 / self.step, codes, far))]
        over_rows(lambda start, stop: round_tokens(*arrays, start, stop), len(x))
        self.codes.append(codes)
        if sum(map(torch.numel, self.codes)) >= ROUNDED:
            self._add_codes()
        return x[far]

    def _add_codes(self) -> None:
        """Counts the rounded tokens that wait."""
        if not self.codes:
            return
        codes = self.codes[0] if len(self.codes) == 1 else torch.cat(self.codes)
        self.codes = []
        if self.summed + len(codes) > MOST_TOKENS:
            self._unfold()
        if not self.summed:
            self.products = torch.zeros(self.lower.shape, dtype=torch.int32)
        self.summed += len(codes)

        @torch.inference_mode()
        def multiply(pair: set[tuple[int, int]]) -> None:
            for a, b in pair:
                self.products[a:, a:b] += torch._int_mm(codes[:, a:].T, codes[:, a:b])

        found = strips(len(self.lower))
        pairs = [set(pair) for pair in zip(found, reversed(found), strict=True)]
        side_by_side(multiply, pairs[: -(-len(pairs) // 2)])  # the longest with the shortest: all pairs take as long

    def _unfold(self) -> None:
        """Moves products of integers to float32, and mirrors the whole."""
        arrays = [t.numpy() for t in (self.lower, self.products, self.step)]
        over_rows(lambda start, stop: unfold_rows(*arrays, start, stop), len(self.lower))
        self.products, self.summed = torch.zeros(0, 0, dtype=torch.int32), 0

    def total(self) -> Tensor:
        """float32 [K, K]; what is counted later is added to it in place."""
        self._add_few()
        if self.lower.device.type == "cpu":
            self._add_codes()
            self._unfold()
        else:
            for a, b in strips(len(self.lower), self.lower.device):
                corner = self.lower[a:b, a:b]
                corner.copy_(corner.tril() + corner.tril(-1).T)
                self.lower[a:b, b:] = self.lower[b:, a:b].T
        return self.lower
