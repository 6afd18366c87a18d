"""The classic GGUF blocks against ggml itself (through the symbols of xllamacpp) and against gguf's Python decoders."""

import gguf
import pytest
import torch

from qtool import registry
from qtool.errors import NumericsError
from qtool.formats._base import Quantized
from qtool.formats.int import Int
from tests.reference.ggml import ggml_dequantize, ggml_quantize

NAMES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


def awkward(seed=0):
    """Gaussian, heavy-tailed, one-sided, zero, constant, tiny, huge and tie-ridden blocks, float32 [200, 96]."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(200, 96, generator=g)
    w[40:80] = w[40:80] ** 3
    w[80:90] = w[80:90].abs() + 0.5
    w[90:100] = -w[90:100].abs()
    w[100] = 0
    w[101] = 0.37
    w[102] = -0.37
    w[103:110] *= 1e-7
    w[110:120] *= 1e4
    w[120:150] = torch.randint(-16, 17, (30, 96), generator=g) / 2  # every rounding boundary
    w[150, 1:] = 0
    w[153] = torch.arange(96) - 47.5  # a scale of 1 for Q8_0, so that ties are exact
    w[153, ::32] = 127
    w[151] = torch.tensor([-1.0, 1.0]).repeat(48)  # two weights of equal size: the first decides
    w[152] = torch.tensor([1.0, -1.0]).repeat(48)
    return w


def random_blocks(fmt, n, k, seed=0):
    """Any codes and any finite fp16 parameters."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, len(fmt.levels()), (n, k), generator=g).to(torch.uint8)
    names = ("d", "m") if fmt.offset else ("d",)
    return codes, {name: (torch.randn(n, k // 32, generator=g) * 0.01).half() for name in names}


@pytest.mark.parametrize("name", NAMES)
def test_ggml_scales_repeat_ggmls_encoder_bit_by_bit(name):
    fmt = registry.load("formats", name)(search="ggml")
    w = awkward()
    params = fmt.fit(w)
    packed = fmt.pack(fmt.snap(w, params), params)
    assert torch.equal(packed, ggml_quantize(w, fmt.ggml_type, 3 * fmt.block_bytes))


@pytest.mark.parametrize("name", NAMES)
def test_decoding_equals_ggml_and_gguf_py(name):
    fmt = registry.load("formats", name)()
    codes, params = random_blocks(fmt, 64, 128)
    packed = fmt.pack(codes, params)
    decoded = fmt.decode(codes, params)
    assert packed.shape == (64, 4 * fmt.block_bytes)
    assert torch.equal(decoded, ggml_dequantize(packed, name, 128))
    reference = gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType(fmt.ggml_type))
    assert torch.equal(decoded, torch.from_numpy(reference))


@pytest.mark.parametrize("name", NAMES)
def test_unpacking_inverts_packing_and_packing_inverts_unpacking(name):
    fmt = registry.load("formats", name)()
    codes, params = random_blocks(fmt, 33, 160)
    again, again_params = fmt.unpack(fmt.pack(codes, params))
    assert torch.equal(again, codes)
    assert all(torch.equal(again_params[p], params[p]) for p in params)
    anything = torch.randint(0, 256, (17, 3 * fmt.block_bytes), generator=torch.Generator().manual_seed(1))
    assert torch.equal(fmt.pack(*fmt.unpack(anything.to(torch.uint8))), anything.to(torch.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_layout_of_one_block(name):
    """d = 1 and m = -2 in fp16 are 00 3c and 00 c0; codes count 0, 1, 2, ... (in steps that reach the top)."""
    fmt = registry.load("formats", name)()
    step = {4: 1, 5: 1, 8: 8}[fmt.bits]
    codes = (torch.arange(32) * step % len(fmt.levels())).to(torch.uint8)[None]
    params = {"d": torch.ones(1, 1).half()} | ({"m": torch.full((1, 1), -2.0).half()} if fmt.offset else {})
    literal = {
        "q4_0": "003c" + "00112233445566778899aabbccddeeff",
        "q4_1": "003c00c0" + "00112233445566778899aabbccddeeff",
        "q5_0": "003c" + "0000ffff" + "00112233445566778899aabbccddeeff",
        "q5_1": "003c00c0" + "0000ffff" + "00112233445566778899aabbccddeeff",
        "q8_0": "003c" + "80889098a0a8b0b8c0c8d0d8e0e8f0f8" + "00081018202830384048505860687078",
    }[name]
    assert bytes(fmt.pack(codes, params)[0].tolist()).hex() == literal


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_search_is_never_worse_than_ggml_and_better_in_sum(name, weighted):
    fmt = registry.load("formats", name)()
    w = awkward(seed=3)
    w[110:120] /= 1e4  # leave the sums to ordinary blocks
    importance = torch.randn(96, generator=torch.Generator().manual_seed(4)).mul(1.5).exp() if weighted else None
    weight = torch.ones(96) if importance is None else importance

    def errors(packed):
        return ((ggml_dequantize(packed, name, 96) - w).square() * weight).double().reshape(200, 3, 32).sum(-1)

    params = fmt.fit(w, importance)
    ours = errors(fmt.pack(fmt.snap(w, params), params))
    theirs = errors(ggml_quantize(w, fmt.ggml_type, 3 * fmt.block_bytes, importance))
    assert (ours <= theirs * (1 + 1e-5) + 1e-12).all()
    gain = {"q4_0": 0.9, "q4_1": 0.9, "q5_0": 0.9, "q5_1": 0.95, "q8_0": 0.995}[name]
    assert ours[:40].sum() < gain * theirs[:40].sum()


@pytest.mark.parametrize("search", ["fast", "default", "thorough"])
@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1"])
def test_weighted_search_is_never_worse_than_ggmls_and_better_in_sum(name, search):
    fmt = registry.load("formats", name)(search=search)
    g = torch.Generator().manual_seed(5)
    w, importance = torch.randn(256, 256, generator=g), torch.randn(256, generator=g).mul(1.5).exp()

    def errors(w_hat):
        return ((w_hat - w).square() * importance).double().reshape(256, 8, 32).sum(-1)

    params = fmt.fit(w, importance)
    ours = errors(fmt.decode(fmt.snap(w, params), params))
    theirs = errors(ggml_dequantize(ggml_quantize(w, fmt.ggml_type, 8 * fmt.block_bytes, importance), name, 256))
    assert (ours <= theirs * (1.2 if search == "fast" and not fmt.offset else 1.000001)).all()
    assert ours.sum() < {"q4_0": 0.94, "q4_1": 0.93, "q5_0": 0.93, "q5_1": 0.9}[name] * theirs.sum()


@pytest.mark.parametrize("name", NAMES)
def test_shorthand(name):
    cls = registry.load("formats", name)
    assert cls.parse(name) == cls() and cls().label == name
    for search in ("ggml", "fast", "thorough"):
        assert cls.parse(f"{name}-{search}") == cls(search=search) and cls(search=search).label == f"{name}-{search}"
    assert all(cls.parse(text) is None for text in ("q9_9", f"{name}-x", f"{name}-default", f"{name}-", f"x{name}"))


def test_scales_beyond_fp16_are_an_error():
    fmt = registry.load("formats", "q8_0")()
    with pytest.raises(NumericsError, match="q8_0 stores scales in fp16: wanted at most 65504"):
        fmt.fit(torch.full((1, 32), 1e8))


HELD = [  # by what, what, in how many codes more
    ("q4_0", Int(bits=4, group=32)),
    ("q4_0", Int(bits=4, group=64)),
    ("q4_0", Int(bits=3, group="channel")),
    ("q4_0", Int(bits=3, group=32, symmetric=False)),
    ("q5_0", Int(bits=4, group=32, symmetric=False)),
    ("q5_0", Int(bits=5, group=128)),
    ("q8_0", Int(bits=8, group="channel")),
    ("q8_0", Int(bits=7, group=32, symmetric=False)),
    ("q8_0", Int(bits=8, group="tensor")),
]


@pytest.mark.parametrize(("name", "source"), HELD, ids=lambda v: v if isinstance(v, str) else v.label)
def test_integers_are_held_exactly(name, source):
    w = torch.randn(24, 256, generator=torch.Generator().manual_seed(6)) + 0.3
    params = source.fit(w)
    quantized = Quantized(source.snap(w, params), params, source)
    fmt = registry.load("formats", name)()
    held = fmt.hold(quantized)
    assert isinstance(held, Quantized) and held.format == fmt
    assert torch.equal(held.decode(), quantized.decode())
    assert torch.equal(ggml_dequantize(fmt.pack(held.codes, held.params), name, 256), quantized.decode())


def test_q4_1_holds_asymmetric_integers_if_the_minimum_is_exact():
    source = Int(bits=4, group=32, symmetric=False)
    codes = torch.randint(0, 16, (4, 64), generator=torch.Generator().manual_seed(7)).to(torch.uint8)
    params = {"scale": torch.full((4, 2), 0.25).bfloat16(), "zero": torch.full((4, 2), 5).to(torch.int8)}
    fmt = registry.load("formats", "q4_1")()
    held = fmt.hold(Quantized(codes, params, source))
    assert torch.equal(held.decode(), source.decode(codes, params))
    params["scale"][0, 0] = 255 / 1024
    params["zero"][0, 0] = 1  # minimum 9 * 255 / 1024 takes 12 bits
    assert fmt.hold(Quantized(codes, params, source)) == "some zero points times their scales are not exact in fp16"


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("q4_0", Int(bits=4, group=16), "q4_0 needs groups that are a multiple of 32 columns, not 16"),
        ("q4_0", Int(bits=5, group=32), "the range of int5-g32 does not fit q4_0"),
        ("q4_0", Int(bits=4, group=32, symmetric=False), "the zero points of int4-g32-asym do not fit q4_0"),
        ("q4_0", registry.load("formats", "q4_1")(), "q4_0 holds no q4_1"),
    ],
    ids=["group", "bits", "zero", "block"],
)
def test_what_cannot_be_held_is_said_before_any_data(name, source, reason):
    assert registry.load("formats", name)().may_hold(source) == reason


def test_groups_of_zeros_are_held():
    codes = torch.full((1, 64), 15, dtype=torch.uint8)
    zero = {"scale": torch.tensor([[0.0, 0.5]]).bfloat16()}
    held = registry.load("formats", "q4_0")().hold(Quantized(codes, zero, Int(bits=4, group=32)))
    assert held.decode().tolist() == [[0.0] * 32 + [3.5] * 32] and int(held.codes.max()) <= 15


def test_scales_that_fp16_cannot_hold_are_refused():
    source = Int(bits=4, group=32)
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    fmt = registry.load("formats", "q4_0")()
    tiny = {"scale": torch.full((1, 1), 1.1e-7).bfloat16()}
    assert fmt.hold(Quantized(codes, tiny, source)) == "some scales are not exact in fp16"
