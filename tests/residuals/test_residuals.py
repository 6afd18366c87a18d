"""What residuals find is what slow references find, and their rows are those of the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtool.formats._base import Quantized
from qtool.formats.int import Int
from qtool.numerics.metrics import energy
from qtool.residuals._base import Correction, Matrix
from qtool.residuals.low_rank import LowRank
from qtool.residuals.sparse import Sparse

N, K = 24, 40


@pytest.fixture
def error():
    return torch.randn(N, K, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def gram():
    """Of correlated inputs, a few of them large."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(500, K, generator=generator) @ torch.randn(K, K, generator=generator)
    x[:, :3] *= 20
    return x.T @ x


def cost(error, gram):
    return float(torch.einsum("nk,kl,nl->", error.double(), gram.double(), error.double()))


RESIDUALS = [LowRank(rank=5, dtype="fp32"), LowRank(rank=5, whiten=False), Sparse(share=0.05), Sparse(share=0.0001)]


@pytest.mark.parametrize("residual", RESIDUALS, ids=lambda r: r.label)
class TestProtocol:
    def test_tensors_are_as_declared(self, residual, error, gram):
        tensors = residual.fit(error, gram)
        assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == residual.infos(N, K)
        assert residual.storage_bits(N, K) == 8 * sum(t.numel() * t.element_size() for t in tensors.values())
        residual.check(tensors, N, K)

    def test_rows_are_those_of_the_whole(self, residual, error, gram):
        correction = Correction(residual, residual.fit(error, gram))
        w_hat = torch.randn(N, K, generator=torch.Generator().manual_seed(3))
        before = w_hat.clone()
        whole = correction.apply(w_hat)
        assert torch.equal(w_hat, before)
        for start, stop in ((0, N), (0, 1), (3, 17), (N - 1, N)):
            part = correction.rows(start, stop).apply(w_hat[start:stop])
            torch.testing.assert_close(part, whole[start:stop], rtol=1e-6, atol=1e-6)

    def test_it_leaves_less_than_there_was(self, residual, error, gram):
        left = error - residual.apply(torch.zeros_like(error), residual.fit(error, gram))
        assert energy(left) < energy(error)


@pytest.mark.parametrize("tall", [False, True], ids=["wide", "tall"])
def test_plain_low_rank_is_numpys_truncated_svd(tall, error, gram):
    error = error.T.contiguous() if tall == (error.shape[0] < error.shape[1]) else error
    residual = LowRank(rank=7, whiten=False, dtype="fp32")
    found = residual.apply(torch.zeros_like(error), residual.fit(error, None))
    u, s, vt = np.linalg.svd(error.double().numpy())
    expected = (u[:, :7] * s[:7]) @ vt[:7]
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)


def test_whitened_low_rank_is_the_best_of_its_rank(error, gram):
    """The least error that any product of rank r can leave is the sum of the other singular values of E H^(1/2)."""
    residual = LowRank(rank=7, dtype="fp32")
    left = error - residual.apply(torch.zeros_like(error), residual.fit(error, gram))
    root = np.linalg.cholesky(gram.double().numpy())  # E L has the singular values of E H^(1/2)
    rest = np.linalg.svd(error.double().numpy() @ root, compute_uv=False)[7:]
    assert cost(left, gram) == pytest.approx(float((rest**2).sum()), rel=0.005)
    plain = LowRank(rank=7, whiten=False, dtype="fp32")
    assert cost(left, gram) < 0.8 * cost(error - plain.apply(torch.zeros_like(error), plain.fit(error, gram)), gram)


def test_low_rank_without_any_input_is_finite(error):
    residual = LowRank(rank=3)
    tensors = residual.fit(error, torch.zeros(K, K))
    assert all(t.isfinite().all() for t in tensors.values())
    few = residual.fit(torch.zeros(N, K), None)
    assert not residual.apply(torch.zeros(N, K), few).any()


@pytest.mark.parametrize("sensitive", [True, False])
def test_sparse_keeps_what_costs_most(sensitive, error, gram):
    residual = Sparse(share=0.05, sensitive=sensitive, dtype="fp32")
    found = residual.apply(torch.zeros_like(error), residual.fit(error, gram if sensitive else None))
    costs = sorted(
        (
            (float(error[i, j]) ** 2 * (float(gram[j, j]) if sensitive else 1.0), i, j)
            for i in range(N)
            for j in range(K)
        ),
        reverse=True,
    )
    expected = torch.zeros(N, K)
    for _, i, j in costs[:48]:
        expected[i, j] = error[i, j]
    assert torch.equal(found, expected)


def test_a_matrix_adds_corrections_in_order(error, gram):
    fmt = Int(bits=3, group=8)
    params = fmt.fit(error)
    quantized = Quantized(fmt.snap(error, params), params, fmt)
    corrections, w = [], quantized.decode()
    for residual in (LowRank(rank=2), Sparse(share=0.1)):
        corrections.append(Correction(residual, residual.fit(error - w, gram)))
        w = corrections[-1].apply(w)
    matrix = Matrix(quantized, tuple(corrections))
    left, right = (corrections[0].tensors[name].double().numpy() for name in ("left", "right"))
    expected = quantized.decode().double().numpy() + left @ right
    sparse = corrections[1].tensors
    for i in range(N):
        for e in range(int(sparse["row"][i]), int(sparse["row"][i + 1])):
            expected[i, int(sparse["column"][e])] += float(sparse["value"][e])
    np.testing.assert_allclose(matrix.decode().numpy(), expected, atol=1e-5)
    torch.testing.assert_close(matrix.rows(5, 9).decode(), matrix.decode()[5:9], rtol=1e-6, atol=1e-6)


BROKEN = {
    "rows do not begin at 0": ("row", 0, 1, "row: wanted counts that rise"),
    "rows fall": ("row", 3, 40, "row: wanted counts that rise"),
    "too many": ("row", -1, 47, "row: wanted counts that rise from 0 to 48"),
    "column too large": ("column", 7, K, "column: wanted indices below 40"),
    "negative column": ("column", 7, -1, "column: wanted indices below 40"),
}


@pytest.mark.parametrize(("part", "at", "value", "message"), BROKEN.values(), ids=BROKEN)
def test_sparse_believes_no_indices(part, at, value, message, error):
    residual = Sparse(share=0.05)
    tensors = dict(residual.fit(error, None))
    tensors[part] = tensors[part].clone()
    tensors[part][at] = value
    with pytest.raises(ValueError, match=message):
        residual.check(tensors, N, K)


def test_sparse_wants_columns_that_rise(error):
    residual = Sparse(share=0.5)
    tensors = dict(residual.fit(error, None))
    tensors["column"] = tensors["column"].clone()
    tensors["column"][1] = tensors["column"][0]
    with pytest.raises(ValueError, match="column: wanted indices that rise within a row"):
        residual.check(tensors, N, K)


def test_labels_say_what_is_not_the_default():
    assert LowRank().label == "low_rank"
    assert LowRank(rank=8, whiten=False).label == "low_rank rank 8 whiten False"
    assert LowRank(rank=25).misfit(N, K) == "rank 25 is more than 24 x 40 matrices have"
