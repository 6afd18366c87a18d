"""Errors in decibels against loops in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from qtool.numerics.metrics import all_finite, energy, ratio_db


def sqnr_db(w, w_hat):
    return ratio_db(energy(w), energy(w - w_hat))


def output_error_db(w, w_hat, gram):
    return ratio_db(energy(w, gram), energy(w - w_hat, gram))


@pytest.fixture
def matrices():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, 8, generator=generator)
    return w, w + 0.03 * torch.randn(6, 8, generator=generator), torch.randn(20, 8, generator=generator)


def test_sqnr_is_signal_over_error(matrices):
    w, w_hat, _ = matrices
    pairs = list(zip(w.flatten().tolist(), w_hat.flatten().tolist(), strict=True))
    wanted = 10 * math.log10(sum(a * a for a, _ in pairs) / sum((a - b) ** 2 for a, b in pairs))
    assert sqnr_db(w, w_hat) == pytest.approx(wanted, abs=1e-4)


def test_energy_is_a_sum_of_squares(matrices):
    w, _, x = matrices
    assert energy(w) == pytest.approx(sum(v * v for v in w.flatten().tolist()), rel=1e-6)
    outputs = sum(float(row @ r) ** 2 for row in x for r in w)
    assert energy(w, x.T @ x) == pytest.approx(outputs, rel=1e-5)


@pytest.mark.parametrize("k", [144, 145, 400, 1200])
def test_energy_of_wide_matrices_is_summed_in_strips(k):
    generator = torch.Generator().manual_seed(k)
    w, x = torch.randn(5, k, generator=generator), torch.randn(k + 50, k, generator=generator)
    kept = w.clone()
    wanted = float((x.double() @ w.double().T).square().sum())
    assert energy(w, x.T @ x) == pytest.approx(wanted, rel=1e-5)
    assert energy(w) == pytest.approx(float(w.double().square().sum()), rel=1e-6)
    assert torch.equal(w, kept)


def test_a_scale_error_of_one_percent_is_40_db(matrices):
    w, _, _ = matrices
    assert sqnr_db(w, 1.01 * w) == pytest.approx(40, abs=1e-3)
    assert output_error_db(w, 0.9 * w, torch.eye(8)) == pytest.approx(20, abs=1e-3)


def test_output_error_is_that_of_the_outputs(matrices):
    w, w_hat, x = matrices
    signal = sum(float(row @ r) ** 2 for row in x for r in w)
    error = sum(float(row @ (r - s)) ** 2 for row in x for r, s in zip(w, w_hat, strict=True))
    assert output_error_db(w, w_hat, x.T @ x) == pytest.approx(10 * math.log10(signal / error), abs=1e-3)


def test_no_error_is_infinite_and_all_error_is_zero(matrices):
    w, _, _ = matrices
    assert sqnr_db(w, w) == math.inf
    assert sqnr_db(torch.zeros(2, 2), torch.zeros(2, 2)) == math.inf
    assert sqnr_db(w, torch.zeros_like(w)) == pytest.approx(0, abs=1e-9)
    assert sqnr_db(torch.zeros(2, 2), torch.ones(2, 2)) == -math.inf


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_found(odd):
    w = torch.randn(7, 9)
    assert all_finite(w)
    w[3, 4] = odd
    assert not all_finite(w)


def test_large_numbers_are_finite_though_their_sum_is_not():
    assert all_finite(torch.full((4, 4), 3e38))
