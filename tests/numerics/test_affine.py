"""Compiled rounding and decoding against torch's own operations, bit by bit."""

from __future__ import annotations

import pytest
import torch

from qtool.numerics.grids.affine import decode_levels, round_to_levels
from qtool.numerics.metrics import block_errors


@pytest.mark.parametrize("groups", [1, 3, 96], ids=["row", "groups", "columns"])
@pytest.mark.parametrize(("lowest", "highest"), [(-8, 7), (0, 3), (-128, 127)], ids=["int4", "uint2", "int8"])
def test_rounding_and_decoding_equal_torch(groups: int, lowest: int, highest: int) -> None:
    generator = torch.Generator().manual_seed(groups)
    w = torch.randn(17, 96, generator=generator) * 4
    w[:4] = torch.randint(-9, 9, (4, 96), generator=generator) / 2  # ties, for a scale of 1
    scale, offset = (torch.randn(17, groups, generator=generator) for _ in range(2))
    scale[:4], offset[:2], scale[5] = 1.0, 0.0, 0.0
    s, o = (p.repeat_interleave(96 // groups, dim=1) for p in (scale, offset))
    x = torch.where(s == 0, 0.0, (w - o) / torch.where(s == 0, 1.0, s))
    codes = round_to_levels(w, scale, offset, lowest, highest)
    assert torch.equal(codes, (x.round().clamp(lowest, highest) - lowest).to(torch.uint8))
    levels = torch.arange(lowest, highest + 1.0)
    assert torch.equal(decode_levels(codes, levels, scale, offset), levels[codes.long()] * s + o)


def test_levels_may_be_a_table() -> None:
    levels = torch.tensor([-2.5, -0.3, 0.7, 9.0])
    codes = torch.tensor([[0, 3, 2, 1]], dtype=torch.uint8)
    decoded = decode_levels(codes, levels, torch.tensor([[0.1, -3.0]]), torch.tensor([[1.0, 0.5]]))
    assert torch.equal(
        decoded,
        torch.tensor([[-2.5, 9.0, 0.7, -0.3]]) * torch.tensor([0.1, 0.1, -3.0, -3.0])
        + torch.tensor([1.0, 1.0, 0.5, 0.5]),
    )


@pytest.mark.parametrize("blocks", [1, 3, 12], ids=["row", "blocks", "groups"])
def test_errors_of_blocks_are_sums_of_squares(blocks: int) -> None:
    generator = torch.Generator().manual_seed(blocks)
    w, weight = torch.randn(17, 96, generator=generator) * 3, torch.rand(96, generator=generator)
    scale, offset = (torch.randn(17, 12, generator=generator) for _ in range(2))
    scale[2], scale[5, 3] = 0.0, 0.0
    decoded = decode_levels(round_to_levels(w, scale, offset, -4, 3), torch.arange(-4.0, 4.0), scale, offset)
    wanted = ((decoded.double() - w.double()).square() * weight).view(17, blocks, -1).sum(-1)
    torch.testing.assert_close(block_errors(w, decoded, weight, blocks), wanted)
    plain = (decoded.double() - w.double()).square().view(17, blocks, -1).sum(-1)
    torch.testing.assert_close(block_errors(w, decoded, None, blocks), plain)
