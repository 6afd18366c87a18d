"""The checksum against an implementation with Python's own integers, and against changes that must be seen."""

from __future__ import annotations

import hashlib
import struct

import pytest
import torch

from qtool.numerics.checksum import Checksum

MASK = 2**64 - 1


def slow(tensors):
    """The same by the book, word by word."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors.items():
        data = bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
        sums = [0, 0, 0, 0]
        for i in range(len(data) // 32 * 4):
            (word,) = struct.unpack_from("<Q", data, 8 * i)
            total = (sums[i % 4] + word * 0xC2B2AE3D27D4EB4F) & MASK
            sums[i % 4] = ((total << 31 | total >> 33) & MASK) * 0x9E3779B185EBCA87 & MASK
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(struct.pack("<4Q", *sums) + data[len(data) // 32 * 32 :])
    return digest.hexdigest()


def checksum(tensors):
    found = Checksum()
    for name, tensor in tensors.items():
        found.add(name, tensor)
    return found.hexdigest()


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(1)
    shapes = {"a": (7, 33), "b": (64,), "c": (3, 5), "empty": (0, 4), "scalar": ()}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**found, "half": found["a"].bfloat16(), "transposed": found["a"].T, "codes": torch.arange(200).byte()}


def test_it_is_what_plain_integers_give(tensors):
    assert checksum(tensors) == slow(tensors)


def test_every_change_is_seen(tensors):
    wanted, seen = checksum(tensors), set()
    for name, tensor in tensors.items():
        for place in range(tensor.numel()):
            changed = tensor.clone().contiguous()
            changed.view(-1).view(torch.uint8)[place * tensor.element_size()] ^= 1
            seen.add(checksum(tensors | {name: changed}))
        seen.add(checksum(tensors | {name: tensor.view(1, *tensor.shape)}))
        seen.add(checksum({key: value for key, value in tensors.items() if key != name}))
    negated = tensors["a"].clone()
    negated[2:4] *= -1  # signs only, an even number of them
    swapped = tensors["a"][[1, 0, 2, 3, 4, 5, 6]]
    seen |= {checksum(tensors | {"a": negated}), checksum(tensors | {"a": swapped})}
    assert wanted not in seen
    assert len(seen) == sum(t.numel() for t in tensors.values()) + 2 * len(tensors) + 2
