"""Shared exponents and two-level scales: rules at every boundary, literal values of other libraries, bytes of GGUF."""

from __future__ import annotations

from dataclasses import replace

import gguf
import pytest
import torch
from torch import Tensor

from qtool.errors import NumericsError
from qtool.formats._base import Format, Quantized
from qtool.formats._spelling import dump_format, parse_format
from qtool.formats.bfp import BFP
from qtool.formats.mxfp4 import MXFP4
from qtool.formats.mxfp8 import MXFP8
from qtool.formats.nvfp4 import NVFP4
from tests.formats.test_ggml_blocks import awkward, ggml_dequantize, ggml_quantize

MX = ["mxfp8", "mxfp8-e5m2", "mxfp6", "mxfp6-e3m2", "mxfp4", "mxint8"]
NV = ["nvfp4", "nvint4"]
RULES = ["floor", "up", "even", "fast", "default", "thorough"]
LABELS = [*(f"{name}-{rule}" for name in MX for rule in RULES if rule != "default"), *MX, "mxfp4-ggml"]
LABELS += [*NV, *(f"{name}-{rule}" for name in NV for rule in ("minmax", "fast", "thorough")), "bfp4-g16", "bfp8-g32"]


def weights(n: int = 64, k: int = 128, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def error(fmt: Format, w: Tensor, importance: Tensor | None = None) -> float:
    params = fmt.fit(w, importance)
    squares = (w - fmt.decode(fmt.snap(w, params), params)).double().square()
    return float((squares if importance is None else squares * importance).sum())


@pytest.mark.parametrize("label", LABELS)
def test_shorthand_round_trip(label: str) -> None:
    fmt = parse_format(label)
    assert fmt.label == label
    assert parse_format(dump_format(fmt)) == fmt
    assert type(fmt).parse(label + "-x") is None


def literal(largest: float) -> Tensor:
    """A group of 32 with that largest weight."""
    return torch.cat([torch.tensor([largest]), torch.zeros(31)])[None]


EVEN = {  # what compressed-tensors 0.19 was seen to store
    "mxfp4": {1: 125, 1.74: 125, 1.75: 126, 6: 127, 6.9: 127, 7: 128, 448: 134, 0: 0},
    "mxfp8": {1: 119, 1.74: 119, 1.75: 120, 6: 121, 7: 122, 448: 128, 0: 0},
}


@pytest.mark.parametrize("label", EVEN)
def test_exponents_of_compressed_tensors(label: str) -> None:
    fmt = parse_format(f"{label}-even")
    assert {x: int(fmt.fit(literal(x))["exponent"]) for x in EVEN[label]} == EVEN[label]


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_exponents_are_those_that_compressed_tensors_computes(bits: int) -> None:
    from compressed_tensors.quantization.utils.mxfp_utils import generate_mx_scales

    powers = 2.0 ** torch.arange(-40, 40).float()
    edges = torch.tensor([1, 1.2, 1.5, 1.749999, 1.75, 1.9, 1.9374, 1.9375, 1.99999])
    largest = (powers[:, None] * edges).flatten()
    w = torch.zeros(len(largest), 32)
    w[:, 5] = -largest
    found = parse_format(f"mxfp{bits}-even").fit(w)["exponent"].squeeze(1)
    assert torch.equal(found.float(), generate_mx_scales(largest, bits).clamp(0, 254))


@pytest.mark.parametrize("label", MX)
def test_floor_and_up_at_every_boundary(label: str) -> None:
    """floor(log2 largest) less the largest element's exponent; and the least exponent that clips nothing."""
    floor, up = parse_format(f"{label}-floor"), parse_format(f"{label}-up")
    top = float(floor.levels()[-1])
    element = {"mxfp8": 8, "mxfp8-e5m2": 15, "mxfp6": 2, "mxfp6-e3m2": 4, "mxfp4": 2, "mxint8": 6}[label]
    for power in (-30, -1, 0, 5, 40):
        for fraction in (1.0, 1.0 + 2**-23, 1.25, 1.5, 1.75, 1.875, 127 / 64, 2 - 2**-23):
            w = literal(fraction * 2.0**power)
            assert float(floor.affine(floor.fit(w))[0]) == 2.0 ** (power - element)
            scale = float(up.affine(up.fit(w))[0])
            assert float(w.max()) <= top * scale
            assert float(w.max()) > top * scale / 2
            assert scale == 2.0 ** round(torch.tensor(scale).log2().item())


@pytest.mark.parametrize("label", [*MX, *NV, "bfp4-g16"])
def test_every_code_comes_back_at_every_scale(label: str) -> None:
    fmt = parse_format(label)
    levels = fmt.levels()
    codes = torch.arange(320).remainder(len(levels)).to(torch.uint8)[None]
    name = "scale" if label in NV else "exponent"
    last = 127 if label in NV else 255
    rows = codes.repeat(last, 1)
    width = fmt.group_columns
    assert width is not None
    params = {name: torch.arange(last, dtype=torch.uint8)[:, None].repeat(1, 320 // width)}
    if label in NV:
        params["tensor"] = torch.full((last, 1), 2.0**-8).double()
    values = fmt.decode(rows, params)
    for n in (1, 2, 30, last // 2, last - 1):
        point = {"mxint8": 6, "bfp4-g16": 2}.get(label, 0)
        e4m3 = (n & 7) / 8 * 2**-6 if n < 8 else (1 + (n & 7) / 8) * 2.0 ** ((n >> 3) - 7)
        scale = e4m3 * 2**-8 if label in NV else 2.0 ** (n - 127 - point)
        assert values[n].tolist() == (levels[codes[0].long()].double() * scale).float().tolist()
    sound = slice(1, None) if label in NV else slice(20, 230)  # beyond, products leave float32's range
    assert torch.equal(fmt.snap(values, params)[sound], rows[sound])


@pytest.mark.parametrize("label", LABELS)
def test_zeros_the_very_small_the_very_large_and_what_is_no_number(label: str) -> None:
    fmt = parse_format(label)
    params = fmt.fit(torch.zeros(4, 64))
    assert bool((fmt.decode(fmt.snap(torch.zeros(4, 64), params), params) == 0).all())
    assert bool((fmt.affine(params)[0] > 0).all())
    for size in (1e-44, 1e-39, 1e-30, 1.0, 1e30):
        w = weights(4, 64).sign() * size
        params = fmt.fit(w)
        back = fmt.decode(fmt.snap(w, params), params)
        assert bool(back.isfinite().all())
        assert size < 1e-30 or float((back - w).abs().max()) <= 0.26 * size
    for bad in (torch.nan, -torch.inf):
        w = weights(4, 64)
        w[2, 40] = bad
        with pytest.raises(NumericsError, match="NaN or infinite"):
            fmt.fit(w)


MARGIN = {  # weighted error of the search over that of the usual rule: plain, and weighted by importance
    ("mxfp4", "floor"): (0.96, 0.96),
    ("mxfp4", "up"): (0.96, 0.96),
    ("mxfp4", "even"): (0.999, 0.995),
    ("mxfp8", "floor"): (0.85, 0.9),
    ("mxfp6", "floor"): (0.999, 0.999),
    ("mxint8", "floor"): (0.999, 0.98),
    ("nvfp4", "minmax"): (0.75, 0.6),
    ("nvint4", "minmax"): (0.92, 0.75),
}


@pytest.mark.parametrize(("name", "rule"), MARGIN)
def test_search_beats_the_usual_rule(name: str, rule: str) -> None:
    g = torch.Generator().manual_seed(3)
    w, importance = torch.randn(128, 512, generator=g), torch.randn(512, generator=g).mul(1.5).exp()
    ours, usual = parse_format(name), parse_format(f"{name}-{rule}")
    plain, weighted = MARGIN[name, rule]
    assert error(ours, w) <= plain * error(usual, w)
    assert error(ours, w, importance) <= weighted * error(usual, w, importance)
    thorough = parse_format(f"{name}-thorough")
    assert error(thorough, w, importance) <= (1 + 1e-6) * error(ours, w, importance)


@pytest.mark.parametrize("label", ["mxfp4", "mxfp8", "mxfp6", "mxint8", "bfp4-g16"])
def test_thorough_search_finds_the_best_exponent_of_all(label: str) -> None:
    fmt = parse_format(label).model_copy(update={"search": "thorough"})
    w = weights(16, 64)
    w[3, 5] = 8.0
    importance = torch.randn(64, generator=torch.Generator().manual_seed(4)).exp()
    found = fmt.fit(w, importance)["exponent"]
    width = fmt.group_columns
    assert width is not None
    errors = []
    for exponent in range(95, 145):
        params = {"exponent": torch.full_like(found, exponent)}
        squares = (fmt.decode(fmt.snap(w, params), params) - w).square() * importance
        errors.append(squares.view(16, -1, width).double().sum(-1))
    best = torch.stack(errors).amin(0)
    chosen = torch.stack(errors).gather(0, (found.long() - 95)[None])[0]
    assert bool((chosen <= best * (1 + 1e-5)).all())


def test_search_of_a_group_scale_finds_the_best_of_all() -> None:
    fmt = parse_format("nvfp4-thorough")
    w = weights(16, 64)
    importance = torch.randn(64, generator=torch.Generator().manual_seed(4)).exp()
    params = fmt.fit(w, importance)
    errors = []
    for bits in range(1, 127):
        tried = params | {"scale": torch.full_like(params["scale"], bits)}
        squares = (fmt.decode(fmt.snap(w, tried), tried) - w).square() * importance
        errors.append(squares.view(16, 4, 16).double().sum(-1))
    best = torch.stack(errors).amin(0)
    chosen = torch.stack(errors).gather(0, (params["scale"].long() - 1)[None])[0]
    assert bool((chosen <= best * (1 + 1e-5)).all())


SQNR = {"mxfp8": 31.4, "mxfp6": 30.9, "mxfp4": 18.9, "mxint8": 41.9, "nvfp4": 21.6, "nvint4": 21.5, "bfp4-g16": 19.0}
"""dB on normal weights, within 0.5 dB."""


@pytest.mark.parametrize("label", SQNR)
def test_error_of_normal_weights(label: str) -> None:
    w = weights(128, 512)
    sqnr = 10 * torch.tensor(float(w.double().square().sum()) / error(parse_format(label), w)).log10()
    assert SQNR[label] <= sqnr <= SQNR[label] + 0.5


def test_refit_takes_the_power_of_two_with_the_least_error() -> None:
    fmt = MXFP8()
    old = {"exponent": torch.tensor([[120, 121, 122, 123, 124]], dtype=torch.uint8)}
    wanted = torch.tensor([[1.49, 1.51, 3.01, -1.0, 0.0]])
    new = fmt.refit(old, wanted, torch.zeros(1, 5))
    assert new["exponent"].tolist() == [[127, 128, 129, 123, 124]]


def test_refit_takes_the_nearest_fp8_number_and_leaves_the_matrix_scale() -> None:
    fmt = NVFP4()
    old = {"scale": torch.full((2, 4), 0x38, dtype=torch.uint8), "tensor": torch.full((2, 1), 0.5).double()}
    wanted = torch.tensor([[0.531, 0.532, -3.0, 1e9], [1e-9, 0.0, 0.5, 0.6875]])
    new = fmt.refit(old, wanted, torch.zeros(2, 4))
    assert new["scale"].tolist() == [[0x38, 0x39, 0x38, 0x7E], [0x01, 0x38, 0x38, 0x3B]]
    assert torch.equal(new["tensor"], old["tensor"])


def test_minmax_is_that_of_compressed_tensors() -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    args = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
    )
    w = weights(32, 128)
    w[3, 16:32] = 0
    w[4] *= 1e-4
    groups = w.view(32, 8, 16)
    multiplier = generate_gparam(w.min(), w.max())
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=multiplier)
    params = parse_format("nvfp4-minmax").fit(w)
    fmt = parse_format("nvfp4-minmax")
    assert torch.equal((1 / params["tensor"][0]).float(), multiplier.float().view(1))
    assert torch.equal(params["scale"].view(torch.float8_e4m3fn).float(), scale.float())
    theirs = quantize(w, scale, zero, args, global_scale=multiplier)
    expected = dequantize(theirs, scale, args=args, global_scale=multiplier)
    assert torch.equal(fmt.decode(fmt.snap(w, params), params), expected)


def test_golden_scales_of_nvfp4() -> None:
    """A largest weight of 1 gives 2688 as multiplier, and 448 to its group."""
    w = torch.zeros(1, 32)
    w[0, 3], w[0, 20] = 1.0, -0.3
    params = parse_format("nvfp4-minmax").fit(w)
    assert float(1 / params["tensor"]) == 2688
    assert params["scale"].view(torch.float8_e4m3fn).float().tolist() == [[448, 128]]
    searched = parse_format("nvfp4").fit(w)
    assert float(searched["tensor"]) == 2.0**-11  # the least power of two with which no scale is above 448
    assert float(parse_format("nvfp4").with_largest(2688 / 8).fit(w)["tensor"][0]) == 1 / 8


@pytest.mark.parametrize("factors", [(1.0, 2.0), (1 / 3, 1 / 3)], ids=["two", "inexact"])
def test_a_matrix_scale_that_gguf_cannot_hold(factors: tuple[float, float]) -> None:
    fmt, w = NVFP4(), weights(2, 64)
    params = fmt.fit(w)
    quantized = Quantized(fmt.snap(w, params), params, fmt)
    assert fmt.hold(quantized) is quantized
    scaled = params | {"tensor": params["tensor"] * torch.tensor(factors, dtype=torch.float64)[:, None]}
    reason = fmt.hold(replace(quantized, params=scaled))
    assert isinstance(reason, str) and reason.startswith("its matrix scale is no single number that is exact")


def test_matrices_that_runtimes_merge_have_one_scale() -> None:
    w, larger = weights(16, 64), 3.0
    for label in ("nvfp4", "nvfp4-minmax", "nvint4"):
        fmt = parse_format(label)
        assert fmt.needs_largest and not fmt.by_rows and fmt.block_columns is None
        bound = fmt.with_largest(larger)
        assert bound.by_rows and bound.block_columns == 16 and fmt.block_columns is None
        assert torch.equal(bound.fit(w)["tensor"][:1], fmt.fit(torch.full((1, 16), larger))["tensor"])
        whole, part = bound.fit(w), bound.fit(w[8:, 32:])
        assert torch.equal(whole["scale"][8:, 2:], part["scale"])
        assert torch.equal(whole["tensor"][8:], part["tensor"])


@pytest.mark.parametrize("label", LABELS)
def test_size(label: str) -> None:
    bits = {
        "mxfp8": 8.25,
        "mxint8": 8.25,
        "mxfp6": 6.25,
        "mxfp4": 4.25,
        "nvfp4": 4.5,
        "nvint4": 4.5,
        "bfp4": 4.5,
        "bfp8": 8.25,
    }
    extra = 32 if label.startswith("nv") else 0
    assert parse_format(label).storage_bits(10, 256) == 2560 * bits[label.partition("-")[0]] + extra


def test_rows_that_do_not_divide() -> None:
    assert parse_format("mxfp4").misfit(80) == "rows of 80 columns are not divisible by 32"
    assert parse_format("nvfp4").misfit(80) is None
    assert parse_format("nvfp4").misfit(24) == "rows of 24 columns are not divisible by 16"


def test_ggml_setting_repeats_ggmls_encoder_bit_by_bit() -> None:
    w = awkward()
    edges = (2.0 ** torch.arange(-60, 60).float())[:, None].repeat(1, 96)
    below = edges.nextafter(torch.tensor(0.0))  # where a logarithm in float32 may round up
    w = torch.cat([w, weights(120, 96) * edges, edges, below, -below.nextafter(torch.tensor(0.0))])
    fmt = MXFP4(search="ggml")
    params = fmt.fit(w)
    packed = fmt.pack(fmt.snap(w, params), params)
    assert torch.equal(packed, ggml_quantize(w, 39, 3 * 17))


def test_floor_is_ggmls_rule_but_for_ties() -> None:
    w = weights()
    floor, ggml = MXFP4(search="floor"), MXFP4(search="ggml")
    assert torch.equal(floor.fit(w)["exponent"], ggml.fit(w)["exponent"])
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]).repeat(4)[None]
    levels = [f.decode(f.snap(ties, p), p)[0, :8].tolist() for f in (floor, ggml) for p in [f.fit(ties)]]
    assert levels == [[0, 1, 1, 2, 2, 4, 4, 6], [0, 0.5, 1, 1.5, 2, 3, 4, 6]]


@pytest.mark.parametrize("fmt", [MXFP4(), NVFP4()], ids=lambda f: f.label)
def test_bytes_of_gguf(fmt: MXFP4 | NVFP4) -> None:
    g = torch.Generator().manual_seed(5)
    codes = torch.randint(0, 15, (33, 128), generator=g).to(torch.uint8)
    if isinstance(fmt, MXFP4):
        params = {"exponent": torch.randint(0, 252, (33, 4), generator=g).to(torch.uint8)}
        params["exponent"][0] = torch.tensor([0, 1, 2, 251])
    else:
        params = {
            "scale": torch.randint(0, 127, (33, 8), generator=g).to(torch.uint8),
            "tensor": torch.ones(33, 1).double(),
        }
    packed = fmt.pack(codes, params)
    decoded = fmt.decode(codes, params)
    assert packed.shape == (33, 128 // fmt.columns * fmt.block_bytes)
    reference = gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType(fmt.ggml_type))
    assert torch.equal(decoded, torch.from_numpy(reference))
    assert torch.equal(decoded, ggml_dequantize(packed, fmt.label, 128))
    again, again_params = fmt.unpack(packed)
    assert torch.equal(again, codes)
    assert {name: p.tolist() for name, p in again_params.items()} == {name: p.tolist() for name, p in params.items()}


def test_layout_of_one_block() -> None:
    """Magnitudes are the nibbles 0 to 7, negatives 9 to f; columns j and j + 16 (NVFP4: j + 8) share a byte."""
    codes = torch.tensor([7, 8, 9, 10, 11, 12, 13, 14, 6, 5, 4, 3, 2, 1, 0, 7]).to(torch.uint8).repeat(4)[None]
    params = {"exponent": torch.tensor([[127, 130]], dtype=torch.uint8)}
    block = "001122334455667799aabbccddeeff00"
    assert bytes(MXFP4().pack(codes, params)[0].tolist()).hex() == "7f" + block + "82" + block
    scales = {"scale": torch.tensor([[0x38, 0x39, 0x01, 0x7E]], dtype=torch.uint8), "tensor": torch.ones(1, 1).double()}
    assert bytes(NVFP4().pack(codes, scales)[0].tolist()).hex() == "3839017e" + "90a1b2c3d4e5f607" * 4


def test_negative_zero_of_other_writers_is_zero() -> None:
    block = torch.tensor([127] + [0x88] * 16, dtype=torch.uint8)[None]
    fmt = MXFP4()
    codes, params = fmt.unpack(block)
    assert fmt.decode(codes, params).tolist() == [[0.0] * 32]


def test_block_floats_are_integers_of_a_power_of_two() -> None:
    w = weights(8, 64)
    for bits in (2, 3, 4, 8):
        fmt = BFP(bits=bits, group=16, search="floor")
        top = 2 ** (bits - 1) - 1
        step = 2.0 ** (w.view(8, 4, 16).abs().amax(-1, keepdim=True).log2().floor() - (bits - 2))
        expected = (w.view(8, 4, 16) / step).round().clamp(-top, top) * step
        params = fmt.fit(w)
        assert torch.equal(fmt.decode(fmt.snap(w, params), params), expected.view(8, 64))
