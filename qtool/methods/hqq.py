"""Half-quadratic quantization: offsets that leave few large errors instead of the least squared one. Data-free.

    min over o, e    |e|^p + beta / 2 (w - w_hat(o) - e)^2        p < 1, scales as the format's fit has them

The errors that the offset need not explain, e, follow from a shrinkage of all of them; the offset of a group is then
the mean of what it has to explain. Both by turns, with a beta that grows, for as long as the p-norm of a group's errors
falls (https://dropbox.github.io/hqq_blog/). Errors are counted in steps of the grid, so that the result does not depend
on the size of the weights.

Shape letters: N rows, K columns, G groups.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from qtool.formats._base import CHUNK, Format, Params, Quantized, expand
from qtool.methods._base import Method, Solution
from qtool.methods._refine import join_rows
from qtool.numerics.solving.normal import per_group
from qtool.stats._base import InputStats, Statistic


class HQQ(Method):
    """Half-quadratic offsets.

    Attributes:
        power: p; the smaller it is, the more single large errors are let be.
        beta: how far e may stay from the errors, at first.
        growth: of beta from one iteration to the next.
        iterations: most of them.
    """

    power: float = Field(0.7, gt=0, lt=1)
    beta: float = Field(10.0, gt=0)
    growth: float = Field(1.01, ge=1)
    iterations: int = Field(20, ge=1, le=1000)

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """Nothing."""
        return frozenset()

    def solve(self, w: Tensor, stats: InputStats | None, fmt: Format) -> Solution:
        """See `Method.solve`."""
        params = fmt.fit(w)
        if not fmt.free_offset:
            reason = f"rounded to nearest: {fmt.label} has no offsets that could be moved"
            return Solution(Quantized(fmt.snap(w, params), params, fmt), reason)
        size = max(1, CHUNK // w.shape[1])
        pieces = (slice(a, a + size) for a in range(0, len(w), size))
        found = join_rows([self._moved(w[at], {n: p[at] for n, p in params.items()}, fmt) for at in pieces])
        return Solution(Quantized(fmt.snap(w, found), found, fmt))

    def _moved(self, w: Tensor, params: Params, fmt: Format) -> Params:
        """Parameters of some rows with the best offsets found."""
        levels, scale = fmt.levels().to(w.device), fmt.affine(params)[0]
        steps, groups = expand(torch.where(scale == 0, 1.0, scale).abs(), w.shape[1]), scale.shape[1]
        best, beta, least = params, self.beta, torch.full_like(scale, torch.inf)
        better = torch.ones_like(scale, dtype=torch.bool)
        for _ in range(self.iterations + 1):
            codes = fmt.snap(w, params)
            error = (w - fmt.decode(codes, params)) / steps
            size = per_group(error.abs().pow(self.power), groups)
            better &= size < least
            if not bool(better.any()):
                break
            least = torch.where(better, size, least)
            best = {name: torch.where(better, p, best[name]) for name, p in params.items()}
            rest = w - expand(scale, w.shape[1]) * levels[codes.long()] - shrunk(error, beta, self.power) * steps
            params = fmt.refit(params, scale, per_group(rest, groups) * (groups / w.shape[1]))
            beta *= self.growth
        return best


def shrunk(x: Tensor, beta: float, power: float) -> Tensor:
    """Near to the minimum of |e|^p + beta / 2 (x - e)^2 over e (the generalized shrinkage of the paper)."""
    size = x.abs()
    return x.sign() * (size - size.clamp_min(1e-8).pow(power - 1) / beta).clamp_min(0)
