"""The allowed codes of least error for many rows at once, by products of matrices: for devices.

What a vector of levels q costs in a metric A is |t - s q|^2 = t A t - 2 s (t A) q + s^2 q A q. The first term is the
same for all q, and q A q for all rows: so one product of matrices, whose other side are all vectors that a codebook
allows, has the costs of all of them for all rows, and nothing is left out that a search could miss.

A span of two vectors, which share a parity of signs, is taken as `sphere` takes it: for either parity of the first
vector its best one, whatever is right of it being free to make up for it, then the best second one beside it.

Shape letters: N rows, S spans, B columns of a span, V columns of a vector, C allowed vectors, L levels.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.numerics.codebooks.codebook import Codebook

COSTS = 1 << 25
"""That are held at once."""


class Allowed(NamedTuple):
    """All vectors that a codebook allows, signs among them.

    Attributes:
        codes: uint8 [C, V].
        levels: float32 [C, V].
    """

    codes: Tensor
    levels: Tensor


@cache
def allowed(book: Codebook, parity: int | None, device: torch.device) -> Allowed:
    """Those with an odd (1) or even (0) number of minus signs, or (None) all."""
    entries = torch.from_numpy(book.entries)
    magnitudes = torch.from_numpy(book.magnitudes)
    if book.signs == "none":
        return Allowed(entries.to(device), magnitudes[entries.long()].to(device))
    minus = torch.arange(1 << book.width)[:, None] >> torch.arange(book.width) & 1
    if parity is not None:
        minus = minus[minus.sum(1) % 2 == parity]
    signs, count = (1 - 2 * minus).to(torch.float32), len(book.magnitudes)
    codes = torch.where(minus.bool(), count - 1 - entries[:, None].long(), count + entries[:, None].long())
    levels = signs * magnitudes[entries.long()][:, None]
    return Allowed(*(x.view(-1, book.width).to(device) for x in (codes.to(torch.uint8), levels)))


def best(target: Tensor, scale: Tensor, metric: Tensor, among: Allowed) -> tuple[Tensor, Tensor]:
    """(the number of the vector of least cost, int64 [N]; its cost less that of zeros, float32 [N]).

    Args:
        target: float32 [N, V].
        scale: float32 [N], of the levels, of either sign.
        metric: float32 [V, V].
        among: what there is.
    """
    curved = (among.levels @ metric).mul_(among.levels).sum(1)
    right = torch.cat([curved[None], among.levels.T])
    left = torch.cat([scale.square()[:, None], (target @ metric).mul_(-2 * scale[:, None])], 1)
    found = [part.matmul(right).min(1) for part in torch.split(left, max(1, COSTS // right.shape[1]))]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])


class SpanCodes:
    """The search for codes of spans in metrics of their own.

    Args:
        book: what is allowed.
        metrics: float32 [S, B, B].

    Raises:
        ValueError: spans of several vectors that are not two with a parity of signs.
    """

    def __init__(self, book: Codebook, metrics: Tensor) -> None:
        self.book, self.metrics, self.v = book, metrics, book.width
        if book.span > book.width:
            if book.span > 2 * book.width or book.signs != "even":
                raise ValueError(f"spans of {book.span // book.width} vectors with {book.signs} signs")
            wide, v = metrics.double(), self.v
            factor = torch.linalg.cholesky(wide[:, v:, v:])
            back = torch.cholesky_solve(wide[:, v:, :v], factor).mT
            self.first = (wide[:, :v, :v] - back @ wide[:, v:, :v]).float()
            self.back = back.float()

    def codes(self, i: int, target: Tensor, scale: Tensor) -> Tensor:
        """uint8 [N, B] of span i: targets [N, B], scales [N]."""
        device = target.device
        if self.book.span == self.v:
            among = allowed(self.book, 0 if self.book.signs == "even" else None, device)
            return among.codes[best(target, scale, self.metrics[i], among)[0]]
        left, right = target[:, : self.v], target[:, self.v :]
        metric = self.metrics[i, self.v :, self.v :]
        tried = []
        for parity in (0, 1):
            among = allowed(self.book, parity, device)
            place, cost = best(left, scale, self.first[i], among)
            wanted = right + (left - scale[:, None] * among.levels[place]) @ self.back[i]
            other, more = best(wanted, scale, metric, among)
            cost = cost + more + (wanted @ metric).mul_(wanted).sum(1)
            tried.append((cost, torch.cat([among.codes[place], among.codes[other]], 1)))
        (cost, codes), (other_cost, others) = tried
        return torch.where((other_cost < cost)[:, None], others, codes)


def nearest_codes(x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor, book: Codebook) -> Tensor:
    """The allowed codes of least weighted squared error, uint8 [N, K].

    Args:
        x: float32 [N, K].
        weight: float32 [K].
        scale: float32 [N, G], for K / G columns each.
        offset: float32 [N, G].
        book: what is allowed.
    """
    spans, width = x.shape[1] // book.span, x.shape[1] // scale.shape[1]
    search = SpanCodes(book, torch.diag_embed(weight.view(spans, book.span)))
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    for i in range(spans):
        a, g = i * book.span, i * book.span // width
        part = slice(a, a + book.span)
        codes[:, part] = search.codes(i, x[:, part] - offset[:, g : g + 1], scale[:, g])
    return codes
