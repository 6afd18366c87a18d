"""Close codes of a batch of super-blocks and what they sum up to, an operation on tensors after the other.

Shape letters: R super-blocks, G groups of one, S segments of a group, T spans of a segment, U vectors of a span,
V columns of a vector.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.numerics.codebooks.batched_search import BlockBatch, lookup


def nearest(blocks: BlockBatch, size: Tensor, pull: Tensor, scale: Tensor, flip: Tensor | None) -> Tensor:
    """Values of the best of close entries, [R, G, S, T, U, V]; see `nearest.close_entry`.

    Args:
        blocks: which.
        size: what magnitudes are to meet, [R, G, S, T, U, V].
        pull: weight times that.
        scale: [R, G, 1, 1, 1, 1].
        flip: whether one sign has to flip, bool [R, G, S, T, 1]; None: never.
    """
    tables = lookup(blocks.book, size.device)
    inverse = torch.where(scale != 0, 1 / scale, 0.0)
    digits = torch.searchsorted(tables.middles, (size * inverse).contiguous())
    key = (digits * tables.places).sum(-1)
    exact = tables.exact[key].bool()
    among = tables.close[key][..., : blocks.close].long()
    values = tables.values[among]
    costs = (values * (scale * blocks.weight)[..., None, :] - 2 * pull[..., None, :]).mul_(values).sum(-1)
    if flip is not None:
        least = (pull[..., None, :] * values).amin(-1)
        costs += torch.where(flip[..., None], 4 * least, 0.0)
        exact = exact & ~flip
    place = torch.where(exact, 0, (costs * scale[..., 0, None]).argmin(-1))
    return tables.values[among.gather(-1, place[..., None])[..., 0]]


def products(blocks: BlockBatch, scale: Tensor, shift: Tensor | float) -> tuple[Tensor, Tensor]:
    """See `BlockBatch.products`."""
    book, scale = blocks.book, scale[..., None, None, None, None]
    if isinstance(shift, Tensor):
        shift = shift[..., None, None, None]
    d = blocks.x - scale * shift if blocks.rule.delta else blocks.x
    size = d if book.signs == "none" else d.abs()
    pull = blocks.weight * size
    odd = ((d * scale < 0).sum((-2, -1)) % 2 == 1)[..., None] if book.signs == "even" else None
    values = nearest(blocks, size, pull, scale, odd if book.span == book.width else None)
    if blocks.rule.delta:
        values = values + shift
        xl, ll = blocks.weight * values * blocks.x, blocks.weight * values.square()
    else:
        xl, ll = pull * values, blocks.weight * values.square()
    whole = xl.sum((-2, -1))
    if odd is not None:
        whole = whole - torch.where(odd[..., 0], 2 * (pull * values).amin((-2, -1)), 0.0)
    return whole.sum(-1), ll.sum((-3, -2, -1))
