"""No block of any search is worse than what ggml's encoder makes of it, with the same importance matrix or without."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from qtool import registry
from qtool.formats import _vector
from qtool.formats._base import Format, Params
from qtool.formats._ggml import BlockFormat
from qtool.formats._spelling import parse_format
from qtool.formats._vector import Vector
from tests.reference.ggml import ggml_dequantize, ggml_quantize

SEARCHED = ("q4_0", "q5_0", "q4_1", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs")
PLAIN = ("q8_0", "tq1_0", "tq2_0", "mxfp4", "nvfp4")
BOOKS = ("iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s")
SLOW = ("q4_0", "q5_0", "q3_k", "q6_k", "nvfp4", *BOOKS)
"""What the fast search has no time to compare."""
SEARCHES = ("fast", "default", "thorough")
UNGUIDED = ("iq1_m", "iq2_s", "iq3_xxs", "iq3_s")
"""What ggml encodes without a matrix, of the types with codebooks; there is nothing to compare the others with."""
CASES = [(name, search) for name in (*SEARCHED, *PLAIN, *BOOKS) for search in SEARCHES[name in SLOW :]]
K = 512


def load(name: str, search: str) -> BlockFormat:
    fmt: BlockFormat = registry.load("formats", name)(search=search)
    return fmt


def blocks(n: int = 192) -> tuple[Tensor, Tensor]:
    """Rows as models have them, heavy-tailed, on a grid, one-sided, sparse, tiny, large and empty ones; importances."""
    g = torch.Generator().manual_seed(11)
    w = torch.randn(n, K, generator=g) * 0.03
    w[n // 2 :] /= torch.randn(n - n // 2, K, generator=g).abs().clamp_min(0.2)
    w[::16] = torch.randint(-8, 8, (n // 16, K), generator=g) * 0.125
    w[1::16] = w[1::16].abs()
    w[2::16, 1:200] = 0
    w[3::32] *= 1e-5
    w[4::32] *= 1e3
    w[5::64] = 0
    return w, torch.randn(K, generator=g).mul(1.5).exp()


def errors(w: Tensor, decoded: Tensor, importance: Tensor, fmt: BlockFormat) -> np.ndarray:
    """float64 [N, blocks]."""
    square = np.square(decoded.numpy().astype(np.float64) - w.numpy().astype(np.float64))
    return (square * importance.numpy().astype(np.float64)).reshape(len(w), -1, fmt.columns).sum(-1)


def both(name: str, search: str, w: Tensor, importance: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Errors of our blocks and of ggml's."""
    fmt, weight = load(name, search), torch.ones(K) if importance is None else importance
    params = fmt.fit(w, importance)
    ours = errors(w, fmt.decode(fmt.snap(w, params, importance), params), weight, fmt)
    packed = ggml_quantize(w, fmt.ggml_type, K // fmt.columns * fmt.block_bytes, importance)
    return ours, errors(w, ggml_dequantize(packed, name, K), weight, fmt)


def with_and_without_matrix(cases: Sequence[tuple[str, ...]]) -> list[tuple[str | bool, ...]]:
    return [(*c, matrix) for c in cases for matrix in (True, False) if matrix or c[0] not in BOOKS or c[0] in UNGUIDED]


@pytest.mark.parametrize(("name", "search", "matrix"), with_and_without_matrix(CASES))
def test_no_block_is_worse(name: str, search: str, matrix: bool) -> None:
    w, importance = blocks()
    ours, theirs = both(name, search, w, importance if matrix else None)
    assert (theirs > 0).mean() > 0.8
    assert (ours <= theirs * (1 + 1e-6)).all()
    assert (ours > theirs * 0.99).mean() < 0.99  # and many are better


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q4_k", "q6_k", "iq4_xs", "tq2_0", "mxfp4"])
def test_nor_where_some_inputs_are_dead_which_count_a_little(name: str) -> None:
    w, importance = blocks(64)
    importance[torch.rand(K, generator=torch.Generator().manual_seed(1)) < 0.1] = 0
    importance[300:400] = 0
    width = load(name, "default").columns
    mean = importance.view(-1, width).mean(1, keepdim=True)
    counted = torch.maximum(importance.view(-1, width), 1e-5 * mean).flatten()
    fmt = load(name, "default")
    params = fmt.fit(w, importance)
    ours = errors(w, fmt.decode(fmt.snap(w, params), params), counted, fmt)
    packed = ggml_quantize(w, fmt.ggml_type, K // fmt.columns * fmt.block_bytes, importance)
    assert (ours <= errors(w, ggml_dequantize(packed, name, K), counted, fmt) * (1 + 1e-6)).all()


def edges() -> Tensor:
    """Rows just below and above what ggml takes for zeros, of one type or another."""
    signs = torch.randn(8, K, generator=torch.Generator().manual_seed(13)).sign()
    return signs * torch.outer(torch.tensor([0.995, 1.005]), torch.tensor([1e-7, 1e-8, 1e-12, 1e-15])).view(8, 1)


@pytest.mark.parametrize(("name", "matrix"), with_and_without_matrix([(name,) for name in (*SEARCHED, *BOOKS)]))
def test_ggmls_scales_are_repeated_bit_by_bit(name: str, matrix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What our search is compared with is what ggml writes, in every block."""
    w, given = blocks(64)
    if name in BOOKS:
        w = torch.cat([w[w.abs().amax(1) > 0], edges()])
    importance = given if matrix else None
    seen = []

    def no_worse(self: BlockFormat, found: Params, other: Params, *_: object) -> Params:
        seen.append(other)
        return found

    monkeypatch.setattr(BlockFormat, "no_worse", no_worse)
    monkeypatch.setattr(_vector, "DOUBT", np.inf)
    fmt = load(name, "default")
    fmt.fit(w, importance)
    packed = ggml_quantize(w, fmt.ggml_type, K // fmt.columns * fmt.block_bytes, importance)
    codes, params = fmt.unpack(packed)
    (repeated,) = seen
    used = w.view(len(w), -1, fmt.columns).abs().amax(-1) > 0  # ggml leaves anything in the fields of empty blocks
    for field, wanted in params.items():
        width = wanted.shape[1] // used.shape[1]
        assert torch.equal(repeated[field][used.repeat_interleave(width, 1)], wanted[used.repeat_interleave(width, 1)])
    assert codes.shape == w.shape


def hard_blocks() -> tuple[Tensor, Tensor]:
    """Rows for which ggml's search sometimes finds more: few channels count, or scales hardly fit into fp16."""
    g = torch.Generator().manual_seed(3)
    w = torch.randn(64, K, generator=g) * 0.03
    return torch.cat([w, w * 1e-5, w * 1e-4]), torch.randn(K, generator=g).mul(4).exp()


@pytest.mark.parametrize("name", BOOKS)
def test_it_is_the_comparison_that_makes_it_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w, importance = hard_blocks()
    ours, theirs = both(name, "default", w, importance)
    assert (ours <= theirs * (1 + 1e-6)).all()
    monkeypatch.setattr(BlockFormat, "no_worse", lambda self, found, *_: found)
    alone, _ = both(name, "default", w, importance)
    assert (alone > theirs * 1.02).any()


@pytest.mark.parametrize("name", BOOKS)
def test_nor_a_block_that_counts_little_in_its_row(name: str) -> None:
    w, importance = blocks(64)
    importance[256:] *= 1e-8
    ours, theirs = both(name, "default", w, importance)
    assert (ours <= theirs * (1 + 1e-6)).all()


@pytest.mark.parametrize(("name", "matrix"), with_and_without_matrix([(name,) for name in BOOKS]))
def test_blocks_are_compared_exactly_wherever_it_matters(
    name: str, matrix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both searches know the errors of the codes that they have seen."""
    w, given = blocks(64)
    w[2::16] = w[::16]  # of groups without weights ggml writes other codes for IQ3_S than it has found
    w, importance = w[w.view(len(w), -1, 256).abs().amax(-1).amin(-1) > 1e-4], given if matrix else None
    errors_seen: dict[str, Tensor] = {}

    def noted(label: str) -> None:
        search = getattr(_vector, label)

        def wrapped(*args: object) -> tuple[Tensor, ...]:
            found: tuple[Tensor, ...] = search(*args)
            errors_seen[label] = found[-1]
            return found

        monkeypatch.setattr(_vector, label, wrapped)

    for label in ("vector_scales", "ggml_codebook_scales", "ggml_ternary_scales"):
        noted(label)
    monkeypatch.setattr(BlockFormat, "no_worse", lambda self, found, *_: found)
    ours, theirs = both(name, "default", w, importance)
    weight = torch.ones(K) if importance is None else importance
    energy = errors(w, torch.zeros_like(w), weight, load(name, "default"))
    bound, wanted = (errors_seen[label].numpy() for label in errors_seen)
    np.testing.assert_allclose(wanted, theirs / energy, rtol=1e-4)
    assert (bound >= ours / energy - 1e-5).all() and bound.sum() < 1.1 * (ours / energy).sum()


@pytest.mark.parametrize("name", ["iq1_s", "iq2_xxs", "iq2_xs"])
def test_what_ggml_encodes_with_a_matrix_only_is_not_compared_without(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compared(*_: object) -> None:
        raise AssertionError

    for label in ("ggml_codebook_scales", "ggml_ternary_scales"):
        monkeypatch.setattr(_vector, label, compared)
    w, importance = blocks(16)
    fmt = load(name, "default")
    assert isinstance(fmt, Vector)
    fmt.fit(w)
    with pytest.raises(AssertionError):
        fmt.fit(w, importance)


PLAIN_RULES = {
    "int4-g128": {"scales": "minmax"},
    "int8-channel": {"scales": "minmax"},
    "int8-tensor": {"scales": "minmax"},
    "int2-g32": {"scales": "minmax"},
    "int4-b4x32": {"scales": "minmax"},
    "int4-g64-asym": {"scales": "minmax"},
    "int8-channel-asym": {"scales": "minmax"},
    "biased4-g64": {"scales": "minmax"},
    "biased8-channel": {"scales": "minmax"},
    "qoq-g128": {"scales": "minmax"},
    "fp8-channel": {"scales": "minmax"},
    "fp8-tensor": {"scales": "minmax"},
    "fp8-block": {"scales": "minmax"},
    "fp8-e5m2-channel": {"scales": "minmax"},
    "fp6-e2m3-g32": {"scales": "minmax"},
    "fp4-g16": {"scales": "minmax"},
    "mxfp8": {"search": "floor"},
    "mxfp8-fast": {"search": "up"},
    "mxfp8-thorough": {"search": "even"},
    "mxfp6": {"search": "up"},
    "mxint8": {"search": "floor"},
    "mxint8-fast": {"search": "even"},
    "mxfp4": {"search": "up"},
    "mxfp4-fast": {"search": "floor"},
    "bfp8-g16": {"search": "up"},
    "bfp4-g16": {"search": "floor"},
}
"""Formats that search, and what makes a rule without a search of them."""


def hard_rows() -> Tensor:
    """Constant ones, powers of two, empty, tiny and large ones, one outlier, and ordinary ones."""
    g = torch.Generator().manual_seed(17)
    w = torch.randn(64, K, generator=g) * 0.03
    w[:8] = torch.logspace(-2, 2, 8)[:, None]
    w[8:12] = torch.randint(-3, 4, (4, K), generator=g) * 0.5
    w[12], w[13:16], w[16:20] = 0, w[13:16] * 1e-35, w[16:20] * 1e5
    w[20:24, 7] = 3.0
    w[24:28, 1:] = 0
    return w


@pytest.mark.parametrize("matrix", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("label", PLAIN_RULES)
def test_no_scale_is_worse_than_without_a_search(label: str, matrix: bool) -> None:
    fmt, w = parse_format(label), hard_rows()
    importance = torch.randn(K, generator=torch.Generator().manual_seed(18)).exp() if matrix else None
    weight = torch.ones(K) if importance is None else importance
    width, rows = fmt.group_columns or K, fmt.group_rows or len(w)

    def found(choice: Format) -> np.ndarray:
        params = choice.fit(w, importance)
        square = (choice.decode(choice.snap(w, params, importance), params).double() - w.double()).square() * weight
        return square.view(len(w) // rows if rows < len(w) else 1, -1, K // width, width).sum((1, 3)).numpy()

    ours, plain = found(fmt), found(fmt.model_copy(update=PLAIN_RULES[label]))
    assert (ours <= plain * (1 + 1e-8)).all()
    if "tensor" not in label and "mxfp8" not in label:  # where there is little to be found
        coarse = label.startswith(("mxfp6", "mxint8", "bfp8"))  # fine grids, whose scales are powers of two
        assert (ours[plain > 0] / plain[plain > 0]).mean() < (0.994 if coarse else 0.99)


@pytest.mark.parametrize("label", ["fp8-channel", "fp4-g16", "int4-g128", "biased4-g64", "qoq-g128"])
def test_a_tie_goes_to_the_rule_without_a_search(label: str) -> None:
    """A row of one number is exact in many ways."""
    fmt = parse_format(label)
    w = torch.full((3, 128), 0.75)
    plain = fmt.model_copy(update={"scales": "minmax"}).fit(w)
    exact = torch.equal(fmt.decode(fmt.snap(w, plain), plain), w)
    for name, p in fmt.fit(w).items():
        assert torch.equal(p, plain[name]) or not exact


@pytest.mark.parametrize("label", ["nvfp4-fast", "nvfp4", "nvint4"])
def test_no_scale_of_two_levels_is_worse_than_that_which_covers(label: str) -> None:
    fmt, w = parse_format(label), hard_rows()
    params = fmt.fit(w)
    covering = (w.view(len(w), -1, 16).abs().amax(-1) / fmt.levels()[-1] / params["tensor"]).float()
    bits = covering.clamp(2.0**-9, 448).to(torch.float8_e4m3fn).view(torch.uint8)

    def found(p: Params) -> np.ndarray:
        square = (fmt.decode(fmt.snap(w, p), p).double() - w.double()).square()
        return square.view(len(w), -1, 16).sum(-1).numpy()

    ours, plain = found(params), found(params | {"scale": bits})
    assert (ours <= plain * (1 + 1e-8)).all() and ours.sum() < plain.sum()
