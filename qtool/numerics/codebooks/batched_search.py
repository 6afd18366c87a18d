"""The search of `vector_search` for all super-blocks at once, for CUDA devices: tensor operations around a kernel.

The same steps in the same order; sums are rounded otherwise, so that ties may end otherwise.

Shape letters: R super-blocks, G groups of one, S segments of a group, T spans of a segment, U vectors of a span,
V columns of a vector, M magnitudes, E entries, P promising values of d.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qtool.numerics.checks import LARGEST, refuse_large
from qtool.numerics.codebooks.codebook import Codebook
from qtool.numerics.codebooks.scale_rule import AGAIN, ScaleRule, VectorEffort

ROWS = 1 << 14
"""That are searched at once."""


class Lookup(NamedTuple):
    """Tables of a codebook on a device, see `codebook.Tables`.

    Attributes:
        middles: float32 [M - 1].
        places: int32 [V], of digits in base M.
        close: int32 [M^V, neighbors], where the first is an entry like all.
        exact: uint8 [M^V], whether the first entry has just these magnitudes.
        values: float32 [E, V].
    """

    middles: Tensor
    places: Tensor
    close: Tensor
    exact: Tensor
    values: Tensor


@cache
def lookup(book: Codebook, device: torch.device) -> Lookup:
    """Of a codebook."""
    tables = book.tables
    close = torch.from_numpy(tables.close).int()
    exact = close[:, 0] >= 0
    close[:, 0] = torch.where(exact, close[:, 0], -1 - close[:, 0])
    places = (len(book.magnitudes) ** torch.arange(book.width).flip(0)).int()
    middles, values = torch.from_numpy(tables.middles), torch.from_numpy(tables.values)
    return Lookup(*(t.contiguous().to(device) for t in (middles, places, close, exact.to(torch.uint8), values)))


class BlockBatch(NamedTuple):
    """Super-blocks, and what their search needs.

    Attributes:
        x: float32 [R, G, S, T, U, V].
        weight: float32, of squared errors, of as many dimensions, that are 1 or those of x.
        rule: how scales are stored.
        book: what is allowed.
        close: entries near a vector that are compared.
    """

    x: Tensor
    weight: Tensor
    rule: ScaleRule
    book: Codebook
    close: int

    def products(self, scale: Tensor, shift: Tensor | float) -> tuple[Tensor, Tensor]:
        """(sum of weight x level, sum of weight level^2) of segments, [R, G, S], for close codes at scales [R, G].

        Levels are shifted ones; shift: [R, G, S], or one for all.
        """
        from qtool.numerics.codebooks import cuda_close

        shape, moved = self.x.shape, None
        if self.rule.delta:
            moved = shift if isinstance(shift, Tensor) else torch.full(shape[:3], shift, device=scale.device)
            moved = moved.contiguous().flatten(1)
        tables = lookup(self.book, scale.device)
        pair = cuda_close.products(
            self.x.flatten(1), self.weight.flatten(), scale.contiguous(), moved, self.book, self.close, tables
        )
        xl, ll = (t.view(*shape[:3], -1).sum(-1) for t in pair)
        return xl, ll

    def of_groups(self, scale: Tensor, guess: bool) -> tuple[Tensor, Tensor, Tensor]:
        """`products` of groups, [R, G] each, with the better signs of shifts, or the likely ones: int8 [R, G, S]."""
        signs = torch.ones(self.x.shape[:3], dtype=torch.int8, device=self.x.device)
        if not self.rule.delta:
            xl, ll = self.products(scale, 0.0)
            return xl.sum(-1), ll.sum(-1), signs
        if guess:
            y = self.x / scale[..., None, None, None, None]
            left = (self.weight * (y - y.round().clamp(-1, 1))).sum((-3, -2, -1))
            signs = torch.where((left >= 0) | (scale <= 0)[..., None], signs, -signs)
            xl, ll = self.products(scale, self.rule.delta * signs)
            return xl.sum(-1), ll.sum(-1), signs
        (xl, ll), (other_xl, other_ll) = (self.products(scale, sign * self.rule.delta) for sign in (1, -1))
        wide = scale[..., None]
        other = wide * (wide * other_ll - 2 * other_xl) < wide * (wide * ll - 2 * xl)
        xl, ll = torch.where(other, other_xl, xl), torch.where(other, other_ll, ll)
        return xl.sum(-1), ll.sum(-1), torch.where(other, -signs, signs)


def swept(blocks: BlockBatch, ratios: Tensor, guess: bool) -> tuple[Tensor, Tensor]:
    """(scale, its sum of weight level^2) of the best step of each group's sweep, [R, G]."""
    across = (2, 3, 4, 5)
    total = blocks.weight.expand(1, *blocks.x.shape[1:]).sum(across)
    rms = ((blocks.weight * blocks.x.square()).sum(across) / total).sqrt()
    best, scale, best_ll = torch.zeros_like(rms), torch.zeros_like(rms), torch.zeros_like(rms)
    for i in range(len(ratios) + AGAIN):
        tried = rms * ratios[i] if i < len(ratios) else scale
        xl, ll, _ = blocks.of_groups(tried, guess)
        better = (rms > 0) & (xl > 0) & (xl * xl > best * ll)
        divisor = torch.where(better, ll, 1.0)
        best, scale = torch.where(better, xl * xl / divisor, best), torch.where(better, xl / divisor, scale)
        best_ll = torch.where(better, ll, best_ll)
    return scale, best_ll


def proposed(scale: Tensor, ll: Tensor, rule: ScaleRule, effort: VectorEffort) -> Tensor:
    """The most promising values of d, [R, P]; see `vector_search.propose`."""
    share = torch.arange(effort.multipliers, device=scale.device, dtype=torch.float32) / (effort.multipliers - 1)
    end = (2 * rule.top + 1) * (0.5 + 0.6 * share)
    largest = scale.amax(1, keepdim=True)
    unit = (largest / end)[..., None]
    miss = unit * (2 * nearest_step(scale[:, None], unit, rule.top) + 1) - scale[:, None]
    costs = (ll[:, None] * miss.square()).sum(-1)
    place = costs.topk(effort.starts, dim=1, largest=False).indices
    return torch.where(largest > 0, unit[..., 0].gather(1, place) / rule.unit, 0.0)


def nearest_step(scale: Tensor, unit: Tensor, top: int) -> Tensor:
    """The s whose scale, unit (2 s + 1), is nearest; 0 where the unit is 0."""
    wanted = ((scale * torch.where(unit > 0, 1 / unit, 0.0) - 1) / 2).round()
    return wanted.clamp(0, top)


def improved(blocks: BlockBatch, d: Tensor, s: Tensor, effort: VectorEffort) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d as fp16 has it [R], s [R, G], signs [R, G, S], cost [R]); see `vector_search.improve_super_block`."""
    rule = blocks.rule
    signs = torch.ones(blocks.x.shape[:3], dtype=torch.int8, device=s.device)
    cost = torch.full_like(s, torch.inf)
    for turn in range(effort.rounds + 1):
        d = d.half().float()
        cost, xl, ll, center = torch.full_like(s, torch.inf), torch.zeros_like(s), torch.zeros_like(s), s
        for step in range(-effort.around, effort.around + 1):
            tried = center + step
            scale = (d * rule.unit)[:, None] * (2 * tried + 1)
            new_xl, new_ll, other = blocks.of_groups(scale, effort.around == 0)
            found = scale * (scale * new_ll - 2 * new_xl)
            better = (tried >= 0) & (tried <= rule.top) & (found < cost)
            cost, s = torch.where(better, found, cost), torch.where(better, tried, s)
            xl, ll = torch.where(better, new_xl, xl), torch.where(better, new_ll, ll)
            signs = torch.where(better[..., None], other, signs)
        steps = 2 * s + 1
        top, bottom = (steps * xl).sum(1), (steps.square() * ll).sum(1) * rule.unit
        if turn < effort.rounds:
            d = torch.where((top > 0) & (bottom > 0), top / torch.where(bottom > 0, bottom, 1.0), d)
    return d, s, signs, cost.sum(1)


def search_blocks(blocks: BlockBatch, ratios: Tensor, effort: VectorEffort) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d [R], s [R, G], signs [R, G, S], errors [R] in parts of that of zeros); see `vector_search.vector_scales`."""
    scale, ll = swept(blocks, ratios, effort.around == 0)
    best: list[Tensor] = []
    for d in proposed(scale, ll, blocks.rule, effort).unbind(1):
        s = nearest_step(scale, (d * blocks.rule.unit)[:, None], blocks.rule.top)
        found = improved(blocks, d, s, effort)
        if best:
            better = found[3] < best[3]
            shapes = [better.view(-1, *[1] * (new.dim() - 1)) for new in found]
            found = tuple(map(torch.where, shapes, found, best))  # type: ignore[assignment]
        best = list(found)
    d, s, signs, cost = best
    energy = (blocks.weight * blocks.x.square()).sum((1, 2, 3, 4, 5))
    return d, s, signs, torch.where(energy > 0, 1 + cost / torch.where(energy > 0, energy, 1.0), 0.0)


def vector_scales(
    x: Tensor, weight: Tensor, book: Codebook, block: int, rule: ScaleRule, ratios: np.ndarray, effort: VectorEffort
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d, s, signs of the shifts, errors) of every super-block; see `vector_search.vector_scales`.

    Raises:
        NumericsError: weights are too large.
    """
    if (largest := float(x.abs().amax())) > LARGEST or largest != largest:
        refuse_large(largest, LARGEST)
    shape = (
        block // rule.group,
        rule.group // rule.segment,
        rule.segment // book.span,
        book.span // book.width,
        book.width,
    )
    steps = torch.from_numpy(ratios).to(x.device)
    parts = []
    for a in range(0, len(x), ROWS):
        found = []
        for b in range(0, x.shape[1], block):
            values = x[a : a + ROWS, b : b + block].reshape(-1, *shape).contiguous()
            here = BlockBatch(values, weight[b : b + block].view(1, *shape).to(x.device), rule, book, effort.close)
            d, s, signs, errors = search_blocks(here, steps, effort)
            found.append((d[:, None], s, signs.flatten(1), errors[:, None]))
        parts.append([torch.cat(part, 1) for part in zip(*found, strict=True)])
    d, s, signs, errors = (torch.cat(part) for part in zip(*parts, strict=True))
    return d, s, signs, errors
