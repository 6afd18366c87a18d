"""The walk and the descent of formats with a codebook on CUDA devices, as Triton kernels; see `vector_walk`.

A program takes some rows and goes through the spans of a block, one after the other, each searched by `cuda_spans`.

Shape letters: N rows, K columns, B columns of a block, S spans of it, V columns of a vector, C allowed vectors, of all
parities, R rows of a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from qtool.numerics.codebooks.codebook import Codebook
from qtool.numerics.codebooks.cuda_spans import allowed, column, metrics_of, search, times

ROWS, CHUNK, FEED, WARPS = 16, 64, 64, 4
"""Rows of a program; vectors that it compares at once, and columns that it updates at once; warps that share them."""
TILE = 256
"""Columns within which the descent keeps the pull up to date; the others learn of moves when it leaves them."""
GAIN = tl.constexpr(0.9999)
"""Of its cost a span has to keep less than that to move, as in `vector_walk`."""


@triton.jit
def take_off(  # type: ignore[no-untyped-def]
    x, inside, left, right, matrix, stride, begin, end, j, paired: tl.constexpr, width: tl.constexpr, feed: tl.constexpr
):  # fmt: skip
    """x [R, begin to end] -= left times rows of a matrix, and where `paired` right times those behind; [R, V] both."""
    for start in range(begin // feed * feed, end, feed):
        to = start + tl.arange(0, feed)
        some = (to >= begin) & (to < end)
        both = inside[:, None] & some[None, :]
        total = tl.load(x + to[None, :], both, 0.0)
        for v in tl.static_range(width):
            total -= column(left, j, v)[:, None] * tl.load(matrix + v * stride + to, some, 0.0)[None, :]
            if paired:
                total -= column(right, j, v)[:, None] * tl.load(matrix + (width + v) * stride + to, some, 0.0)[None, :]
        tl.store(x + to[None, :], total, both)


@triton.jit
def walk_kernel(  # type: ignore[no-untyped-def]
    rest, factor, factor_stride, inverse, first, second, back, curved, levels, table, scale, offset, natural, codes,
    error, count, columns, spans, total, paired: tl.constexpr, width: tl.constexpr, rows: tl.constexpr,
    chunk: tl.constexpr, feed: tl.constexpr,
):  # fmt: skip
    """Walks the B columns of a block: rest [N, B] is overwritten; codes uint8 and error [N, B] are filled.

    scale, offset [N, S]; inverse [S, B / S, B / S], rows in natural order, whose places natural int32 [B] are.
    """
    n, j = tl.program_id(0) * rows + tl.arange(0, rows), tl.arange(0, width)
    inside, span = n < count, width * (1 + paired)
    row = n.to(tl.int64)[:, None] * columns
    for i in range(spans):
        a = i * span
        s, o = tl.load(scale + n * spans + i, inside, 0.0), tl.load(offset + n * spans + i, inside, 0.0)
        p = tl.load(natural + a + j)
        x = tl.load(rest + row + p[None, :], inside[:, None], 0.0) - o[:, None]
        y, q = x, p
        if paired:
            q = tl.load(natural + a + width + j)
            y = tl.load(rest + row + q[None, :], inside[:, None], 0.0) - o[:, None]
        k, m = search(x, y, s, first, second, back, curved, levels, total, i, spans, j, paired, width, rows, chunk)
        left = j[None, :] * total + k[:, None]
        tl.store(codes + row + p[None, :], tl.load(table + left), inside[:, None])
        here, miss = inverse + i * span * span, x - s[:, None] * tl.load(levels + left)
        e, g = times(miss, here, span, j), miss
        if paired:
            right = j[None, :] * total + m[:, None]
            tl.store(codes + row + q[None, :], tl.load(table + right), inside[:, None])
            g, below = times(miss, here + width, span, j), here + width * span
            miss = y - s[:, None] * tl.load(levels + right)
            e, g = e + times(miss, below, span, j), g + times(miss, below + width, span, j)
            tl.store(error + row + a + width + j[None, :], g, inside[:, None])
        tl.store(error + row + a + j[None, :], e, inside[:, None])
        weights = factor + a * factor_stride
        take_off(rest + row, inside, e, g, weights, factor_stride, a + span, columns, j, paired, width, feed)
        tl.debug_barrier()  # other threads read these columns next


@triton.jit
def descent_kernel(  # type: ignore[no-untyped-def]
    pull, gram, gram_stride, metric, inverse, first, second, back, curved, levels, table, scale, present, codes, steps,
    count, columns, spans, total, paired: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, chunk: tl.constexpr,
    feed: tl.constexpr,
):  # fmt: skip
    """Descends over the B columns of a tile: pull [N, B] and codes [N, B] are updated, steps [N, B] filled.

    gram [B, B]; metric, inverse [S, B / S, B / S]; scale [N, S]; present: levels by code.
    """
    n, j = tl.program_id(0) * rows + tl.arange(0, rows), tl.arange(0, width)
    inside, span = n < count, width * (1 + paired)
    row, all_of = n.to(tl.int64)[:, None] * columns, inside[:, None]
    for i in range(spans):
        a, here, bend = i * span, inverse + i * span * span, metric + i * span * span
        s, x = tl.load(scale + n * spans + i, inside, 0.0), row + i * span + j[None, :]
        p, held = (
            tl.load(pull + x, all_of, 0.0),
            s[:, None] * tl.load(present + tl.load(codes + x, all_of, 0).to(tl.int32)),
        )
        free, q, kept, freed = times(p, here, span, j), p, held, p  # what the best levels were, were all of them free
        if paired:
            q = tl.load(pull + x + width, all_of, 0.0)
            kept = s[:, None] * tl.load(present + tl.load(codes + x + width, all_of, 0).to(tl.int32))
            below = here + width * span
            freed = times(p, here + width, span, j) + times(q, below + width, span, j)
            free += times(q, below, span, j)
        k, m = search(
            held + free, kept + freed, s, first, second, back, curved, levels, total, i, spans, j, paired, width, rows,
            chunk,
        )  # fmt: skip
        left, right = j[None, :] * total + k[:, None], j[None, :] * total + m[:, None]
        step, other = s[:, None] * tl.load(levels + left) - held, s[:, None] * tl.load(levels + right) - kept
        miss, missed = free - step, freed - other
        cost, bound = tl.sum(times(miss, bend, span, j) * miss, 1), tl.sum(p * free, 1)
        if paired:
            cost += 2 * tl.sum(times(miss, bend + width, span, j) * missed, 1)
            cost += tl.sum(times(missed, bend + width * span + width, span, j) * missed, 1)
            bound += tl.sum(q * freed, 1)
        better = ((cost < GAIN * bound) & (s != 0))[:, None]
        step, other = tl.where(better, step, 0.0), tl.where(better, other, 0.0)
        tl.store(steps + x, step, all_of)
        tl.store(codes + x, tl.load(table + left), all_of & better)
        if paired:
            tl.store(steps + x + width, other, all_of)
            tl.store(codes + x + width, tl.load(table + right), all_of & better)
        tl.debug_barrier()  # all have read what now changes
        weights = gram + a * gram_stride
        take_off(pull + row, inside, step, other, weights, gram_stride, 0, columns, j, paired, width, feed)
        tl.debug_barrier()


def walk_vector_block(
    w: Tensor, factor: Tensor, scale: Tensor, offset: Tensor, book: Codebook, order: Tensor
) -> tuple[Tensor, Tensor]:
    """(codes, errors), [N, B] each; see `vector_walk.walk_vector_block`."""
    (n, columns), span, among = w.shape, book.span, allowed(book, w.device)
    spans = columns // span
    blocks = factor.reshape(spans, span, spans, span).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    eye = torch.eye(span, dtype=torch.float64, device=w.device).expand_as(blocks)
    inverse = torch.linalg.solve_triangular(blocks.double(), eye, upper=True)
    places = (order.view(-1, book.width) % book.width).argsort(1)  # the walk may take a vector's columns in any order
    natural = (places + torch.arange(len(places), device=places.device)[:, None] * book.width).view(spans, span)
    inner = natural % span
    metrics = (inverse @ inverse.mT).gather(1, inner[:, :, None].expand_as(blocks))
    needed = metrics_of(metrics.gather(2, inner[:, None].expand_as(blocks)), among)
    back = inverse.gather(1, inner[:, :, None].expand_as(blocks)).float()
    rest, codes, error = w.clone(), torch.empty(w.shape, dtype=torch.uint8, device=w.device), torch.empty_like(w)
    walk_kernel[(cdiv(n, ROWS),)](
        rest, factor, factor.stride(0), back, *needed, among.levels, among.codes, scale[:, ::span].contiguous(),
        offset[:, ::span].contiguous(), natural.to(torch.int32), codes, error, n, columns, spans,
        among.levels.shape[1], among.paired, book.width, ROWS, CHUNK, FEED, num_warps=WARPS,
    )  # fmt: skip
    return codes, error


def descend_vectors(
    gram: Tensor, scale: Tensor, levels: Tensor, book: Codebook, codes: Tensor, pull: Tensor, sweeps: int
) -> tuple[Tensor, Tensor]:
    """Improves codes a span at a time; see `vector_walk.descend_vectors`."""
    (n, k), span, among = codes.shape, book.span, allowed(book, codes.device)
    wide = gram.view(k // span, span, k // span, span).diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()
    inverse, metric = torch.cholesky_inverse(torch.linalg.cholesky(wide)).float(), wide.float().contiguous()
    each = scale.repeat_interleave(k // scale.shape[1] // span, 1)
    codes, pull, present = codes.clone(), pull.clone(), levels.to(codes.device)
    for _ in range(sweeps):
        moved = torch.zeros((), device=codes.device)
        for first in range(0, k, TILE):
            last = min(first + TILE, k)
            part = slice(first // span, last // span)
            here, found = (t[:, first:last].contiguous() for t in (pull, codes))
            steps, square = torch.empty_like(here), gram[first:last, first:last]
            descent_kernel[(cdiv(n, ROWS),)](
                here, square, square.stride(0), metric[part], inverse[part], *metrics_of(wide[part], among),
                among.levels, among.codes, each[:, part].contiguous(), present, found, steps, n, last - first,
                (last - first) // span, among.levels.shape[1], among.paired, book.width, ROWS, CHUNK, FEED,
                num_warps=WARPS,
            )  # fmt: skip
            codes[:, first:last] = found
            pull -= steps @ gram[first:last]
            moved = moved.maximum(steps.abs().amax())
        if not moved:
            break
    return codes, pull


def nearest_codes(x: Tensor, weight: Tensor, scale: Tensor, offset: Tensor, book: Codebook) -> Tensor:
    """The allowed codes of least weighted squared error, uint8 [N, K].

    Args:
        x: float32 [N, K].
        weight: float32 [K].
        scale: float32 [N, G], for K / G columns each.
        offset: float32 [N, G].
        book: what is allowed.
    """
    scale, offset = (p.repeat_interleave(x.shape[1] // p.shape[1], 1) for p in (scale, offset))
    codes = []
    for a in range(0, x.shape[1], TILE):
        part = slice(a, a + TILE)
        factor = torch.diag(weight[part].rsqrt())  # nothing is fed on
        order = torch.arange(a, a + len(factor), device=x.device)
        codes.append(walk_vector_block(x[:, part], factor, scale[:, part], offset[:, part], book, order)[0])
    return torch.cat(codes, 1)
