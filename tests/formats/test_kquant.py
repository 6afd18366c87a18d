"""The K-quants against ggml itself (through the symbols of xllamacpp) and against gguf's Python decoders."""

import gguf
import pytest
import torch

from qtool import registry
from qtool.formats._base import Quantized
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
    assert (ours <= theirs * 1.0001 + 1e-5 * errors(torch.zeros_like(w), w, importance)).all()
    assert ours[:16].sum() < GAIN[name] * theirs[:16].sum()
