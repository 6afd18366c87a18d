"""Free offsets against loops, brute force, and the formats that they can hold."""

import pytest
import torch

from qtool.errors import NumericsError
from qtool.formats._base import Quantized
from qtool.formats._spelling import parse_format
from qtool.formats.biased import Biased
from qtool.formats.int import Int
from qtool.formats.q4_0 import Q4_0
from qtool.formats.q4_1 import Q4_1
from qtool.formats.tq2_0 import TQ2_0

W = torch.randn(6, 256, generator=torch.Generator().manual_seed(2)) * 0.1 + 0.07


def matrix(fmt, w=W):
    params = fmt.fit(w)
    return Quantized(fmt.snap(w, params), params, fmt)


def test_every_code_decodes_as_a_loop_says():
    fmt = Biased(bits=3, group=4)
    codes = torch.arange(8, dtype=torch.uint8).view(1, 8)
    params = {"scale": torch.tensor([[0.5, -0.25]]).bfloat16(), "offset": torch.tensor([[1.0, 3.0]]).bfloat16()}
    assert fmt.decode(codes, params).tolist() == [[1.0, 1.5, 2.0, 2.5, 2.0, 1.75, 1.5, 1.25]]
    assert fmt.levels().tolist() == list(range(8))


def test_minmax_covers_the_ends():
    found = matrix(Biased(bits=4, group=32, scales="minmax", scale_dtype="fp32")).decode()
    groups, decoded = W.reshape(6, 8, 32), found.reshape(6, 8, 32)
    assert torch.allclose(decoded.amin(-1), groups.amin(-1), atol=1e-6)
    assert torch.allclose(decoded.amax(-1), groups.amax(-1), atol=1e-6)
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    assert bool(((decoded - groups).abs() <= step[..., None] / 2 + 1e-6).all())


@pytest.mark.parametrize("bits", [2, 4])
def test_search_comes_near_brute_force(bits):
    w = W[:1, :32]
    levels = torch.arange(1 << bits).float()
    low, high = float(w.min()), float(w.max())
    best = torch.inf
    for a in torch.linspace(low, low + 0.4 * (high - low), 60):
        for b in torch.linspace(high - 0.4 * (high - low), high, 60):
            grid = a + (b - a) * levels / levels[-1]
            best = min(best, float((w - grid[(w[..., None] - grid).abs().argmin(-1)]).square().sum()))
    found = float((matrix(Biased(bits=bits, group=32, scale_dtype="fp32"), w).decode() - w).square().sum())
    assert found <= 1.05 * best


def test_search_beats_minmax_and_integers():
    def error(fmt):
        return float((matrix(fmt).decode() - W).square().sum())

    searched = error(Biased(bits=3, group=64))
    assert searched < 0.95 * error(Biased(bits=3, group=64, scales="minmax"))
    assert searched < error(Int(bits=3, group=64, symmetric=False))


def test_size_and_name():
    fmt = parse_format("biased4-g64")
    assert fmt == Biased(bits=4, group=64)
    assert fmt.label == "biased4-g64"
    assert fmt.storage_bits(6, 256) == 6 * 256 * 4 + 6 * 4 * 32
    assert parse_format("biased8-channel").storage_bits(6, 256) == 6 * 256 * 8 + 6 * 32


def test_groups_of_zeros_and_of_one_number():
    w = torch.cat([torch.zeros(2, 32), torch.full((2, 32), 0.375)], dim=1)
    assert torch.equal(matrix(Biased(bits=4, group=32), w).decode(), w)


def test_scales_beyond_their_type():
    with pytest.raises(
        NumericsError, match=r"biased4-g32 cannot store .* wanted at most 65504, found \S+; use scale_dtype"
    ):
        Biased(bits=4, group=32, scale_dtype="fp16").fit(W * 1e8)


HELD = {
    "q4_1": (Q4_1(), 4, 32, "fp16"),
    "q4_0": (Q4_0(), 5, 32, "fp16"),
    "ternary": (TQ2_0(), 2, 128, "fp16"),
    "sym": (Int(bits=4, group=128), 4, 64, "bf16"),
    "asym": (Int(bits=4, group=64, symmetric=False, scale_dtype="fp16"), 4, 64, "fp32"),
    "wider": (Biased(bits=3, group=64), 6, 32, "bf16"),
}


@pytest.mark.parametrize(("source", "bits", "group", "dtype"), HELD.values(), ids=HELD)
def test_holds_integers_and_blocks(source, bits, group, dtype):
    given = matrix(source)
    held = Biased(bits=bits, group=group).hold(given)
    assert torch.equal(held.decode(), given.decode())
    assert held.format.scale_dtype == dtype
    assert held.params["scale"].shape == (6, 256 // group)


def test_what_it_cannot_hold():
    assert Biased(bits=4, group=32).may_hold(Int(bits=5, group=32)).startswith("the range of int5-g32 does not fit")
    assert Biased(bits=4, group=64).may_hold(Q4_1()).startswith("the groups of q4_1 do not consist of")
    assert Biased(bits=8, group=16).may_hold(parse_format("fp8-channel")) == "biased8-g16 holds no fp8-channel"


def test_blocks_hold_it_where_fp16_does():
    given = matrix(Biased(bits=4, group=64))
    held = Q4_1().hold(given)
    assert torch.equal(held.decode(), given.decode())
    assert parse_format("q5_0").may_hold(Biased(bits=4, group=64)) == "q5_0 holds no biased4-g64"
    wide = matrix(Biased(bits=4, group=64, scale_dtype="fp32"))
    assert Q4_1().hold(wide).endswith("not exact in fp16")
