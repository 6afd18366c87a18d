"""Packing of n-bit fields into a dense little-endian stream, and back.

Field i of a row occupies the row's bits [i * b, (i + 1) * b), least significant bit first, across byte and word
boundaries: the layout of compressed-tensors' `pack-quantized` (since 0.18 for 3, 5, 6 and 7 bits,
https://github.com/vllm-project/compressed-tensors) and of qtool's own neutral checkpoint. The last byte or word of a
row is filled up with zeros.

Eight fields of b bits are exactly b bytes, so eight of them at a time are gathered in one 64-bit integer.

Shape letters: K fields of a row, b bits of a field.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.nn.functional import pad

from qtool.numerics.threads.parallel import over_rows


@njit(nogil=True, cache=True)
def pack_rows(words, places, packed, start, stop):  # type: ignore[no-untyped-def]
    """Fills packed uint8 [R, K / 8 * b] for rows start to stop of words uint64 [R, K / 8], eight fields in each.

    Fields move together in pairs, pairs of pairs, and pairs of those. places: a tuple of b numbers, whose length is
    known when this is compiled.
    """
    bits = np.uint64(len(places))
    for n in range(start, stop):
        for i in range(words.shape[1]):
            x = words[n, i]
            x = x & np.uint64(0x00FF00FF00FF00FF) | (x >> np.uint64(8) & np.uint64(0x00FF00FF00FF00FF)) << bits
            x = x & np.uint64(0x0000FFFF0000FFFF) | (x >> np.uint64(16) & np.uint64(0x0000FFFF0000FFFF)) << bits * 2
            x = x & np.uint64(0x00000000FFFFFFFF) | x >> np.uint64(32) << bits * 4
            out = packed[n, i * len(places) : (i + 1) * len(places)]
            for k in range(len(places)):
                out[k] = np.uint8(x >> np.uint64(8 * k) & np.uint64(255))


@njit(nogil=True, cache=True)
def unpack_rows(packed, places, words, start, stop):  # type: ignore[no-untyped-def]
    """The inverse of `pack_rows`."""
    bits = np.uint64(len(places))
    one, two, four = np.uint64((1 << bits) - 1), np.uint64((1 << bits * 2) - 1), np.uint64((1 << bits * 4) - 1)
    two |= two << np.uint64(32)
    one |= one << np.uint64(16)
    one |= one << np.uint64(32)
    for n in range(start, stop):
        for i in range(words.shape[1]):
            stored, x = packed[n, i * len(places) : (i + 1) * len(places)], np.uint64(0)
            for k in range(len(places)):
                x |= np.uint64(stored[k]) << np.uint64(8 * k)
            x = x & four | (x >> bits * 4) << np.uint64(32)
            x = x & two | (x >> bits * 2 & two) << np.uint64(16)
            words[n, i] = x & one | (x >> bits & one) << np.uint64(8)


def pack(fields: Tensor, bits: int) -> Tensor:
    """Packs the last dimension.

    Args:
        fields: uint8 [..., K], each below 2^bits.
        bits: 0 to 8.

    Returns:
        uint8 [..., ceil(K * bits / 8)].
    """
    count = fields.shape[-1]
    if bits == 0:
        return fields[..., :0].contiguous()
    if bits == 8:
        return fields.contiguous()
    whole = pad(fields, (0, -count % 8)) if count % 8 else fields
    padded = whole.reshape(-1, count + -count % 8)
    words = padded.cpu().contiguous().numpy().view(np.uint64)
    packed, places = np.empty((len(words), words.shape[1] * bits), np.uint8), tuple(range(bits))
    over_rows(lambda a, b: pack_rows(words, places, packed, a, b), len(words))
    found = torch.from_numpy(packed).to(fields.device).view(*fields.shape[:-1], -1)
    return found[..., : (count * bits + 7) // 8].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack`.

    Args:
        packed: uint8 [..., at least ceil(K * bits / 8)].
        bits: 0 to 8.
        count: K, the number of fields of a row.

    Returns:
        uint8 [..., count].
    """
    if bits == 0:
        return packed.new_zeros((*packed.shape[:-1], count))
    if bits == 8:
        return packed[..., :count].contiguous()
    used = packed[..., : (count * bits + 7) // 8]
    width = used.shape[-1] + -used.shape[-1] % bits
    rows = pad(used, (0, width - used.shape[-1])).reshape(-1, width).cpu().contiguous().numpy()
    words, places = np.empty((len(rows), rows.shape[1] // bits), np.uint64), tuple(range(bits))
    over_rows(lambda a, b: unpack_rows(rows, places, words, a, b), len(rows))
    fields = torch.from_numpy(words.view(np.uint8)).to(packed.device)
    return fields.view(*packed.shape[:-1], -1)[..., :count].contiguous()


def pack_words(fields: Tensor, bits: int) -> Tensor:
    """`pack` into int32 words: uint8 [..., K] -> int32 [..., ceil(K * bits / 32)]."""
    packed = pack(fields, bits)
    padded = pad(packed, (0, -packed.shape[-1] % 4))
    return _recast(padded, torch.int32)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack_words`: int32 [..., ceil(count * bits / 32)] -> uint8 [..., count]."""
    return unpack(_recast(words, torch.uint8), bits, count)


@njit(nogil=True, cache=True)
def signed_nibbles(x):  # type: ignore[no-untyped-def]
    """Numbers from -7 to 7, stored from 0 on in the sixteen nibbles of x, as signs and magnitudes."""
    above = x + np.uint64(0x1111111111111111)  # has its highest bit where a number is not negative
    minus = ~(above >> np.uint64(3)) & np.uint64(0x1111111111111111)
    size = ((above & np.uint64(0x7777777777777777)) ^ minus * np.uint64(7)) + minus
    return size | minus << np.uint64(3)


@njit(nogil=True, cache=True)
def run_rows(q, shift, mask, places, flip, signed, table, words, packed, start, stop):  # type: ignore[no-untyped-def]
    """Fills packed [N, words] for rows start to stop of q [N, words], four or eight columns a word; see `stack_runs`.

    words: a tuple as long as a run, whose length is known when this is compiled, like that of places.
    """
    width, size = len(words), packed.itemsize
    for n in range(start, stop):
        source, target = q[n], packed[n]
        for run in range(len(target) // width):
            columns = source[run * len(places) * width : (run + 1) * len(places) * width]
            out = target[run * width : (run + 1) * width]
            for i in range(width):
                total = np.uint64(0)
                for k in range(len(places)):
                    total += (columns[i + k * width] >> shift & mask) * places[k]
                total = signed_nibbles(total) if signed else total ^ flip
                if len(table):
                    found = np.uint64(0)
                    for k in range(size):
                        found |= np.uint64(table[total >> np.uint64(8 * k) & np.uint64(255)]) << np.uint64(8 * k)
                    total = found
                out[i] = total


def stack_runs(
    q: Tensor,
    places: tuple[int, ...],
    width: int,
    *,
    table: Tensor | None = None,
    field: tuple[int, int] = (0, 255),
    flip: int = 0,
    signed: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Makes one byte of columns that lie `width` apart: `table[flip ^ sum of place * field of q]`.

    Args:
        q: uint8 [N, C], columns contiguous.
        places: what the fields of the first, second, ... of such columns count; no sum may exceed 255.
        width: of a run, a multiple of 4.
        table: uint8 [256], or none.
        field: where it begins in a code, and a mask of its bits.
        flip: mask of bits that are inverted.
        signed: whether half bytes, numbers from -7 to 7 stored from 0 on, become a sign and a magnitude instead.
        out: what is filled, if not new memory: uint8 [N, C / places], columns contiguous, such as a part of blocks.

    Returns:
        uint8 [N, C / places]: byte l of a run of places * width columns holds columns l, l + width, l + 2 * width, ...
    """
    packed = torch.empty(len(q), q.shape[1] // len(places), dtype=torch.uint8) if out is None else out
    word, ones = (np.uint32, 0x01010101) if width % 8 else (np.uint64, 0x0101010101010101)
    rule = word(field[0]), word(field[1] * ones), tuple(map(word, places)), word(flip * ones), signed
    entries = np.empty(0, np.uint8) if table is None else table.numpy()
    run, arrays = tuple(range(width // word().itemsize)), [part.numpy().view(word) for part in (q, packed)]
    over_rows(lambda a, b: run_rows(arrays[0], *rule, entries, run, arrays[1], a, b), len(q))
    return packed


def planes(q: Tensor, bits: int, width: int = 32, shift: int = 0, out: Tensor | None = None) -> Tensor:
    """Stacks runs of `width` columns in one another's higher bits.

    Args:
        q: uint8 [..., C].
        bits: of a field: 1, 2 or 4.
        width: of a run, a multiple of 4.
        shift: where a field begins in a code.
        out: see `stack_runs`, if q is [N, C].

    Returns:
        uint8 [..., C * bits / 8]: byte l of a run of 8 / bits * width columns holds columns l, l + width, and so on,
        from its lowest bits up.
    """
    places = tuple(1 << place for place in range(0, 8, bits))
    rows = q.contiguous().view(-1, q.shape[-1])
    packed = stack_runs(rows, places, width, field=(shift, (1 << bits) - 1), out=out)
    return packed.view(*q.shape[:-1], -1)


def from_planes(packed: Tensor, bits: int, width: int = 32) -> Tensor:
    """The inverse of `planes`."""
    places = torch.arange(0, 8, bits, dtype=torch.uint8)
    runs = packed.reshape(*packed.shape[:-1], -1, 1, width) >> places[:, None] & (1 << bits) - 1
    return runs.flatten(-3)


def _recast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bytes in another type. Flat, because `view` minds the strides even of dimensions of size 1."""
    return x.contiguous().reshape(-1).view(dtype).reshape(*x.shape[:-1], -1)
