"""Moving matrices from one format to another: the same values, or a reason."""

from dataclasses import replace

import pytest
import torch

from qtool.formats._base import Quantized
from qtool.formats.bfp import BFP
from qtool.formats.fp import FP
from qtool.formats.int import Int
from qtool.formats.iq1_s import IQ1_S
from qtool.formats.mxfp4 import MXFP4
from qtool.formats.mxint8 import MXINT8
from qtool.formats.nvfp4 import NVFP4
from qtool.formats.q4_0 import Q4_0
from qtool.formats.q4_1 import Q4_1
from qtool.formats.q5_0 import Q5_0
from qtool.formats.q5_1 import Q5_1
from qtool.formats.q8_0 import Q8_0

W = torch.randn(8, 128, generator=torch.Generator().manual_seed(1)) + 0.3


def matrix(fmt):
    params = fmt.fit(W)
    return Quantized(fmt.snap(W, params), params, fmt)


def integer(bits, group, symmetric=True, scale_dtype="bf16"):
    return Int(bits=bits, group=group, symmetric=symmetric, scale_dtype=scale_dtype)


EXACT = {
    "split-groups": (integer(4, 128), integer(4, 32)),
    "channel": (integer(4, "channel"), integer(4, 64)),
    "wider": (integer(4, 32), integer(8, 32)),
    "wider-asym": (integer(3, 32, False), integer(4, 32, False)),
    "sym-to-asym": (integer(4, 32), integer(4, 32, False)),
    "sym-to-wider-asym": (integer(4, 64), integer(6, 32, False)),
    "asym-to-wider-sym": (integer(4, 32, False), integer(5, 32)),
    "narrower-scales": (integer(4, 64, scale_dtype="fp32"), integer(4, 32)),
    "blocks": (Q4_0(), integer(4, 32)),
    "wide-blocks": (Q8_0(), integer(8, 32, False)),
    "exponents": (MXINT8(), integer(8, 16)),
    "exponents-to-blocks": (MXINT8(), Q8_0()),
    "block-floats-to-blocks": (BFP(bits=4, group=64), Q4_0()),
    "tensor": (integer(8, "tensor"), integer(8, "channel")),
    "to-blocks": (integer(4, 64), Q4_0()),
    "to-wider-blocks": (integer(4, 64), Q8_0()),
    "sym-to-minimum": (integer(4, 64), Q4_1()),
    "asym-to-blocks": (integer(4, 64, False), Q5_0()),
    "blocks-to-wider-ones": (Q4_0(), Q5_0()),
    "blocks-to-minimum": (Q4_0(), Q4_1()),
    "minimum-to-wider-one": (Q4_1(), Q5_1()),
    "asym-to-bytes": (integer(7, 64, False), Q8_0()),
}


@pytest.mark.parametrize(("source", "target"), EXACT.values(), ids=EXACT)
def test_the_same_values_in_the_wanted_format(source, target):
    given = matrix(source)
    assert target.may_hold(source) is None
    held = target.hold(given)
    assert held.format.label == target.label
    assert torch.equal(held.decode(), given.decode())
    assert int(held.codes.max()) < len(target.levels())
    groups = 128 // (target.group_columns or 128)
    assert all(p.shape == (8, groups) for p in held.params.values())
    assert set(held.params) == set(matrix(target).params)


@pytest.mark.parametrize("source", [integer(4, 32), integer(4, 32, False), FP(element="e4m3", group="channel"), Q4_0()])
def test_what_differs_only_in_how_it_was_found_stays_as_it_is(source):
    changes = {"search": "fast"} if isinstance(source, Q4_0) else {"scales": "minmax", "scale_dtype": "fp32"}
    given = matrix(source)
    assert source.model_copy(update=changes).hold(given) is given


REFUSED = {
    "coarser": (integer(4, 32), integer(4, 64), "the groups of int4-g32 do not consist of groups of int4-g64"),
    "channel": (integer(4, 32), integer(4, "channel"), "the groups of int4-g32 do not consist of groups of"),
    "odd": (integer(4, 48), integer(4, 32), "the groups of int4-g48 do not"),
    "narrower": (integer(8, 32), integer(4, 32), "the range of int8-g32 does not fit int4-g32"),
    "zero-points": (integer(4, 32, False), integer(4, 32), "the zero points of int4-g32-asym do not fit int4-g32"),
    "minima": (Q4_1(), integer(4, 32, False), "int4-g32-asym holds no q4_1"),
    "minima-in-blocks": (Q4_1(), Q5_0(), "q5_0 holds no q4_1"),
    "narrower-blocks": (Q5_0(), Q4_0(), "the range of q5_0 does not fit q4_0"),
    "floats": (FP(element="e2m1", group=32), integer(8, 32), "int8-g32 holds no fp4-g32"),
    "tensor": (integer(8, "tensor"), integer(4, "tensor"), "int4-tensor holds no int8-tensor"),
    "token": (integer(4, "channel"), integer(8, "token"), "int8-token holds no int4-channel"),
    "other-floats": (
        FP(element="e4m3", group="channel"),
        FP(element="e4m3", group=32),
        "fp8-g32 holds no fp8-channel",
    ),
}


@pytest.mark.parametrize(("source", "target", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_can_never_be_held_is_known_from_the_formats(source, target, reason):
    width = 96 if source.group_columns == 48 else 128
    params = source.fit(W[:, :width])
    given = Quantized(source.snap(W[:, :width], params), params, source)
    assert target.may_hold(source).startswith(reason)
    assert target.hold(given).startswith(reason)


def test_what_only_the_numbers_tell():
    given = matrix(integer(4, 32, False, "fp16"))
    assert Q4_1().hold(given) == "some zero points times their scales are not exact in fp16"
    assert Q5_1().hold(given) == "some zero points times their scales are not exact in fp16"
    params = given.params | {"scale": given.params["scale"].float() * 2.0**-30}
    assert Q5_0().hold(replace(given, params=params)) == "some scales are not exact in fp16"
    far = Quantized(torch.zeros(1, 32, dtype=torch.uint8), {"scale": torch.ones(1, 1)}, integer(2, 32, False))
    held = integer(8, 32, False).hold(replace(far, params={"scale": torch.ones(1, 1), "zero": torch.ones(1, 1)}))
    assert held.decode().unique().tolist() == [-3.0]


def test_shifts_are_no_zero_points():
    w = torch.randn(2, 256, generator=torch.Generator().manual_seed(3))
    params = (source := IQ1_S(search="fast")).fit(w)
    shifted = Quantized(source.snap(w, params), params, source)
    assert integer(8, 32).hold(shifted) == "some offsets are no multiples of their scales"


@pytest.mark.parametrize("target", [integer(5, 32), integer(6, 32, False)], ids=lambda fmt: fmt.label)
@pytest.mark.parametrize("zero", [-100, 100])
def test_zero_points_that_no_sound_file_has(target, zero):
    params = {"scale": torch.ones(1, 1), "zero": torch.full((1, 1), zero, dtype=torch.int8)}
    wild = Quantized(torch.full((1, 32), 7, dtype=torch.uint8), params, integer(4, 32, False))
    assert target.hold(wild) == f"some zero points are out of the range of {target.label}"


def test_powers_of_two_are_exact_in_a_block_with_a_minimum():
    given = matrix(integer(4, 32, False))
    scale = torch.exp2(given.params["scale"].float().log2().round()).bfloat16()
    given = replace(given, params={"scale": scale, "zero": given.params["zero"]})
    assert torch.equal(Q4_1().hold(given).decode(), given.decode())


def powers(exponents):
    """MXFP4 whose scales are these powers of two, one row each, of two blocks; the second one of zeros."""
    codes = torch.arange(len(exponents) * 64).remainder(15).to(torch.uint8).view(-1, 64)
    codes[:, 32:] = 7
    exponent = torch.stack([torch.tensor(exponents) + 127, torch.full((len(exponents),), 3)], 1).to(torch.uint8)
    return Quantized(codes, {"exponent": exponent}, MXFP4())


def test_powers_of_two_that_e4m3_has_become_scales_of_nvfp4():
    given = powers(range(-15, 3))
    held = NVFP4().hold(given)
    t = 2.0**-6
    scale = held.params["scale"].view(torch.float8_e4m3fn).double() * t
    assert scale[:, :2].tolist() == [[2.0**e] * 2 for e in range(-15, 3)]
    assert bool((held.params["scale"][:, 2:] == 0x20).all())  # of zeros alone: none that runtimes could not divide by
    assert bool((held.params["tensor"] == t).all()) and held.format == NVFP4()
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    wanted = torch.cat([-magnitudes[1:].flip(0), magnitudes])[given.codes.long()]
    wanted *= torch.exp2(torch.arange(-15.0, 3.0).double())[:, None]
    assert torch.equal(held.decode().double(), wanted) and bool(held.decode()[:, :32].any())
    assert set(held.params) == set(NVFP4().fit(W[:, :64]))


@pytest.mark.parametrize("exponent", [-16, 3, -127, 128])
def test_other_powers_of_two_are_none_of_nvfp4(exponent):
    assert "none of nvfp4's scales, which reach from 2^-15 to 2^2" in NVFP4().hold(powers([0, exponent]))
    assert NVFP4(augment=16).may_hold(MXFP4()) == "nvfp4+16 holds no mxfp4"
