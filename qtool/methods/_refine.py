"""Alternates closed-form parameters and coordinate descent on codes, against the Gram matrix of a layer's inputs.

For fixed codes, the best parameters of a row solve its normal equations (`numerics.solving.normal`). Formats round
parameters to what they store; a row keeps its new ones only if the objective still falls. For fixed parameters, each
code in turn then moves to its best level given all the others; where codes go together, each vector to its best entry.

`pull` is the rows' (w - w_hat) H, up to a factor the gradient; it is carried along, since it costs as much as the walk.

On the CPU scales that are codes of a table, or multiples of steps, move one by one instead, along with the codes
(`numerics.solving.settle` and `settle_multiples`): what is stored is chosen given what all others store, for a quarter
of the time.

On devices several matrices of one size may be refined together, see `numerics.solving.split`.

Shape letters: M matrices, N rows of all, K columns, G groups, P parameters per row (G, or 2 G with offsets).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.formats._base import Format, Params, Quantized, expand
from qtool.numerics.grids.scale_codes import CodedScales
from qtool.numerics.solving.descent import descend
from qtool.numerics.solving.normal import normal_equations, per_group, solve_rows
from qtool.numerics.solving.settle import settle, settles
from qtool.numerics.solving.settle_multiples import settle_multiples
from qtool.numerics.solving.split import Split, subtract_times, times
from qtool.numerics.solving.vector_walk import descend_vectors
from qtool.numerics.threads.marks import marked

STRIP = 1 << 24
"""Weights that are refined together, so that memory does not grow with the matrix."""

CHUNK_BYTES = 64 << 20
"""Size of the normal equations held at once."""

DEVICE_BYTES = 1 << 30
"""The same on other devices."""


def refine(w: Tensor, curvature: Split, q: Quantized, rounds: int, sweeps: int) -> Quantized:
    """Improves a solution; the objective tr(D H D^T) never rises in any row.

    Args:
        w: float32 [N, K].
        curvature: H, float32 [K, K], damped; or [M, K, K], where offsets are not free.
        q: codes and parameters to start from.
        rounds: alternations.
        sweeps: most passes of coordinate descent over a row in one round.
    """
    gram, groups = curvature.matrix, q.format.affine(q.params)[0].shape[1]
    sums = per_group(gram, groups) if q.format.free_offset else None
    assert sums is None or gram.dim() == 2
    size = max(1, STRIP // w.shape[1]) if w.device.type == "cpu" else len(w)
    parts = []
    rule = coded(q.format) if w.device.type == "cpu" else None
    shared = w.device.type == "cpu" and q.format.multiples(q.params) is not None
    for a in range(0, len(w), size):
        part = q.rows(a, a + size)
        if rule:
            parts.append(_settled(w[a : a + size], curvature, part, rule, rounds, sweeps))
            continue
        if shared:
            parts.append(_settled_multiples(w[a : a + size], curvature, part, rounds, sweeps))
            continue
        codes, params = part.codes, part.params
        pull = times(w[a : a + size] - q.format.decode(codes, params), gram)
        for _ in range(rounds):
            if q.format.group_rows == 1:  # what rows share no single row can decide
                with marked("scales refitted"):
                    params, move = move_parameters(codes, params, q.format, gram, sums, pull)
                    subtract_times(pull, move, gram)
            scale, offset = q.format.affine(params)
            with marked("descent"):
                if book := q.format.codebook():
                    codes, pull = descend_vectors(gram, (scale, offset), q.format.levels(), book, codes, pull, sweeps)
                else:
                    codes, pull = descend(curvature, scale, q.format.levels(), codes, pull, sweeps)
        parts.append((codes, params))
    return Quantized(torch.cat([codes for codes, _ in parts]), join_rows([params for _, params in parts]), q.format)


def coded(fmt: Format) -> CodedScales | None:
    """The table of a format's scales, if `settle` takes them."""
    rule = fmt.search_in_walk()
    return rule if isinstance(rule, CodedScales) and settles(rule.columns) else None


def _settled(
    w: Tensor, curvature: Split, q: Quantized, rule: CodedScales, rounds: int, sweeps: int
) -> tuple[Tensor, Params]:
    """`refine` of a few rows whose scales are in a table."""
    codes, values, levels = q.codes, rule.values, q.format.levels()
    found = torch.searchsorted(values, q.format.affine(q.params)[0].contiguous())
    pull = times(w - q.decode(), curvature.matrix)
    for _ in range(rounds):
        with marked("scales refitted"):
            found, codes, pull = settle(curvature.matrix, values, levels, found, codes, pull)
        with marked("descent"):
            codes, pull = descend(curvature, values[found], levels, codes, pull, sweeps - 1)
    return codes, q.format.of_search(found.to(torch.uint8))


def _settled_multiples(w: Tensor, curvature: Split, q: Quantized, rounds: int, sweeps: int) -> tuple[Tensor, Params]:
    """`refine` of a few rows whose scales are multiples of steps."""
    codes, levels, params = q.codes, q.format.levels(), q.format.multiples(q.params)
    assert params is not None
    for _ in range(rounds):
        rest = w - q.format.decode(codes, q.format.of_multiples(params))
        with marked("scales refitted"):
            params, codes, pull = settle_multiples(curvature.matrix, levels, params, codes, rest)
        scale = expand(params.d, params.a.shape[1]) * params.a
        with marked("descent"):
            codes, pull = descend(curvature, scale, levels, codes, pull, sweeps - 1)
    return codes, q.format.of_multiples(params)


def join_rows(parts: list[Params]) -> Params:
    """Parameters of consecutive rows."""
    return {name: torch.cat([params[name] for params in parts]) for name in parts[0]}


def move_parameters(
    codes: Tensor, params: Params, fmt: Format, gram: Tensor, sums: Tensor | None, pull: Tensor
) -> tuple[Params, Tensor]:
    """The best storable parameters for these codes.

    Args:
        codes: uint8 [N, K].
        params: present parameters.
        fmt: their format.
        gram: float32 [K, K] or [M, K, K].
        sums: float32 [K, G], of the Gram matrix over each group's columns, where offsets are free; else None.
        pull: float32 [N, K], (w - w_hat) H.

    Returns:
        (parameters; the change of w_hat, float32 [N, K]).
    """
    groups = fmt.affine(params)[0].shape[1]
    size = max(
        1, (CHUNK_BYTES if codes.device.type == "cpu" else DEVICE_BYTES) // (4 * (groups * (1 + fmt.free_offset)) ** 2)
    )
    each = len(codes) // (len(gram) if gram.dim() == 3 else 1)
    if gram.dim() == 3:
        size = max(1, size // each) * each
    moved, moves = [], torch.empty_like(pull)
    for a in range(0, len(codes), size):
        rows = slice(a, a + size)
        here = {name: p[rows] for name, p in params.items()}
        theirs = gram if gram.dim() == 2 else gram[a // each : (a + size) // each]
        found, moves[rows] = _move_rows(codes[rows], here, fmt, theirs, sums, pull[rows])
        moved.append(found)
    return join_rows(moved), moves


def _move_rows(
    codes: Tensor, params: Params, fmt: Format, gram: Tensor, sums: Tensor | None, pull: Tensor
) -> tuple[Params, Tensor]:
    """`move_parameters` of a few rows."""
    scale, offset = fmt.affine(params)
    groups, k = scale.shape[1], codes.shape[1]
    levels = fmt.levels().to(codes.device)[codes.long()]
    if not fmt.free_offset:  # an offset, if there is one, is a multiple of the scale: w_hat = scale * (level - zero)
        levels += expand(offset / torch.where(scale == 0, torch.inf, scale), k)
    normal, right = normal_equations(levels, gram, pull, groups, sums)
    wanted, damped = solve_rows(normal, right)
    new_scale, new_offset = scale + wanted[:, :groups], offset + wanted[:, groups:] if fmt.free_offset else offset
    moved = fmt.refit_weighted(params, new_scale, new_offset, damped)
    new_scale, new_offset = fmt.affine(moved)
    step = torch.cat([new_scale - scale, new_offset - offset], dim=1) if fmt.free_offset else new_scale - scale
    change = (torch.bmm(normal, step.unsqueeze(-1)).squeeze(-1) * step - 2 * step * right).sum(1)
    better = (change < 0)[:, None]
    step = torch.where(better, step, 0.0)
    move = levels * expand(step[:, :groups], k)
    if fmt.free_offset:
        move += expand(step[:, groups:], k)
    return {name: torch.where(better, moved[name], old) for name, old in params.items()}, move
