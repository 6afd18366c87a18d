"""Codebooks by brute force: every allowed combination of codes is looked at."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from qtool.formats._base import Format, Params, expand
from qtool.numerics.codebooks.codebook import Codebook


def combinations(book: Codebook, parity: int | None) -> Tensor:
    """int64 [combinations, V] of all codes a vector may have; `parity` of its minus signs, if that matters."""
    entries = torch.from_numpy(book.entries).long()
    if book.signs == "none":
        return entries
    count = len(book.magnitudes)
    signs = torch.tensor(list(product((False, True), repeat=book.width)))
    if parity is not None:
        signs = signs[signs.sum(1) % 2 == parity]
    codes = torch.where(signs[None], count - 1 - entries[:, None], count + entries[:, None])
    return codes.flatten(0, 1)


def cheapest(target: Tensor, metric: Tensor, values: Tensor) -> tuple[int, float]:
    """(index, cost) of the row of values [combinations, V] that minimizes (t - v) M (t - v)^T."""
    miss = target - values
    cost = ((miss @ metric) * miss).sum(1)
    return int(cost.argmin()), float(cost.min())


def best_span(target: Tensor, metric: Tensor, scale: float, offset: float, fmt: Format) -> tuple[Tensor, float]:
    """(codes [span], cost) of the best allowed codes of a span of one vector."""
    book = fmt.codebook()
    assert book is not None and book.span == book.width
    codes = combinations(book, 0 if book.signs == "even" else None)
    index, cost = cheapest(target, metric, fmt.levels().double()[codes] * scale + offset)
    return codes[index], cost


def best_pair(target: Tensor, inverse: Tensor, scale: float, offset: float, fmt: Format) -> Tensor:
    """Codes of a span of two vectors, the first taken without regard to the second, once for either parity of signs.

    `inverse` [span, span] is that of the metric.
    """
    book = fmt.codebook()
    assert book is not None and book.span == 2 * book.width
    v, levels = book.width, fmt.levels().double()
    found = []
    for parity in (0, 1):
        codes = combinations(book, parity)
        values = levels[codes] * scale + offset
        first_metric = torch.linalg.inv(inverse[:v, :v])
        first, cost = cheapest(target[:v], first_metric, values)
        left = target[v:] - (target[:v] - values[first]) @ first_metric @ inverse[:v, v:]
        free = inverse[v:, v:] - inverse[v:, :v] @ first_metric @ inverse[:v, v:]
        second, more = cheapest(left, torch.linalg.inv(free), values)
        found.append((cost + more, torch.cat([codes[first], codes[second]])))
    return min(found, key=lambda f: f[0])[1]


def gptq_vectors(w: Tensor, gram: Tensor, damp: float, order: list[int], fmt: Format, params: Params) -> Tensor:
    """GPTQ's codes for fixed parameters, a span of columns at a time, in float64.

    Args:
        w: [N, K].
        gram: [K, K].
        damp: relative to the mean of the diagonal.
        order: columns in the order in which they are settled, span by span.
        fmt: the format.
        params: its parameters.
    """
    book = fmt.codebook()
    assert book is not None
    k, span = w.shape[1], book.span
    w, h = w.double().clone(), gram.double().clone()
    h += damp * h.diagonal().mean() * torch.eye(k, dtype=h.dtype)
    scale, offset = (expand(p, k).double() for p in fmt.affine(params))
    codes = torch.zeros(w.shape, dtype=torch.long)
    for a in range(0, k, span):
        # columns of a vector in their natural order, as entries have them; which of two vectors is first matters
        columns = [c for b in range(a, a + span, book.width) for c in sorted(order[b : b + book.width])]
        left = columns + order[a + span :]
        inverse = torch.linalg.inv(h[left][:, left])
        metric = torch.linalg.inv(inverse[:span, :span])
        for n in range(len(w)):
            s, o = float(scale[n, columns[0]]), float(offset[n, columns[0]])
            if span == book.width:
                codes[n, columns], _ = best_span(w[n, columns], metric, s, o, fmt)
            else:
                codes[n, columns] = best_pair(w[n, columns], inverse[:span, :span], s, o, fmt)
        values = fmt.levels().double()[codes[:, columns]] * scale[:, columns] + offset[:, columns]
        w[:, left[span:]] -= (w[:, columns] - values) @ metric @ inverse[:span, span:]
    return codes.to(torch.uint8)
