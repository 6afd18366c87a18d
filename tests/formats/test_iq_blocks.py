"""IQ and ternary blocks of GGUF against ggml itself (through the symbols of xllamacpp) and gguf's Python decoders."""

from __future__ import annotations

import gguf
import pytest
import torch
from torch import Tensor

from qtool import registry
from qtool.errors import CheckpointError, NumericsError
from qtool.formats import _base
from qtool.formats._ggml import BlockFormat
from tests.reference.ggml import ggml_dequantize, ggml_quantize

TABLES = ("iq4_nl", "iq4_xs")
TERNARY = ("tq1_0", "tq2_0")
VECTORS = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s")
NAMES = (*TABLES, *TERNARY, *VECTORS)
GGML_ERRORS = {"iq1_s": (329.159, None), "iq1_m": (219.007, None), "iq2_s": (112.3606, 60.00032)}
"""Error of `matrix()` by ggml's encoders (0.26) with importances and without, where these take seconds to prepare."""
ENCODED = [name for name in NAMES if name not in GGML_ERRORS]


def load(name: str, search: str = "default") -> BlockFormat:
    fmt: BlockFormat = registry.load("formats", name)(search=search)
    return fmt


def row_bytes(fmt: BlockFormat, k: int) -> int:
    return k // fmt.columns * fmt.block_bytes


def matrix(n: int = 96, k: int = 512, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gaussian and heavy-tailed rows, and importances of very different size, some of them zero."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=g) * 0.05
    w[n // 2 :] /= torch.randn(n - n // 2, k, generator=g).abs().clamp_min(0.2)
    importance = torch.randn(k, generator=g).mul(1.5).exp()
    importance[[3, 100, 101]] = 0
    return w, importance


def awkward(k: int = 512) -> Tensor:
    """Zero, constant, one-sided, single, tiny, huge and tie-ridden rows."""
    g = torch.Generator().manual_seed(1)
    w = torch.randn(16, k, generator=g)
    w[0], w[1], w[2] = 0, 0.37, -0.37
    w[3], w[4] = w[3].abs() + 0.5, -w[4].abs()
    w[5, 1:] = 0
    w[6] *= 1e-7
    w[7] *= 1e4
    w[8] = torch.randint(-2, 3, (k,), generator=g) / 2
    w[9, ::32] = 100
    w[10, : k // 2] = 0
    return w


def random_blocks(fmt: BlockFormat, n: int, k: int) -> Tensor:
    """Bytes that hold any codes and multipliers, and scales of every exponent but infinite ones."""
    g = torch.Generator().manual_seed(2)
    w = torch.randn(n, k, generator=g) * torch.logspace(-6, 2, n)[:, None]
    params = fmt.fit(w)
    for name, p in params.items():
        if p.dtype == torch.uint8:
            params[name] = torch.randint(0, int(p.max()) + 1, p.shape, generator=g).to(torch.uint8)
    codes = torch.randint(0, len(fmt.levels()), (n, k), generator=g).to(torch.uint8)
    return fmt.pack(codes if fmt.codebook() is None else fmt.snap(w, params), params)


def weighted(w: Tensor, decoded: Tensor, importance: Tensor, block: int = 256) -> Tensor:
    """Error of each block, float64 [N, blocks]."""
    return ((decoded - w).square() * importance).double().view(len(w), -1, block).sum(-1)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_equals_ggml_and_gguf_py(name: str) -> None:
    fmt = load(name)
    packed = random_blocks(fmt, 64, 512)
    assert packed.shape == (64, row_bytes(fmt, 512)) and fmt.storage_bits(64, 512) == packed.numel() * 8
    decoded = fmt.decode(*fmt.unpack(packed))
    assert torch.equal(decoded, ggml_dequantize(packed, name, 512))
    reference = gguf.dequantize(packed.numpy(), gguf.GGMLQuantizationType(fmt.ggml_type))
    assert torch.equal(decoded, torch.from_numpy(reference))


@pytest.mark.parametrize("name", ENCODED)
def test_what_ggml_encodes_is_unpacked_and_packed_to_the_same_bytes(name: str) -> None:
    fmt = load(name)
    w, importance = matrix(32)
    w = torch.cat([w, awkward()[:6]])
    packed = ggml_quantize(w, fmt.ggml_type, row_bytes(fmt, 512), importance)
    codes, params = fmt.unpack(packed)
    assert torch.equal(fmt.pack(codes, params), packed)
    assert torch.equal(fmt.decode(codes, params), ggml_dequantize(packed, name, 512))


@pytest.mark.parametrize("name", NAMES)
def test_unpacking_inverts_packing(name: str) -> None:
    fmt = load(name)
    codes, params = fmt.unpack(random_blocks(fmt, 33, 768))
    again, again_params = fmt.unpack(fmt.pack(codes, params))
    assert torch.equal(again, codes)
    assert params.keys() == again_params.keys() and all(torch.equal(again_params[p], params[p]) for p in params)


@pytest.mark.parametrize("name", (*TABLES, *VECTORS))
def test_any_bytes_are_codes(name: str) -> None:
    fmt = load(name)
    anything = torch.randint(0, 256, (17, row_bytes(fmt, 512)), generator=torch.Generator().manual_seed(3))
    assert torch.equal(fmt.pack(*fmt.unpack(anything.to(torch.uint8))), anything.to(torch.uint8))


@pytest.mark.parametrize("name", TERNARY)
def test_ggml_search_repeats_ggmls_encoder_bit_by_bit(name: str) -> None:
    fmt = load(name, "ggml")
    w = torch.cat([awkward(), matrix()[0]])
    params = fmt.fit(w)
    packed = fmt.pack(fmt.snap(w, params), params)
    assert torch.equal(packed, ggml_quantize(w, fmt.ggml_type, row_bytes(fmt, 512)))


def test_tq2_0_refuses_the_unused_code() -> None:
    with pytest.raises(CheckpointError, match="codes that are not ternary: wanted 0, 1 or 2, found 3"):
        load("tq2_0").unpack(torch.full((1, 66), 0b11, dtype=torch.uint8))


GAIN = {  # error over ggml's by the fast search: with importances and without, just above what was measured
    "iq4_nl": (0.875, 0.937),
    "iq4_xs": (0.862, 0.935),
    "tq1_0": (0.375, 0.42),
    "tq2_0": (0.375, 0.42),
    "iq1_s": (0.805, None),
    "iq1_m": (0.835, None),
    "iq2_xxs": (0.775, None),
    "iq2_xs": (0.738, None),
    "iq2_s": (0.775, 0.73),
    "iq3_xxs": (0.856, 0.574),
    "iq3_s": (0.86, 0.572),
}


@pytest.mark.parametrize("search", ["fast", "default", "thorough"])
@pytest.mark.parametrize("importance_given", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("name", [*TABLES, *TERNARY])
def test_no_block_is_worse_than_ggmls_and_the_sum_is_better(name: str, importance_given: bool, search: str) -> None:
    fmt, (w, importance) = load(name, search), matrix()
    weight = importance if importance_given else torch.ones_like(importance)
    given = importance if importance_given else None
    params = fmt.fit(w, given)
    ours = weighted(w, fmt.decode(fmt.snap(w, params, given), params), weight, fmt.columns)
    packed = ggml_quantize(w, fmt.ggml_type, row_bytes(fmt, 512), given)
    theirs = weighted(w, ggml_dequantize(packed, name, 512), weight, fmt.columns)
    assert (ours <= theirs * (1 + 1e-6) + 1e-12).all()
    assert ours.sum() < GAIN[name][not importance_given] * theirs.sum()


@pytest.mark.parametrize("search", ["fast", "default"])
@pytest.mark.parametrize("importance_given", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("name", VECTORS)
def test_vectors_are_closer_than_ggmls(name: str, importance_given: bool, search: str) -> None:
    """Without importances some of ggml's encoders refuse to run; ours then minimize the plain error all the same."""
    fmt, (w, importance) = load(name, search), matrix()
    given = importance if importance_given else None
    weight = importance if importance_given else torch.ones_like(importance)
    params, other = fmt.fit(w, given), fmt.fit(w, None if importance_given else importance)
    ours = weighted(w, fmt.decode(fmt.snap(w, params, given), params), weight).sum()
    assert ours < weighted(w, fmt.decode(fmt.snap(w, other, given), other), weight).sum()
    gain = GAIN[name][not importance_given]
    if name in GGML_ERRORS:
        theirs = GGML_ERRORS[name][not importance_given]
    elif gain:
        packed = ggml_quantize(w, fmt.ggml_type, row_bytes(fmt, 512), given)
        theirs = weighted(w, ggml_dequantize(packed, name, 512), weight).sum()
    assert not gain or ours < gain * theirs
    scaled = params | {"d": params["d"] * (1.03 if search == "fast" else 1.01)}
    assert weighted(w, fmt.decode(fmt.snap(w, params, given), scaled), weight).sum() > ours


@pytest.mark.parametrize("name", VECTORS)
def test_codes_that_do_not_go_together_are_refused(name: str) -> None:
    fmt = load(name)
    w, _ = matrix(4, 256)
    params = fmt.fit(w)
    codes = fmt.snap(w, params)
    again = fmt.unpack(fmt.pack(codes, params))[0]
    assert torch.equal(again, codes)
    wrong = torch.randint(0, len(fmt.levels()), codes.shape, generator=torch.Generator().manual_seed(6))
    with pytest.raises(NumericsError, match=f"some codes do not go together in {name}"):
        fmt.pack(wrong.to(torch.uint8), params)
    if fmt.codebook().signs == "even":
        codes[0, 0] = len(fmt.levels()) - 1 - codes[0, 0]  # an entry still, but with an odd number of minus signs
        with pytest.raises(NumericsError, match="do not go together"):
            fmt.pack(codes, params)


@pytest.mark.parametrize("name", TERNARY)
def test_ternary_scale_equals_brute_force(name: str) -> None:
    fmt = load(name)
    w, importance = matrix(4, 256)
    d = fmt.fit(w, importance)["d"].double()
    grid = torch.linspace(0, 1, 4001, dtype=torch.float64) * w.abs().amax()
    for row, scale in zip(w.double(), d[:, 0], strict=True):
        levels = row.sign() * (row.abs() > grid[:, None] / 2)
        best = ((row - grid[:, None] * levels).square() * importance).sum(1).min()
        found = ((row - scale * row.sign() * (row.abs() > scale / 2)).square() * importance).sum()
        assert found <= best * 1.001


def test_a_ternary_model_is_kept_exactly() -> None:
    w = torch.randint(-1, 2, (8, 512), generator=torch.Generator().manual_seed(4)) * 0.125
    for search in ("ggml", "fast", "default"):
        fmt = load("tq2_0", search)
        params = fmt.fit(w)
        assert torch.equal(fmt.decode(fmt.snap(w, params), params), w)


@pytest.mark.parametrize("name", NAMES)
def test_awkward_rows_and_dead_columns(name: str) -> None:
    fmt = load(name)
    w = awkward()
    importance = torch.zeros(512)
    importance[:200] = torch.rand(200, generator=torch.Generator().manual_seed(5))
    params = fmt.fit(w, importance)
    decoded = fmt.decode(fmt.snap(w, params, importance), params)
    assert bool(decoded.isfinite().all()) and bool((decoded[0] == 0).all())
    live = ((decoded - w).square() * importance).sum(1)
    assert bool((live <= (w.square() * importance).sum(1) * (1 + 1e-6)).all())
    error = (decoded - w)[11:, 256:].square().sum() / w[11:, 256:].square().sum()  # columns without importance
    assert error <= {"iq4_nl": 0.01, "iq4_xs": 0.01}.get(name, 0.3)


@pytest.mark.parametrize("name", NAMES)
def test_refit_moves_scales_where_they_are_wanted(name: str) -> None:
    fmt = load(name)
    params = fmt.fit(matrix()[0])
    scale, offset = fmt.affine(params)
    same = fmt.refit(params, scale, offset)
    assert all(torch.equal(same[p], params[p]) for p in params)
    moved, _ = fmt.affine(fmt.refit(params, scale * 1.05, offset * 1.05))
    assert torch.allclose(moved, scale * 1.05, rtol=1e-3)


@pytest.mark.parametrize("name", ["iq4_xs", "iq2_xs", "mxfp4", "nvfp4"])
def test_a_large_matrix_is_fitted_in_parts_that_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, (w, importance) = load(name, "fast"), matrix(7)
    whole = fmt.fit(w, importance)
    monkeypatch.setattr(_base, "CHUNK", 2 * w.shape[1])
    assert [len(part) for part in _base.row_chunks(w)] == [2, 2, 2, 1]
    parts = fmt.fit(w, importance)
    assert all(torch.equal(parts[p], whole[p]) for p in whole)


@pytest.mark.parametrize("name", NAMES)
def test_shorthand(name: str) -> None:
    cls = registry.load("formats", name)
    assert cls.parse(name) == cls() and cls().label == name
    for search in ("fast", "thorough"):
        assert cls.parse(f"{name}-{search}") == cls(search=search) and cls(search=search).label == f"{name}-{search}"
    assert (cls.parse(f"{name}-ggml") is not None) == (name in TERNARY)


@pytest.mark.parametrize("name", NAMES)
def test_scales_beyond_fp16_are_an_error(name: str) -> None:
    with pytest.raises(NumericsError, match=f"{name} stores scales in fp16: wanted at most 65504"):
        load(name).fit(torch.full((1, 256), 1e9))
