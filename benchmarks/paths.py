"""Solvers that could stand in for GPTQ's walk and coordinate descent, on matrices of the demo model off any grid.

Several paths: the walk keeps the B cheapest beginnings of each row (B-best), or draws B rows of codes, each level with
the odds that its error has (Klein), and takes the best (OJBKQ, https://arxiv.org/abs/2602.08376), for scales that GPTQ
found. Whole local metric: a group's scale is the one of a few around the searched one whose codes, walked through the
group, leave the least of the walk's objective, instead of that with the least error weighted by 1 / U_jj^2.

What counts is the error of outputs, sum of e H e^T over rows, over that of GPTQ as it ships, and processor time, one
thread. Both ends of each: as they come, and behind a round of closed-form scales and coordinate descent.

    python -m benchmarks --only paths

Shape letters: N rows, K columns, B paths, L levels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from qtool.calibrate.tokens import load_tokens
from qtool.calibrate.walker import Walker
from qtool.checkpoint.open import open_checkpoint
from qtool.formats._base import Format, Params, Quantized, expand
from qtool.formats._spelling import parse_format
from qtool.methods._refine import refine
from qtool.methods.gptq import GPTQ, SWEEPS, activation_order
from qtool.numerics.grids.affine import middles
from qtool.numerics.metrics import energy
from qtool.numerics.solving.linalg import inverse_factor
from qtool.numerics.solving.split import Split
from qtool.numerics.solving.walk import is_uniform, walk_rows
from qtool.recipe.schema import Calibration
from qtool.stats.gram import Gram

MATRICES = ("layers.1.self_attn.q_proj", "layers.2.mlp.up_proj", "layers.2.mlp.down_proj")
LABELS = ("int2-g64", "int3-g64", "int4-g64", "nvfp4")
PATHS = (4, 16)
FACTORS = tuple(0.7 + 0.04 * i for i in range(13))
"""Of the searched scale, that are tried."""
HEADER = f"{'matrix':26} {'format':9} {'way':28} {'error':>7} {'refined':>8} {'seconds':>8}"


class Line(NamedTuple):
    """Errors of outputs over that of GPTQ as it ships, before and behind a round of refinement, and processor time."""

    matrix: str
    label: str
    way: str
    error: float
    refined: float
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.matrix:26} {self.label:9} {self.way:28} {self.error:7.4f} {self.refined:8.4f} {self.seconds:8.2f}"
        )


@njit(nogil=True, cache=True)
def two_nearest(x, levels):  # type: ignore[no-untyped-def]
    """Indices of the nearest and the second nearest level."""
    first = np.argmin(np.abs(levels - x))
    up = first + 1 < len(levels) and (first == 0 or levels[first + 1] - x < x - levels[first - 1])
    return first, first + 1 if up else max(first - 1, 0)


@njit(nogil=True, cache=True)
def best_of_beginnings(w, factor, scale, offset, levels, paths, codes):  # type: ignore[no-untyped-def]
    """Fills codes uint8 [N, K]: all [N, K] in walking order, factor [K, K]; each row keeps so many beginnings."""
    n, k = w.shape
    rest, other = np.empty((paths, k), np.float32), np.empty((paths, k), np.float32)
    parent, code = np.zeros((k, paths), np.int32), np.zeros((k, paths), np.int32)
    for row in range(n):
        rest[0], live, cost = w[row], 1, np.zeros(paths)
        for j in range(k):
            tried, costs, errors = np.empty(2 * live, np.int64), np.empty(2 * live), np.empty(2 * live, np.float32)
            for b in range(live):
                pair = two_nearest((rest[b, j] - offset[row, j]) / scale[row, j], levels)
                for i in range(2):
                    e = (rest[b, j] - (scale[row, j] * levels[pair[i]] + offset[row, j])) / factor[j, j]
                    tried[2 * b + i], errors[2 * b + i], costs[2 * b + i] = pair[i], e, cost[b] + e * e
            kept = np.argsort(costs)[:paths]
            for i in range(len(kept)):
                b = kept[i] // 2
                parent[j, i], code[j, i], cost[i] = b, tried[kept[i]], costs[kept[i]]
                e = errors[kept[i]]
                for c in range(j + 1, k):
                    other[i, c] = rest[b, c] - e * factor[j, c]
            live, rest, other = len(kept), other, rest
        at = 0
        for j in range(k - 1, -1, -1):
            codes[row, j], at = code[j, at], parent[j, at]


@njit(nogil=True, cache=True)
def best_of_draws(w, factor, scale, offset, levels, paths, codes, seed):  # type: ignore[no-untyped-def]
    """The same by drawing: levels with odds exp(-a e^2), a of Klein's for so many draws; the first is the walk's."""
    np.random.seed(seed)
    n, k = w.shape
    rho = 1.0 + 1e-6
    while (np.e * rho) ** (2 * k / rho) > paths:
        rho *= 1.05
    found, rest, odds = np.empty(k, np.uint8), np.empty(k, np.float32), np.empty(len(levels))
    for row in range(n):
        least, sharp = np.inf, np.log(rho) / np.min((scale[row] / np.diag(factor)) ** 2)
        for path in range(paths):
            rest[:], cost = w[row], 0.0
            for j in range(k):
                choice = two_nearest((rest[j] - offset[row, j]) / scale[row, j], levels)[0]
                if path > 0:
                    for i in range(len(levels)):
                        e = (rest[j] - scale[row, j] * levels[i] - offset[row, j]) / factor[j, j]
                        odds[i] = -sharp * e * e
                    odds[:] = np.exp(odds - odds.max())
                    choice = min(np.searchsorted(np.cumsum(odds), np.random.random() * odds.sum()), len(levels) - 1)
                e = (rest[j] - scale[row, j] * levels[choice] - offset[row, j]) / factor[j, j]
                found[j], cost = choice, cost + e * e
                for c in range(j + 1, k):
                    rest[c] -= e * factor[j, c]
                if cost >= least:
                    break
            if cost < least:
                least, codes[row] = cost, found


class Problem:
    """A matrix and what its inputs say of errors.

    Args:
        w: float32 [N, K].
        gram: float32 [K, K].
        fmt: a scalar format.
    """

    def __init__(self, w: Tensor, gram: Tensor, fmt: Format) -> None:
        self.w, self.gram, self.fmt = w, gram, fmt.with_largest(float(w.abs().max())) if fmt.needs_largest else fmt
        self.method = GPTQ(drift=0)
        self.order = activation_order(gram.diagonal(), self.method._widths(self.fmt))
        self.factor = inverse_factor(gram[self.order][:, self.order], self.method.damp)[0]
        damped = gram.clone()
        damped.diagonal().add_(self.method.damp * gram.diagonal().mean())
        self.curvature = Split(damped)

    def gptq(self, rounds: int) -> Quantized:
        """As it ships, with so many rounds of refinement."""
        codes, params = self.method._walk(self.w, self.order, self.factor, self.fmt)
        start = Quantized(codes, params, self.fmt)
        return self.refined(start, rounds) if rounds else start

    def refined(self, q: Quantized, rounds: int = 1) -> Quantized:
        """Behind rounds of closed-form scales and coordinate descent."""
        return refine(self.w, self.curvature, q, rounds, SWEEPS)

    def error(self, q: Quantized) -> float:
        """Of outputs."""
        return float(energy(self.w - q.decode(), self.gram))

    def walked(self, params: Params, kernel: Callable[..., None], *more: int) -> Quantized:
        """Codes of one of the two kernels for some parameters."""
        scale, offset = (expand(p, self.w.shape[1])[:, self.order].contiguous() for p in self.fmt.affine(params))
        found = np.empty(self.w.shape, np.uint8)
        w = self.w[:, self.order].contiguous()
        arrays = [t.numpy() for t in (w, self.factor, scale, offset, self.fmt.levels())]
        paths, *seed = more
        kernel(*arrays, paths, found, *seed)
        codes = torch.empty(self.w.shape, dtype=torch.uint8)
        codes[:, self.order] = torch.from_numpy(found)
        return Quantized(codes, params, self.fmt)

    def whole_metric(self) -> Quantized:
        """GPTQ whose groups choose that of scales around the searched one whose walk through the group is cheapest."""
        fmt, k = self.fmt.on_the_way(), self.w.shape[1]
        width = self.fmt.block_columns or k
        rest, codes = self.w[:, self.order].T.contiguous(), torch.empty(self.w.shape, dtype=torch.uint8)
        weight, fitted = self.factor.diagonal().square().reciprocal(), {}
        for a in range(0, k, width):
            columns = self.order[a : a + width]
            natural = columns.argsort()
            start = fmt.fit(rest[a : a + width].T[:, natural], weight[a : a + width][natural])
            block = self.factor[a : a + width, a : a + width].contiguous()
            code, error, fitted[int(columns[0]) // width] = self.cheapest(rest[a : a + width], block, start, columns)
            codes[:, columns] = code.T
            rest[a + width :] -= self.factor[a : a + width, a + width :].T @ error
        return Quantized(codes, fmt.join([fitted[i] for i in range(k // width)]), self.fmt)

    def cheapest(self, w: Tensor, block: Tensor, start: Params, columns: Tensor) -> tuple[Tensor, Tensor, Params]:
        """(codes, errors, both [W, N], parameters) of a group's W columns [W, N], whose part of the factor is given."""
        fmt, width = self.fmt, len(columns)
        scale, offset = fmt.affine(start)
        between = w.new_empty(0) if is_uniform(fmt.levels()) else middles(fmt.levels())
        least, code, error = torch.full((w.shape[1],), torch.inf), torch.empty_like(w, dtype=torch.uint8), w.clone()
        best = dict(start)
        for factor in (1.0, *FACTORS):
            params = fmt.refit(start, scale * factor, offset)
            s, o = (expand(p, width)[:, columns % width].T.contiguous() for p in fmt.affine(params))
            own, e = torch.empty_like(code), torch.empty_like(error)
            walk_rows(*(t.numpy() for t in (w.clone(), block, s, o, fmt.levels(), between, own, e)), 0, w.shape[1])
            cost = e.square().sum(0)
            better = cost < least
            least = torch.where(better, cost, least)
            code, error = torch.where(better, own, code), torch.where(better, e, error)
            best = {name: torch.where(better[:, None], params[name], old) for name, old in best.items()}
        return code, error, best


def problems(model: Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, weight, Gram matrix) of some matrices: 16 x 512 tokens of built-in prose."""
    checkpoint = open_checkpoint(str(model))
    tokens = load_tokens(Calibration.model_validate({"data": "builtin", "samples": 16, "length": 512}), checkpoint)
    walker = Walker(checkpoint, torch.device("cpu"), torch.float32)
    hidden = walker.embed(tokens)
    for i in range(3):
        stats = walker.collect(walker.load_block(i), i, hidden, frozenset({Gram}))
        for m in walker.modules[i]:
            name = m.name.removeprefix("model.")
            if name in MATRICES:
                yield name, checkpoint.tensor(f"{m.name}.weight").float(), stats[m.reads][Gram].matrix


def ways(problem: Problem, ships: Quantized) -> dict[str, Callable[[], Quantized]]:
    """What is compared with GPTQ as it ships."""
    found: dict[str, Callable[[], Quantized]] = {
        "GPTQ, 3 rounds": lambda: problem.gptq(3),
        "whole local metric, a round": lambda: problem.refined(problem.whole_metric()),
    }
    for n in PATHS:
        found[f"its scales, {n}-best"] = partial(problem.walked, ships.params, best_of_beginnings, n)
        found[f"its scales, {n} by Klein"] = partial(problem.walked, ships.params, best_of_draws, n, 0)
    return found


def lines(model: Path) -> Iterator[Line]:
    """All of them; what it takes to compile is in the seconds of the first matrix."""
    torch.set_num_threads(1)
    for name, w, gram in problems(model):
        for label in LABELS:
            problem = Problem(w, gram, parse_format(label))
            begin = time.process_time()
            ships = problem.gptq(1)
            seconds, norm = time.process_time() - begin, problem.error(ships)
            yield Line(name, label, "GPTQ, a round", 1.0, problem.error(problem.refined(ships)) / norm, seconds)
            for way, solve in ways(problem, ships).items():
                begin = time.process_time()
                found = solve()
                seconds, refined = time.process_time() - begin, problem.refined(found)
                yield Line(name, label, way, problem.error(found) / norm, problem.error(refined) / norm, seconds)
