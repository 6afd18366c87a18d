"""No block of any search is worse than what ggml's encoder makes of it, with the same importance matrix or without."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from qtool import registry
from qtool.formats._ggml import BlockFormat
from tests.reference.ggml import ggml_dequantize, ggml_quantize

SEARCHED = ("q4_0", "q5_0", "q4_1", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs")
PLAIN = ("q8_0", "tq1_0", "tq2_0", "mxfp4", "nvfp4")
BOOKS = ("iq3_xxs", "iq3_s")
SLOW = ("q4_0", "q5_0", "q3_k", "q6_k", "nvfp4", *BOOKS)
"""What the fast search has no time to compare."""
SEARCHES = ("fast", "default", "thorough")
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


@pytest.mark.parametrize("matrix", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize(("name", "search"), CASES)
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


@pytest.mark.parametrize("matrix", [True, False], ids=["weighted", "plain"])
@pytest.mark.parametrize("name", [*SEARCHED, *BOOKS])
def test_ggmls_scales_are_repeated_bit_by_bit(name: str, matrix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What our search is compared with is what ggml writes, in every block."""
    w, given = blocks(64)
    importance = given if matrix else None
    seen = []

    def no_worse(self: BlockFormat, found: object, other: object, *_: object) -> object:
        seen.append(other)
        return found

    monkeypatch.setattr(BlockFormat, "no_worse", no_worse)
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


@pytest.mark.parametrize("name", ["iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s"])
def test_small_codebooks_are_not_compared_and_better_all_the_same(name: str) -> None:
    """Repeating ggml's search for these would cost more than the whole search."""
    g = torch.Generator().manual_seed(12)
    w, importance = torch.randn(48, K, generator=g) * 0.03, torch.randn(K, generator=g).exp()
    ours, theirs = both(name, "default", w, importance)
    assert (ours < 0.97 * theirs).all()
