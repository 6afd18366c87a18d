"""The walk and the descent of formats with a codebook on devices: a span of columns at a time, all rows together.

They do what `vector_walk` does row by row, and find the same codes but for ties, since `batched_nearest` is exact where
its searches are.

Shape letters: N rows, K columns, B columns of a block or span, L levels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.numerics.codebooks.batched_nearest import SpanCodes
from qtool.numerics.codebooks.codebook import Codebook

TILE = 256
"""Columns within which the descent keeps the pull up to date; the others learn of moves when it leaves them."""
GAIN = 0.9999
"""Of its cost a span has to keep less than that to move, as in `vector_walk`."""


def walk_vector_block(
    w: Tensor, factor: Tensor, scale: Tensor, offset: Tensor, levels: Tensor, book: Codebook, order: Tensor
) -> tuple[Tensor, Tensor]:
    """(codes, errors), [N, B] each; see `vector_walk.walk_vector_block`."""
    span, count = book.span, w.shape[1] // book.span
    levels, rest = levels.to(w.device), w.clone()
    blocks = factor.view(count, span, count, span).diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()
    eye = torch.eye(span, dtype=torch.float64, device=w.device).expand_as(blocks)
    inverse = torch.linalg.solve_triangular(blocks, eye, upper=True)
    places = (order.view(-1, book.width) % book.width).argsort(1)  # the walk may take a vector's columns in any order
    natural = (places + torch.arange(len(places), device=places.device)[:, None] * book.width).view(count, span)
    inner = natural % span
    metrics = (inverse @ inverse.mT).gather(1, inner[:, :, None].expand_as(blocks))
    search = SpanCodes(book, metrics.gather(2, inner[:, None].expand_as(blocks)).float())
    inverse = inverse.float()
    codes, error = torch.empty(w.shape, dtype=torch.uint8, device=w.device), torch.empty_like(w)
    for i in range(count):
        a, b = i * span, (i + 1) * span
        s, o = scale[:, a], offset[:, a : a + 1]
        codes[:, natural[i]] = search.codes(i, rest[:, natural[i]] - o, s)
        error[:, a:b] = (rest[:, a:b] - (s[:, None] * levels[codes[:, a:b].long()] + o)) @ inverse[i]
        rest[:, b:] -= error[:, a:b] @ factor[a:b, b:]
    return codes, error


def descend_vectors(
    gram: Tensor,
    params: tuple[Tensor, Tensor],
    levels: Tensor,
    book: Codebook,
    codes: Tensor,
    pull: Tensor,
    sweeps: int,
) -> tuple[Tensor, Tensor]:
    """Improves codes a span at a time; see `vector_walk.descend_vectors`."""
    k, span = len(gram), book.span
    scale, levels = params[0], levels.to(gram.device)
    metrics = gram.view(k // span, span, k // span, span).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(metrics.double())).float()
    search, width = SpanCodes(book, metrics.contiguous()), k // scale.shape[1]
    codes, pull = codes.clone(), pull.clone()
    for _ in range(sweeps):
        moved = False
        for first in range(0, k, TILE):
            last = min(first + TILE, k)
            here, steps = pull[:, first:last].clone(), torch.zeros_like(pull[:, first:last])
            for a in range(first, last, span):
                part, there, i = slice(a, a + span), slice(a - first, a - first + span), a // span
                s = scale[:, a // width]
                free = here[:, there] @ inverse[i]  # how far from the present values the best ones are, were all free
                held = s[:, None] * levels[codes[:, part].long()]
                found = search.codes(i, held + free, s)
                step = s[:, None] * levels[found.long()] - held
                miss = free - step
                cost, bound = ((miss @ metrics[i]) * miss).sum(1), (here[:, there] * free).sum(1)
                better = ((cost < GAIN * bound) & (s != 0))[:, None]
                steps[:, there] = step = torch.where(better, step, 0.0)
                codes[:, part] = torch.where(better, found, codes[:, part])
                here -= step @ gram[part, first:last]
            pull -= steps @ gram[first:last]
            moved = moved or bool(steps.any())
        if not moved:
            break
    return codes, pull
