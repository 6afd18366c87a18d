"""Minifloats: shorthand, granularity, both rules for scales and both constraints, what is refused, size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.errors import NumericsError, QtoolError
from qtool.formats._spelling import dump_format, parse_format
from qtool.formats.fp import FP
from qtool.formats.int import Int

ELEMENTS = ["fp8", "fp8-e5m2", "fp8-e3m4", "fp7", "fp6", "fp6-e2m3", "fp5", "fp5-e3m1", "fp4", "fp4-e1m2", "fp3"]
GROUPS = ["channel", "token", "tensor", "g16", "g32", "block", "b16x32"]
LABELS = [f"{element}-{group}" for element in ELEMENTS for group in GROUPS]


def weights(n: int = 40, k: int = 128, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05


def error(fmt: FP | Int, w: Tensor, importance: Tensor | None = None) -> float:
    params = fmt.fit(w, importance)
    squares = (w - fmt.decode(fmt.snap(w, params), params)).double().square()
    return float((squares if importance is None else squares * importance).sum())


@pytest.mark.parametrize("label", LABELS)
def test_shorthand_round_trip(label: str) -> None:
    fmt = parse_format(label)
    assert fmt.label == label
    other = fmt.model_copy(update={"scales": "minmax", "scale_dtype": "fp32"})
    assert parse_format(dump_format(other)) == other


@pytest.mark.parametrize("text", ["fp8", "fp9-channel", "fp8-e4m4-channel", "fp8-e2m1-channel", "fp4-b16-channel"])
def test_what_is_no_float(text: str) -> None:
    with pytest.raises((QtoolError, ValueError), match=r"fp|floats"):
        parse_format(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"element": "e5m3", "group": "channel"}, "floats have 3 to 8 bits, e5m3 has 9"),
        ({"element": "e1m0", "group": "channel"}, "floats have 3 to 8 bits, e1m0 has 2"),
        ({"element": "e4m3", "group": "tensor", "rows": 4}, "blocks of 4 rows need a number of columns"),
        ({"element": "e4m3", "group": "channel", "constraint": "ratio"}, "share a ratio where it has several"),
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FP.model_validate(fields)


@pytest.mark.parametrize("label", LABELS)
def test_minmax_puts_the_largest_weight_of_each_scale_on_the_largest_level(label: str) -> None:
    fmt = parse_format(label).model_copy(update={"scales": "minmax", "scale_dtype": "fp32"})
    w = weights()
    scale = fmt.affine(fmt.fit(w))[0]
    top = float(fmt.levels()[-1])
    rows = {"tensor": 40, "block": 128, "b16x32": 16}.get(label.rpartition("-")[2], 1)
    columns = fmt.group_columns or 128
    for a in range(0, 40, rows):
        for b in range(0, 128, columns):
            part = w[a : a + rows, b : b + columns]
            expected = part.abs().max() / top
            assert torch.equal(scale[a : a + rows, b // columns], expected.expand(len(part)))


@pytest.mark.parametrize(
    "label", ["fp8-channel", "fp8-tensor", "fp8-token", "fp8-block", "fp8-g32", "fp8-e5m2-channel"]
)
def test_eight_bits_are_what_torch_casts(label: str) -> None:
    fmt = parse_format(label).model_copy(update={"scales": "minmax"})
    w = weights(n=200)
    params = fmt.fit(w)
    scale = params["scale"].float().repeat_interleave(128 // params["scale"].shape[1], 1)
    dtype, top = (torch.float8_e5m2, 57344) if "e5m2" in label else (torch.float8_e4m3fn, 448)
    cast = (w / scale).clamp(-top, top).to(dtype)
    assert torch.equal(fmt.decode(fmt.snap(w, params), params), cast.float() * scale)


@pytest.mark.parametrize("label", LABELS)
def test_every_code_comes_back(label: str) -> None:
    fmt = parse_format(label)
    count = len(fmt.levels())
    codes = torch.arange(256).remainder(count).to(torch.uint8)[None].repeat(3, 1)
    groups = 256 // (fmt.group_columns or 256)
    params = {"scale": torch.tensor([[0.5], [1.0], [0.01]]).bfloat16().expand(3, groups)}
    values = fmt.decode(codes, params)
    levels = fmt.levels().tolist()
    expected = [[levels[c] * s for c in codes[0].tolist()] for s in params["scale"][:, 0].tolist()]
    assert torch.equal(values, torch.tensor(expected))
    assert torch.equal(fmt.snap(values, params), codes)


GAIN = {"fp8-channel": 0.96, "fp8-tensor": 1.0, "fp6-e2m3-g32": 0.8, "fp4-g16": 0.75, "fp4-g32": 0.83, "fp3-g16": 0.85}
"""Weighted error of the search over that of minmax, at most."""


@pytest.mark.parametrize("label", GAIN)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_search_beats_minmax(label: str, weighted: bool) -> None:
    w = weights(n=128)
    importance = torch.randn(128, generator=torch.Generator().manual_seed(1)).exp() if weighted else None
    fmt = parse_format(label)
    plain = fmt.model_copy(update={"scales": "minmax"})
    assert error(fmt, w, importance) <= GAIN[label] * error(plain, w, importance)


SQNR = {  # dB on normal weights with searched scales, within 0.5 dB
    "fp8-channel": 31.8,
    "fp8-e5m2-channel": 26.0,
    "fp6-channel": 26.0,
    "fp6-e2m3-g32": 33.2,
    "fp5-g32": 27.2,
    "fp4-g16": 21.9,
    "fp4-channel": 19.1,
    "fp3-g16": 15.1,
    "fp8-b16x32": 31.8,
}


@pytest.mark.parametrize("label", SQNR)
def test_error_of_normal_weights(label: str) -> None:
    w = weights(n=128, k=512)
    sqnr = 10 * torch.tensor(float(w.double().square().sum()) / error(parse_format(label), w)).log10()
    assert SQNR[label] <= sqnr <= SQNR[label] + 0.5


def test_one_exponent_bit_makes_integers() -> None:
    w = weights()
    fmt = FP(element="e1m2", group=32, scales="minmax", scale_dtype="fp32")
    scale = w.view(40, 4, 32).abs().amax(-1) / 7
    whole = (w.view(40, 4, 32) / scale[..., None]).round() * scale[..., None]
    torch.testing.assert_close(fmt.decode(fmt.snap(w, p := fmt.fit(w)), p), whole.view(40, 128))


@pytest.mark.parametrize("scales", ["minmax", "search"])
@pytest.mark.parametrize("label", ["fp4-g16", "fp6-e2m3-g32", "fp4-channel"])
def test_scales_are_powers_of_two_if_told(label: str, scales: str) -> None:
    fmt = parse_format(label).model_copy(update={"scales": scales, "constraint": "power"})
    w = weights()
    scale = fmt.affine(fmt.fit(w))[0]
    assert bool((scale.frexp().mantissa == 0.5).all())
    if scales == "minmax":
        largest = w.view(40, -1, fmt.group_columns or 128).abs().amax(-1)
        top = fmt.levels()[-1]
        assert bool((largest <= scale * top).all()) and bool((largest > scale / 2 * top).all())
    else:
        assert error(fmt, w) < error(fmt.model_copy(update={"scales": "minmax"}), w)
        assert error(fmt, w) > error(parse_format(label), w)


@pytest.mark.parametrize("scales", ["minmax", "search"])
def test_scales_of_a_row_are_powers_of_two_of_each_other_if_told(scales: str) -> None:
    fmt = parse_format("fp4-g16").model_copy(update={"scales": scales, "constraint": "ratio"})
    w = weights()
    w[3, :16] = 0
    w[4] = 0
    scale = fmt.affine(fmt.fit(w))[0]
    assert bool(((scale / scale.amax(1, keepdim=True)).frexp().mantissa == 0.5).all())
    assert fmt.block_columns is None
    power = fmt.model_copy(update={"constraint": "power"})
    if scales == "search":
        assert error(parse_format("fp4-g16"), w) < error(fmt, w) < 0.95 * error(power, w)


@pytest.mark.parametrize("constraint", ["none", "power", "ratio"])
def test_refit_stores_the_nearest_allowed_scales(constraint: str) -> None:
    fmt = FP(element="e2m1", group=16, constraint=constraint)
    old = {"scale": torch.tensor([[0.75, 1.5, 3.0, 0.375]]).bfloat16()}
    if constraint == "power":
        old = {"scale": torch.tensor([[0.5, 1.0, 2.0, 0.25]]).bfloat16()}
    wanted = torch.tensor([[1.0, 1.49, -5.0, 0.0]])
    new = fmt.refit(old, wanted, torch.zeros(1, 4))["scale"].float().tolist()
    assert (
        new
        == {"none": [[1.0, 1.4921875, 3.0, 0.375]], "power": [[1, 1, 2, 0.25]], "ratio": [[0.75, 1.5, 3, 0.375]]}[
            constraint
        ]
    )


def test_zeros_and_what_is_no_number() -> None:
    for label in ("fp8-channel", "fp8-block", "fp4-g16", "fp8-tensor"):
        for scales in ("minmax", "search"):
            fmt = parse_format(label).model_copy(update={"scales": scales})
            params = fmt.fit(torch.zeros(20, 128))
            assert bool((params["scale"] == 1).all())
            assert bool((fmt.decode(fmt.snap(torch.zeros(20, 128), params), params) == 0).all())
            for bad in (torch.nan, torch.inf, -torch.inf):
                w = weights()
                w[7, 5] = bad
                with pytest.raises(NumericsError, match="has no scale for weights that are NaN or infinite"):
                    fmt.fit(w)
    with pytest.raises(
        NumericsError, match=r"fp8-channel cannot store .* in fp16: wanted at most 65504, found 2\.\S+; use scale_dtype"
    ):
        FP(element="e4m3", group="channel", scale_dtype="fp16").fit(torch.full((1, 16), 1e9))


def test_a_dead_input_does_not_set_the_scale() -> None:
    w = weights()
    w[:, 3] = 40.0
    importance = torch.ones(128)
    importance[3] = 0
    for label in ("fp4-g16", "fp4-channel"):
        fmt = parse_format(label)
        clean = w.clone()
        clean[:, 3] = 0
        assert error(fmt, w, importance) < 1.15 * error(fmt, clean, importance)


def test_size_and_what_rows_share() -> None:
    sizes = {"fp8-channel": 300 * 16, "fp8-tensor": 16, "fp8-block": 3 * 2 * 16, "fp8-g32": 300 * 8 * 16}
    for label, scales in sizes.items():
        assert parse_format(label).storage_bits(300, 256) == 300 * 256 * 8 + scales
    assert parse_format("fp6-g32").storage_bits(300, 256) == 300 * 256 * 6 + sizes["fp8-g32"]
    shared = {
        label: parse_format(label).group_rows for label in ("fp8-channel", "fp8-tensor", "fp8-block", "int8-b4x8")
    }
    assert shared == {"fp8-channel": 1, "fp8-tensor": None, "fp8-block": 128, "int8-b4x8": 4}
    assert [parse_format(label).by_rows for label in shared] == [True, False, False, False]
    assert parse_format("fp8-block").misfit(576) == (
        "rows of 576 columns are not divisible by 128; groups that divide: 96, 64, 192"
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scales", ["minmax", "search"])
def test_blocks_of_integers(scales: str, symmetric: bool) -> None:
    """A block is fitted as one group: that of its weights in a row, with each column's importance on all of them."""
    w = weights(n=10)
    importance = torch.rand(128, generator=torch.Generator().manual_seed(1))
    fmt = Int(bits=4, group=32, rows=4, scales=scales, symmetric=symmetric)
    params = fmt.fit(w, importance)
    flat = Int(bits=4, group="channel", scales=scales, symmetric=symmetric)
    for a in range(0, 10, 4):
        for b in range(4):
            block = w[a : a + 4, b * 32 : b * 32 + 32].reshape(1, -1)
            alike = importance[b * 32 : b * 32 + 32].repeat(block.numel() // 32)
            expected = flat.fit(block, alike)
            for name, p in params.items():
                assert (p[a : a + 4, b] == expected[name]).all()
    assert fmt.label == "int4-b4x32" + "-asym" * (not symmetric)


def test_run_time_rule_has_no_search() -> None:
    fmt = parse_format("fp8-token").at_run_time()
    assert fmt == FP(element="e4m3", group="token", scales="minmax", scale_dtype="fp32")
    assert parse_format("int8-token").at_run_time() == Int(bits=8, group="token", scales="minmax", scale_dtype="fp32")
