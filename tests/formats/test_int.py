"""The integer family: every code of every grid, compressed-tensors' own arithmetic, shorthand, storage."""

from __future__ import annotations

import pytest
import torch

from qtool.errors import NumericsError, QtoolError
from qtool.formats._spelling import parse_format
from qtool.formats.int import Int

LABELS = [f"int{b}-{g}{a}" for b in range(2, 9) for g in ("g32", "channel", "tensor") for a in ("", "-asym")]


@pytest.mark.parametrize("label", LABELS)
def test_shorthand_round_trip(label: str) -> None:
    assert parse_format(label).label == label


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_code_decodes_and_snaps_back(bits: int, symmetric: bool) -> None:
    fmt = Int(bits=bits, group=1 << bits, symmetric=symmetric)
    codes = torch.arange(1 << bits, dtype=torch.uint8)[None].repeat(3, 1)
    params = {"scale": torch.tensor([[0.5], [-0.25], [0.01]], dtype=torch.bfloat16)}
    if not symmetric:
        params["zero"] = torch.tensor([[-(1 << bits - 1)], [0], [(1 << bits - 1) - 1]], dtype=torch.int8)
    values = fmt.decode(codes, params)
    zero = params["zero"].float() if not symmetric else 0
    expected = (codes.float() - (1 << bits - 1) - zero) * params["scale"].float()
    assert torch.equal(values, expected)
    assert torch.equal(fmt.snap(values, params), codes)
    beyond = fmt.snap(torch.tensor([[1e9, -1e9]]), {n: p[:1] for n, p in params.items()})
    assert beyond.tolist() == [[(1 << bits) - 1, 0]]


def test_ties_go_to_the_even_level() -> None:
    fmt = Int(bits=4, group=4)
    params = {"scale": torch.ones(1, 1, dtype=torch.bfloat16)}
    assert (fmt.snap(torch.tensor([[0.5, 1.5, -0.5, -1.5]]), params).int() - 8).tolist() == [[0, 2, 0, -2]]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_minmax_is_that_of_compressed_tensors(bits: int, symmetric: bool) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    fmt = Int(bits=bits, group=32, symmetric=symmetric, scales="minmax", scale_dtype="fp32")
    params = fmt.fit(w)
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=32)
    groups = w.view(16, 2, 32)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    torch.testing.assert_close(params["scale"], scale, rtol=1e-6, atol=0)
    theirs = quantize(w, scale, zero, args, dtype=torch.int8)
    ours = fmt.snap(w, params).int() - (1 << bits - 1)
    assert (ours != theirs).float().mean() < 0.002  # a tie may fall either way: x / s + z against (x + s z) / s
    torch.testing.assert_close(
        fmt.decode(fmt.snap(w, params), params), dequantize(theirs.float(), scale, zero, args), atol=0.05, rtol=0
    )


@pytest.mark.parametrize("label", ["int2-g32", "int3-g32", "int4-g32", "int4-g32-asym", "int4-channel", "int8-tensor"])
def test_search_never_loses_to_minmax(label: str) -> None:
    w = torch.randn(64, 128, generator=torch.Generator().manual_seed(2)) ** 3
    searched = parse_format(label)
    plain = searched.model_copy(update={"scales": "minmax"})
    errors = [float((w - f.decode(f.snap(w, p), p)).square().sum()) for f in (searched, plain) for p in [f.fit(w)]]
    assert errors[0] < errors[1]


SQNR_FLOOR = {2: 9.0, 3: 14.6, 4: 20.3, 5: 26.1, 6: 32.0, 7: 38.6, 8: 44.6}
"""dB on normal weights with group 64, within 1 dB of what was measured."""


@pytest.mark.parametrize("bits", SQNR_FLOOR)
def test_error_of_normal_weights(bits: int) -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    fmt = Int(bits=bits, group=64)
    q = fmt.snap(w, params := fmt.fit(w))
    sqnr = 10 * torch.log10(w.square().sum() / (w - fmt.decode(q, params)).square().sum())
    assert SQNR_FLOOR[bits] <= sqnr <= SQNR_FLOOR[bits] + 1.0


def test_storage_counts_scales_and_zero_points() -> None:
    assert Int(bits=4, group=128).storage_bits(10, 256) == 10 * 256 * 4 + 20 * 16
    assert Int(bits=3, group=64, symmetric=False).storage_bits(10, 256) == 10 * 256 * 3 + 40 * (16 + 3)
    assert Int(bits=8, group="channel", scale_dtype="fp32").storage_bits(10, 256) == 10 * 256 * 8 + 10 * 32
    assert Int(bits=8, group="tensor").storage_bits(10, 256) == 10 * 256 * 8 + 16


def test_rows_that_do_not_divide_name_the_groups_that_do() -> None:
    assert Int(bits=4, group=128).misfit(576) == (
        "rows of 576 columns are not divisible by 128; groups that divide: 96, 64, 192"
    )
    assert Int(bits=4, group=64).misfit(576) is None
    assert Int(bits=4, group="channel").misfit(577) is None


def test_near_spellings_are_suggested() -> None:
    with pytest.raises((QtoolError, ValueError), match="int4-g128"):
        parse_format("int4g128")


@pytest.mark.parametrize("label", ["int4-g32", "int4-g32-asym", "int2-channel"])
@pytest.mark.parametrize("size", [1e-45, 1e-42, 1e-39, 1e-37])
def test_weights_next_to_nothing_decode_to_next_to_nothing(label: str, size: float) -> None:
    w = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * size
    fmt = parse_format(label)
    params = fmt.fit(w, torch.rand(64))
    assert float(fmt.decode(fmt.snap(w, params), params).abs().max()) <= 10 * size


def test_zero_groups_get_a_harmless_scale() -> None:
    for fmt in (Int(bits=4, group=32), Int(bits=4, group=32, symmetric=False), Int(bits=8, group=32, scales="minmax")):
        w = torch.zeros(2, 64)
        params = fmt.fit(w)
        assert bool((params["scale"] == 1).all())
        assert bool((fmt.decode(fmt.snap(w, params), params) == 0).all())


@pytest.mark.parametrize("scales", ["minmax", "search"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_beyond_their_type_are_an_error(symmetric: bool, scales: str) -> None:
    w = torch.tensor([[-1e7, 1e7] * 16])
    fmt = Int(bits=4, group=32, symmetric=symmetric, scales=scales, scale_dtype="fp16")
    with pytest.raises(
        NumericsError, match=r"cannot store its scales in fp16: wanted at most 65504, found \S+e\+06; use"
    ):
        fmt.fit(w)
    for dtype in ("bf16", "fp32"):  # no type would do
        with pytest.raises(
            NumericsError, match=rf"cannot store its scales in {dtype}: wanted at most 3\.\S+, found nan$"
        ):
            Int(bits=4, group=32, scales="minmax", scale_dtype=dtype).fit(torch.full((1, 32), torch.nan))
