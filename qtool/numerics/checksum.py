"""A checksum of many tensors that is quick enough to take of everything a run reads.

Four sums of 64-bit words, each word mixed in by the round of XXH64, which is a bijection: one changed word is always
noticed, and several are missed once in 2^64. It guards against accidents, not against somebody who wants to be missed.
Source of the round and its constants: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from numba import njit
from torch import Tensor

FIRST = np.uint64(0x9E3779B185EBCA87)
SECOND = np.uint64(0xC2B2AE3D27D4EB4F)
LEFT, RIGHT = np.uint64(31), np.uint64(33)
WIDTH = 32
"""Bytes that one step takes in."""


@njit(nogil=True, cache=True)
def mix_words(words, sums):  # type: ignore[no-untyped-def]
    """Mixes uint64 words, a multiple of four, into uint64 sums [4]."""
    a, b, c, d = sums[0], sums[1], sums[2], sums[3]
    for i in range(0, len(words), 4):
        a += words[i] * SECOND
        b += words[i + 1] * SECOND
        c += words[i + 2] * SECOND
        d += words[i + 3] * SECOND
        a = ((a << LEFT) | (a >> RIGHT)) * FIRST
        b = ((b << LEFT) | (b >> RIGHT)) * FIRST
        c = ((c << LEFT) | (c >> RIGHT)) * FIRST
        d = ((d << LEFT) | (d >> RIGHT)) * FIRST
    sums[0], sums[1], sums[2], sums[3] = a, b, c, d


class Checksum:
    """Grows tensor by tensor; their order, names, types, shapes and bytes count."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes in a tensor, or some rows of one."""
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        self.grow(f"{name} {tensor.dtype} {tuple(tensor.shape)}", [data])

    def grow(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Takes in bytes under a name, uint8 [n] each; all pieces but the last are multiples of WIDTH long."""
        self._digest.update(f"{name}\n".encode())
        sums, rest = np.zeros(4, np.uint64), b""
        for piece in pieces:
            data = piece.numpy()
            whole = len(data) // WIDTH * WIDTH
            mix_words(np.frombuffer(data[:whole], np.uint64), sums)
            rest = data[whole:].tobytes()
        self._digest.update(sums.tobytes() + rest)

    def hexdigest(self) -> str:
        """What came of it, 32 characters."""
        return self._digest.hexdigest()
