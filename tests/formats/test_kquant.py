"""The K-quants against ggml itself (through the symbols of xllamacpp) and against gguf's Python decoders."""

import gguf
import pytest
import torch

from qtool import registry
from qtool.errors import NumericsError
from qtool.formats._base import Quantized
from qtool.formats.int import Int
from tests.reference.ggml import ggml_dequantize, ggml_quantize

NAMES = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")


GAIN = {"q2_k": 0.87, "q3_k": 0.93, "q4_k": 0.96, "q5_k": 0.9, "q6_k": 0.89}
"""Weighted error over ggml's on Gaussian weights."""


def load(name, **options):
    return registry.load("formats", name)(**options)


def random_blocks(fmt, n, k, seed=0):
    """Any codes, any integers, any finite fp16 steps."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, len(fmt.levels()), (n, k), generator=g)
    low, top = fmt.limits
    steps = [torch.randn(n, k // 256, generator=g) * 0.01 for _ in range(2)]
    integers = [torch.randint(low, top + 1, (n, k // fmt.group), generator=g) for _ in range(2)]
    return codes.to(torch.uint8), fmt.stored(*steps, *integers)


def awkward(seed=0):
    """Gaussian, heavy-tailed, one-sided, zero, constant, tiny, large and sparse super-blocks, float32 [64, 512]."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(64, 512, generator=g)
    w[16:32] = w[16:32] ** 3
    w[32:36] = w[32:36].abs() + 0.5
    w[36:40] = -w[36:40].abs()
    w[40] = 0
    w[41] = 0.37
    w[42] = -0.37
    w[43:46] *= 1e-6
    w[46:50] *= 1e3
    w[50, 1:] = 0
    w[51:54, ::2] = 0
    w[54:56, 64:128] = 0
    w[56:60] = torch.randint(-16, 17, (4, 512), generator=g) / 2
    return w


def importance_of(k, seed=4):
    return torch.randn(k, generator=torch.Generator().manual_seed(seed)).mul(1.5).exp()


def errors(w_hat, w, importance):
    """Weighted squared error per super-block."""
    return ((w_hat - w).square() * importance).double().reshape(len(w), -1, 256).sum(-1)


def fitted(fmt, w, importance=None):
    params = fmt.fit(w, importance)
    return Quantized(fmt.snap(w, params), params, fmt)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_equals_ggml_and_gguf_py(name):
    fmt = load(name)
    codes, params = random_blocks(fmt, 64, 512)
    packed = fmt.pack(codes, params)
    assert packed.shape == (64, 2 * fmt.block_bytes)
    decoded = fmt.decode(codes, params)
    assert torch.equal(decoded, ggml_dequantize(packed, name, 512))
    reference = gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType(fmt.ggml_type))
    assert torch.equal(decoded, torch.from_numpy(reference))


@pytest.mark.parametrize("name", NAMES)
def test_unpacking_inverts_packing_and_packing_inverts_unpacking(name):
    fmt = load(name)
    codes, params = random_blocks(fmt, 9, 1024)
    again, again_params = fmt.unpack(fmt.pack(codes, params))
    assert torch.equal(again, codes)
    assert all(torch.equal(again_params[p], params[p]) and again_params[p].dtype == params[p].dtype for p in params)
    anything = torch.randint(0, 256, (17, 3 * fmt.block_bytes), generator=torch.Generator().manual_seed(1))
    assert torch.equal(fmt.pack(*fmt.unpack(anything.to(torch.uint8))), anything.to(torch.uint8))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("search", ["fast", "default", "thorough"])
def test_search_is_never_worse_than_ggml_and_better_in_sum(name, weighted, search):
    fmt = load(name, search=search)
    w = awkward(seed=3)
    importance = importance_of(512) if weighted else torch.ones(512)
    packed = ggml_quantize(w, fmt.ggml_type, 2 * fmt.block_bytes, importance if weighted else None)
    theirs = errors(ggml_dequantize(packed, name, 512), w, importance)
    ours = errors(fitted(fmt, w, importance if weighted else None).decode(), w, importance)
    slack = 1.15 if search == "fast" and not fmt.minima else 1.000001
    assert (ours <= theirs * slack + 1e-5 * errors(torch.zeros_like(w), w, importance)).all()
    assert ours[:16].sum() < GAIN[name] * theirs[:16].sum()


@pytest.mark.parametrize("name", NAMES)
def test_weighted_search_beats_ggmls_importance_matrix_on_every_super_block(name):
    fmt = load(name)
    w = torch.randn(64, 512, generator=torch.Generator().manual_seed(5)) * 0.02
    importance = importance_of(512)
    packed = ggml_quantize(w, fmt.ggml_type, 2 * fmt.block_bytes, importance)
    theirs = errors(ggml_dequantize(packed, name, 512), w, importance)
    ratio = errors(fitted(fmt, w, importance).decode(), w, importance) / theirs
    floor = {"q2_k": 0.88, "q3_k": 0.93, "q4_k": 0.9, "q5_k": 0.83, "q6_k": 0.8}[name]
    assert ratio.max() <= 1.0001
    assert ratio.mean() < floor


def test_thorough_is_better_than_default_and_default_than_fast():
    w, importance = awkward(seed=6)[:32], importance_of(512)
    for name in NAMES:
        fast, default, thorough = (
            errors(fitted(load(name, search=search), w, importance).decode(), w, importance).sum()
            for search in ("fast", "default", "thorough")
        )
        assert thorough < default < fast


@pytest.mark.parametrize("name", NAMES)
def test_dead_inputs_disturb_nothing_and_get_sane_parameters(name):
    """Large weights on inputs that are always zero: whole groups of them, and some among others."""
    fmt = load(name)
    w = torch.randn(8, 256, generator=torch.Generator().manual_seed(7))
    importance = torch.ones(256)
    importance[64:128] = importance[5] = 0
    alone = errors(fitted(fmt, w, importance).decode(), w, importance)
    w[:, 64:128] *= 3
    together = fitted(fmt, w, importance)
    assert (errors(together.decode(), w, importance) <= 1.15 * alone).all()
    dead = (together.decode() - w)[:, 64:128].square().mean() / w[:, 64:128].square().mean()
    assert dead < 0.35
    w[:, 5] = 50
    assert (errors(fitted(fmt, w, importance).decode(), w, importance) <= 1.25 * alone).all()
    everything = fitted(fmt, w, torch.zeros(256))
    assert torch.equal(everything.codes, fitted(fmt, w, torch.ones(256)).codes)


@pytest.mark.parametrize("name", NAMES)
def test_same_parameters_for_any_number_of_threads_and_for_blocks_alone(name, use_threads):
    fmt = load(name)
    w, importance = awkward(seed=8)[:20], importance_of(512)
    use_threads(1)
    whole = fmt.fit(w, importance)
    use_threads(3)
    again = fmt.fit(w, importance)
    alone = fmt.join([fmt.fit(w[:, :256], importance[:256]), fmt.fit(w[:, 256:], importance[256:])])
    assert all(torch.equal(whole[p], again[p]) and torch.equal(whole[p], alone[p]) for p in whole)


@pytest.mark.parametrize("name", NAMES)
def test_shorthand(name):
    cls = registry.load("formats", name)
    assert cls().label == name and cls.parse(name) == cls()
    for search in ("fast", "thorough"):
        assert cls.parse(f"{name}-{search}") == cls(search=search) and cls(search=search).label == f"{name}-{search}"
    assert cls.parse(f"{name}-ggml") is None and cls.parse(f"{name}-default") is None
    assert cls().storage_bits(3, 512) == 6 * 8 * cls.block_bytes


@pytest.mark.parametrize("name", NAMES)
def test_refit_is_near_the_best_of_all_steps(name):
    fmt = load(name)
    low, top = fmt.limits
    _, wanted = random_blocks(fmt, 4, 512, seed=9)
    _, present = random_blocks(fmt, 4, 512, seed=10)
    scale, offset = fmt.affine(wanted)
    assert all(torch.equal(p, wanted[n]) for n, p in fmt.refit(wanted, scale, offset).items())
    g = torch.Generator().manual_seed(15)
    scale, minimum = ((torch.rand(p.shape, generator=g) - (low < 0) / 2) * 0.01 for p in (scale, offset))
    found = fmt.affine(fmt.refit(present, scale, -minimum))
    for got, want in list(zip(found, (scale, -minimum), strict=True))[: 1 + fmt.minima]:
        x = want.reshape(4, 2, -1)
        errors = (got.reshape(x.shape) - x).square().sum(-1)
        steps = x.abs().amax(-1, keepdim=True) / max(top, -low) * torch.linspace(0.6, 1.4, 400)[:, None, None, None]
        best = torch.full_like(errors, torch.inf)
        for sign in (-1, 1):
            near = (x / (sign * steps)).round().clamp(low, top) * sign * steps
            best = torch.minimum(best, (near - x).square().sum(-1).amin(0))
        assert errors.sum() <= 1.8 * best.sum()  # eight values happen to lie near the multiples of one of 800 steps


@pytest.mark.parametrize("name", NAMES)
def test_weighted_refit_is_never_farther_and_nearer_than_rounding(name):
    """Against the plain refit, in a metric that couples all parameters of a row."""
    fmt = load(name)
    _, present = random_blocks(fmt, 24, 512, seed=11)
    present = fmt.refit(present, *fmt.affine(present))
    g = torch.Generator().manual_seed(12)
    scale, offset = (p * (1 + 0.1 * torch.randn(p.shape, generator=g)) for p in fmt.affine(present))
    count = scale.shape[1] * (1 + fmt.minima)
    root = torch.randn(24, count, count, generator=g)
    curvature = root @ root.mT / count + 0.01 * torch.eye(count)

    def distance(params):
        parts = [got - want for got, want in zip(fmt.affine(params), (scale, offset), strict=True)]
        e = torch.cat(parts[: 1 + fmt.minima], dim=1).double()
        return torch.einsum("np,npq,nq->n", e, curvature.double(), e)

    settled = distance(fmt.refit_weighted(present, scale, offset, curvature))
    rounded = distance(fmt.refit(present, scale, offset))
    assert (settled <= rounded * (1 + 1e-5)).all()
    assert settled.sum() < 0.65 * rounded.sum()


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("q2_k", Int(bits=2, group="channel")),
        ("q3_k", Int(bits=3, group=256)),
        ("q3_k", Int(bits=2, group="channel", symmetric=False)),
        ("q4_k", Int(bits=4, group=256, symmetric=False)),
        ("q4_k", Int(bits=4, group="channel")),
        ("q5_k", Int(bits=5, group=512, symmetric=False)),
        ("q6_k", Int(bits=6, group="tensor")),
        ("q6_k", Int(bits=5, group=256, symmetric=False)),
    ],
    ids=lambda v: v if isinstance(v, str) else v.label,
)
def test_integers_of_whole_super_blocks_are_held_exactly(name, source):
    w = torch.randn(12, 512, generator=torch.Generator().manual_seed(13)) + 0.2
    params = source.fit(w)
    quantized = Quantized(source.snap(w, params), params, source)
    fmt = load(name)
    held = fmt.hold(quantized)
    assert isinstance(held, Quantized) and held.format == fmt
    assert torch.equal(held.decode(), quantized.decode())
    assert torch.equal(ggml_dequantize(fmt.pack(held.codes, held.params), name, 512), quantized.decode())


def test_groups_are_held_where_their_scales_are_multiples_of_one_step():
    source = Int(bits=4, group=32, symmetric=False)
    codes = torch.randint(0, 16, (2, 256), generator=torch.Generator().manual_seed(14)).to(torch.uint8)
    multiples = torch.tensor([[63, 5, 0, 1, 40, 17, 2, 30], [2, 2, 2, 2, 2, 2, 2, 4]])
    params = {"scale": (multiples * 2**-9).bfloat16(), "zero": torch.zeros(2, 8, dtype=torch.int8)}
    fmt = load("q4_k")
    held = fmt.hold(Quantized(codes, params, source))
    assert torch.equal(held.decode(), source.decode(codes, params))
    params["scale"][0, 0] = 64.5 * 2**-9
    reason = fmt.hold(Quantized(codes, params, source))
    assert reason == "some scales of a super-block are no multiples of one step"


@pytest.mark.parametrize(
    ("name", "source", "reason"),
    [
        ("q4_k", Int(bits=4, group=16), "q4_k needs groups that are a multiple of 32 columns, not 16"),
        ("q4_k", Int(bits=5, group=32), "the range of int5-g32 does not fit q4_k"),
        ("q6_k", Int(bits=6, group=32, symmetric=False), "the zero points of int6-g32-asym do not fit q6_k"),
        ("q6_k", load("q8_0"), "q6_k holds no q8_0"),
    ],
    ids=["group", "bits", "zero", "block"],
)
def test_what_cannot_be_held_is_said_before_any_data(name, source, reason):
    assert load(name).may_hold(source) == reason


def test_steps_beyond_fp16_are_an_error():
    with pytest.raises(NumericsError, match="q6_k stores scales in fp16: wanted at most 65504"):
        load("q6_k").fit(torch.full((1, 256), 1e9))
