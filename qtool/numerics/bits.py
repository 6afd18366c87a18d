"""Packing of n-bit fields into a dense little-endian stream, and back.

Field i of a row occupies the row's bits [i * b, (i + 1) * b), least significant bit first, across byte and word
boundaries: the layout of compressed-tensors' `pack-quantized` (since 0.18 for 3, 5, 6 and 7 bits,
https://github.com/vllm-project/compressed-tensors) and of qtool's own neutral checkpoint. The last byte or word of a
row is filled up with zeros.

Eight fields of b bits are exactly b bytes, so eight of them at a time are gathered in one 64-bit integer: pairs, pairs
of pairs, and pairs of those.

Shape letters: K fields of a row, b bits of a field.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def pack(fields: Tensor, bits: int) -> Tensor:
    """Packs the last dimension.

    Args:
        fields: uint8 [..., K], each below 2^bits.
        bits: 1 to 8.

    Returns:
        uint8 [..., ceil(K * bits / 8)].
    """
    count = fields.shape[-1]
    if bits == 8:
        return fields.contiguous()
    gathered = pad(fields, (0, -count % 8))
    for width, dtype in ((bits, torch.int16), (2 * bits, torch.int32), (4 * bits, torch.int64)):
        gathered = gathered[..., ::2].to(dtype) | gathered[..., 1::2].to(dtype) << width
    packed = gathered.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(-2)
    return packed[..., : (count * bits + 7) // 8].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack`.

    Args:
        packed: uint8 [..., at least ceil(count * bits / 8)].
        bits: 1 to 8.
        count: K, the number of fields of a row.

    Returns:
        uint8 [..., count].
    """
    if bits == 8:
        return packed[..., :count].contiguous()
    packed = packed[..., : (count * bits + 7) // 8]
    groups = pad(packed, (0, -packed.shape[-1] % bits)).reshape(*packed.shape[:-1], -1, bits)
    gathered = _recast(pad(groups, (0, 8 - bits)), torch.int64).squeeze(-1)
    for width, dtype in ((4 * bits, torch.int32), (2 * bits, torch.int16), (bits, torch.uint8)):
        halves = (gathered & ((1 << width) - 1), gathered >> width)
        gathered = torch.stack([half.to(dtype) for half in halves], dim=-1).flatten(-2)
    return gathered[..., :count].contiguous()


def pack_words(fields: Tensor, bits: int) -> Tensor:
    """`pack` into int32 words: uint8 [..., K] -> int32 [..., ceil(K * bits / 32)]."""
    packed = pack(fields, bits)
    padded = pad(packed, (0, -packed.shape[-1] % 4))
    return _recast(padded, torch.int32)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_words`: int32 [..., ceil(count * bits / 32)] -> uint8 [..., count]."""
    return unpack(_recast(words, torch.uint8), bits, count)


def _recast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bytes in another type. Flat, because `view` minds the strides even of dimensions of size 1."""
    return x.contiguous().reshape(-1).view(dtype).reshape(*x.shape[:-1], -1)
