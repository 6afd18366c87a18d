"""GPTQ: walk the columns, round each, and let the columns still to come make up for its error.

The objective of a layer is tr(D H D^T) with D = W - W_hat and H the Gram matrix of its inputs: the squared error of its
outputs. The walk follows Frantar et al., https://arxiv.org/abs/2210.17323; the largest channels go first
(activation order), but groups keep their place in the row, so an artifact needs no index of groups. Four things go
beyond the paper:

- Scales are searched with column j's error weighted by 1 / U_jj^2, the weight it has in the walk's own objective (U is
  the inverse factor the walk divides by), not by H_jj.
- After the walk, scales are refitted in closed form for the codes found, then codes are improved by coordinate descent
  for the scales found, and so on for some rounds. A row keeps a new scale only if its objective falls.
  Scales out of a table move one by one instead, each to the best that can be stored given all others.
- Formats with a codebook are walked a vector at a time: the allowed codes that cost least, all told (`vector_walk`).
- What is approximated is W (I + a A): behind quantized layers inputs have drifted from X_0 to X, and A, the ridge
  regression of X_0 - X on X, undoes what inputs still tell about it (after GPTAQ, https://arxiv.org/abs/2504.02692, and
  Qronos, https://arxiv.org/abs/2505.11695, which take a = 1 and no ridge: then |W X_0 - W_hat X| itself is minimized).
- A matrix that cannot be factorized gets more damping, then falls back to rounding; both are reported.

The reference is the plain loop in tests/reference/gptq.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.errors import NumericsError
from qtool.formats._base import Format, Params, Quantized
from qtool.methods._abreast import rule_of, solve_abreast
from qtool.methods._base import Method, Solution
from qtool.methods._refine import refine
from qtool.numerics.solving.linalg import inverse_factor, ridge
from qtool.numerics.solving.split import Split
from qtool.numerics.solving.walk import BLOCK, searches, walk, walk_searching
from qtool.numerics.threads.marks import marked
from qtool.numerics.threads.parallel import shares, side_by_side
from qtool.numerics.threads.ranks import ALONE, Ranks
from qtool.stats._base import InputStats, Statistic
from qtool.stats.drift import Drift
from qtool.stats.gram import Gram

SWEEPS = 4
"""Most passes of coordinate descent over a row in one round; rows that settle earlier stop earlier."""


TOGETHER = 2048
"""Columns from which on several processes share what they all need of an input."""


class GPTQ(Method):
    """Error-compensating rounding.

    Attributes:
        damp: added to the Gram matrix's diagonal, relative to its mean; more of it trusts the calibration text less.
        order: "activation" walks the columns with the largest inputs first.
        fit: "before" fits all scales to the original weights; "walk" fits a group to its corrected weights when the
            walk reaches it, which takes the columns group by group.
        drift: share of the predictable drift of the inputs that is made up for; 0 leaves it alone.
        drift_damp: ridge of the regression that predicts it, relative to the mean of the Gram matrix's diagonal; all of
            the drift with hardly any ridge is the asymmetric objective of GPTAQ, and of Qronos' first step.
        rounds: of closed-form scales and coordinate descent after the walk; 0 is plain GPTQ.
    """

    damp: float = Field(0.02, gt=0, le=1)
    order: Literal["activation", "none"] = "activation"
    fit: Literal["before", "walk"] = "walk"
    drift: float = Field(0.75, ge=0, le=1)
    drift_damp: float = Field(0.3, gt=0)
    rounds: int = Field(1, ge=0, le=20)

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """The Gram matrix, and how far inputs are from those of the unquantized model."""
        return frozenset({Gram, Drift} if self.drift else {Gram})

    def prepare(self, stats: InputStats, fmt: Format) -> None:
        """See `Method.prepare`."""

        def factor() -> None:
            with suppress(NumericsError):  # `solve` meets it again, and falls back
                used = self._factor(stats, *self._widths(fmt))[2]
                if self.rounds:
                    self._curvature(stats, used)

        pieces = [factor, lambda: self._back(stats)] if self._drift(stats) else [factor]
        side_by_side(lambda piece: piece(), pieces, shares(len(pieces), stats[Gram].matrix.device))

    def prepare_together(self, stats: InputStats, fmt: Format, ranks: Ranks) -> None:
        """See `Method.prepare_together`.

        The first process finds the factor and the last one what inputs tell about their drift, of narrow matrices each
        process both; where nothing is made up for, as with the widest, the factor is found together.
        """
        gram, widths, last = stats[Gram].matrix, self._widths(fmt), ranks.size - 1
        if len(gram) < TOGETHER or (key := (self.damp, self.order, widths)) in stats.cache:
            return
        if self._drift(stats) is None:
            with suppress(NumericsError):
                self._factor(stats, *widths, ranks=ranks)
            return
        found: object = None
        if ranks.first:
            with suppress(NumericsError):
                found = self._factor(stats, *widths)
        back = self._back(stats) if ranks.rank == last else torch.empty_like(gram)
        assert back is not None
        used = ranks.broadcast(found[2] if isinstance(found, tuple) else None)
        stats.cache["drift", self.drift_damp] = ranks.hand(back, last)
        if used is None:
            with suppress(NumericsError):  # each process finds out why, so that all have been here
                self._factor(stats, *widths)
        else:
            factor = found[1] if isinstance(found, tuple) else torch.empty_like(gram)
            stats.cache[key] = self._columns(gram, widths), ranks.hand(factor, 0), used

    def solve(self, w: Tensor, stats: InputStats | None, fmt: Format) -> Solution:
        """See `Method.solve`."""
        assert stats is not None  # the caller measured what `needs` asked for
        try:
            order, factor, used = self._factor(stats, *self._widths(fmt))
        except NumericsError as error:
            params = fmt.fit(w)
            return Solution(Quantized(fmt.snap(w, params), params, fmt), f"rounded to nearest: {error}")
        fallback = f"damping raised from {self.damp:g} to {used:g}" if used > self.damp else None
        target = self._target(w, stats)
        with marked("walk"):
            quantized = Quantized(*self._walk(target, order, factor, fmt), fmt)
        if self.rounds:
            quantized = refine(target, self._curvature(stats, used), quantized, self.rounds, SWEEPS)
        return Solution(quantized, fallback, target)

    def abreast(self, fmt: Format, k: int) -> bool:
        """See `Method.abreast`."""
        return self.fit == "walk" and rule_of(fmt, k) is not None

    def solve_abreast(self, w: Tensor, stats: Sequence[InputStats], fmt: Format) -> Quantized | None:
        """See `Method.solve_abreast`."""
        if any(self._drift(each) for each in stats):
            return None
        grams = torch.stack([each[Gram].matrix for each in stats])
        diagonal = grams.diagonal(dim1=1, dim2=2)
        if self.order == "activation":
            order = activation_order(diagonal, self._widths(fmt))
        else:
            order = torch.arange(w.shape[2], device=w.device).expand(len(w), -1)
        return solve_abreast(w, grams, order, fmt, self.damp, self.rounds, SWEEPS)

    def _curvature(self, stats: InputStats, damp: float) -> Split:
        """The damped Gram matrix [K, K], once per input."""
        key = ("curvature", damp)
        if key not in stats.cache:
            gram = stats[Gram].matrix.clone()
            gram.diagonal().add_(damp * gram.diagonal().mean())
            stats.cache[key] = Split(gram)
        return stats.cache[key]  # type: ignore[return-value]

    def _target(self, w: Tensor, stats: InputStats) -> Tensor:
        """What to approximate so that outputs come close to W X_0, float32 [N, K]."""
        back = self._back(stats)
        return w if back is None else torch.addmm(w, w, back, alpha=self.drift)

    def _drift(self, stats: InputStats) -> tuple[Tensor, Tensor] | None:
        """What was measured of the inputs' drift, if it is to be made up for; see `Drift.pair`."""
        found = stats.get(Drift) if self.drift else None
        return found.pair if found else None

    def _back(self, stats: InputStats) -> Tensor | None:
        """What inputs tell about their drift: the matrix A, float32 [K, K], once per input."""
        pair = self._drift(stats)
        if pair is None:
            return None
        key = ("drift", self.drift_damp)
        if key not in stats.cache:
            stats.cache[key] = ridge(*pair, self.drift_damp)
        return stats.cache[key]  # type: ignore[return-value]

    def _widths(self, fmt: Format) -> tuple[int, ...]:
        """Columns of what stays together in the walk, each a multiple of the one before: vectors, spans, blocks."""
        book = fmt.codebook()
        vectors = (book.width, book.span) if book else ()
        return (*vectors, fmt.block_columns) if self.fit == "walk" and fmt.block_columns else vectors

    def _columns(self, gram: Tensor, widths: tuple[int, ...]) -> Tensor:
        """In which order columns are walked, int64 [K]."""
        if self.order == "activation":
            return activation_order(gram.diagonal(), widths)
        return torch.arange(len(gram), device=gram.device)

    def _factor(self, stats: InputStats, *widths: int, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor, float]:
        """(column order [K], inverse factor U of the Gram matrix in that order, damping used), once per input."""
        gram = stats[Gram].matrix
        key = (self.damp, self.order, widths)
        if key not in stats.cache:
            order = self._columns(gram, widths)
            try:
                stats.cache[key] = order, *inverse_factor(gram[order][:, order], self.damp, ranks)
            except NumericsError as error:  # kept, so that no other layer or share of rows tries again
                stats.cache[key] = error
        found = stats.cache[key]
        if isinstance(found, NumericsError):
            raise found
        return found  # type: ignore[return-value]

    def _walk(self, w: Tensor, order: Tensor, factor: Tensor, fmt: Format) -> tuple[Tensor, Params]:
        """(codes, params) of the whole matrix, in the columns' natural order."""
        k = w.shape[1]
        weight = torch.empty_like(factor[0])
        weight[order] = factor.diagonal().square().reciprocal()
        block = fmt.block_columns or k
        vectors = (fmt.codebook(), order)
        there = w.T.contiguous()[order].T  # whole columns are picked, which the walk may then write over
        codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
        if self.fit == "before" or block == k:
            params = fmt.on_the_way().fit(w, weight)
            scale, offset = fmt.affine(params)
            codes[:, order] = walk(
                there,
                factor,
                fmt.levels(),
                BLOCK,
                lambda a, b, _: (by_column(scale, order[a:b], k), by_column(offset, order[a:b], k)),
                vectors,
            )
            return codes, params
        fitting = fmt.on_the_way()
        rule = fitting.search_in_walk()
        if rule and searches(rule, w.is_cuda):
            codes[:, order], found = walk_searching(there, factor, fmt.levels(), rule, weight[order], order)
            return codes, fmt.of_search(*(p[:, (order[::block] // block).argsort()] for p in found))
        fitted: dict[int, Params] = {}
        places = order.view(-1, block) % block
        natural, blocks = places.argsort(1), (order[::block] // block).tolist()

        def fit_block(a: int, b: int, current: Tensor) -> tuple[Tensor, Tensor]:
            place, this = places[a // block], blocks[a // block]
            columns = current.T[natural[a // block]].T  # several times quicker than current[:, natural[...]]
            fitted[this] = params = fitting.fit(columns, weight[this * block : (this + 1) * block])
            scale, offset = fmt.affine(params)
            return by_column(scale, place, block), by_column(offset, place, block)

        codes[:, order] = walk(there, factor, fmt.levels(), block, fit_block, vectors)
        return codes, fmt.join([fitted[i] for i in range(k // block)])


def by_column(p: Tensor, columns: Tensor, width: int) -> Tensor:
    """The entry that each of some columns uses: [N, G], which belong to `width` columns -> [len(columns), N]."""
    return p.T.expand(len(columns), -1) if p.shape[1] == 1 else p.T[columns // (width // p.shape[1])]


def activation_order(diagonal: Tensor, widths: tuple[int, ...]) -> Tensor:
    """Columns by falling size, those of a vector, span or block side by side, these by falling size as well.

    Args:
        diagonal: float32 [..., K], of the Gram matrix.
        widths: of what stays together, from the smallest to the largest.
    """
    order = diagonal.argsort(descending=True, stable=True)
    for width in widths:
        place = diagonal.view(*diagonal.shape[:-1], -1, width).sum(-1).argsort(descending=True, stable=True).argsort()
        order = order.gather(-1, place.gather(-1, order // width).argsort(stable=True))
    return order
