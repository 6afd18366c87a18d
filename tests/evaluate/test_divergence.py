"""Scores against a plain loop over Python floats, and quantiles against numpy."""

import math

import numpy as np
import pytest
import torch

from qtool.errors import NumericsError
from qtool.evaluate import divergence
from qtool.evaluate.divergence import Scores, quantiles
from qtool.pipeline.memory import resident_bytes

POSITIONS, VOCABULARY = 37, 50


def log_softmax(row):
    top = max(row)
    total = math.log(math.fsum(math.exp(x - top) for x in row)) + top
    return [x - total for x in row]


def reference(logits, base, targets):
    """One position at a time, one token at a time."""
    rows = []
    for q_row, p_row, t in zip(logits.tolist(), base.tolist(), targets.tolist(), strict=True):
        log_q, log_p = log_softmax(q_row), log_softmax(p_row)
        rows.append(
            {
                "nll": -log_q[t],
                "base_nll": -log_p[t],
                "kld": math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)),
                "dp": math.exp(log_q[t]) - math.exp(log_p[t]),
                "same": q_row.index(max(q_row)) == p_row.index(max(p_row)),
            }
        )
    return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(POSITIONS, VOCABULARY, generator=generator) * 3
    logits = base + torch.randn(POSITIONS, VOCABULARY, generator=generator)
    return logits, base, torch.randint(VOCABULARY, (POSITIONS,), generator=generator)


@pytest.mark.parametrize("row_elements", [1, 7 * VOCABULARY, 1 << 19], ids=["row-by-row", "seven-rows", "all"])
def test_every_statistic_equals_a_plain_loop(data, row_elements, monkeypatch):
    monkeypatch.setattr(divergence, "ROW_ELEMENTS", row_elements)
    logits, base, targets = data
    scores = Scores()
    for part in (slice(0, 20), slice(20, None)):
        scores.add(logits[part], targets[part], base[part])
    want, found = reference(logits, base, targets), scores.summary()
    nll, kld = want["nll"], want["kld"]
    n = len(nll)
    ppl = math.exp(nll.mean())
    assert found == pytest.approx(
        {
            "ppl": ppl,
            "ppl_error": ppl * math.sqrt(((nll**2).mean() - nll.mean() ** 2) / (n - 1)),
            "base_ppl": math.exp(want["base_nll"].mean()),
            "kld_mean": kld.mean(),
            "kld_error": math.sqrt(((kld**2).mean() - kld.mean() ** 2) / (n - 1)),
            "kld_median": np.median(kld),
            "kld_p90": np.quantile(kld, 0.9),
            "kld_p95": np.quantile(kld, 0.95),
            "kld_p99": np.quantile(kld, 0.99),
            "kld_p999": np.quantile(kld, 0.999),
            "kld_max": kld.max(),
            "ppl_ratio_error": ppl
            / math.exp(want["base_nll"].mean())
            * (nll - want["base_nll"]).std()
            / math.sqrt(n - 1),
            "top1": want["same"].mean(),
            "top1_error": math.sqrt(want["same"].mean() * (1 - want["same"].mean()) / (n - 1)),
            "dp_mean": want["dp"].mean(),
            "rms_dp": math.sqrt((want["dp"] ** 2).mean()),
        },
        rel=1e-9,
    )
    assert 0.1 < found["top1"] < 0.9  # the case tells agreement from disagreement


def test_without_baseline_only_perplexity(data):
    logits, base, targets = data
    scores = Scores()
    scores.add(logits, targets)
    assert set(scores.summary()) == {"ppl", "ppl_error"}
    assert scores.summary()["ppl"] == pytest.approx(math.exp(reference(logits, base, targets)["nll"].mean()), rel=1e-9)


def test_a_model_does_not_diverge_from_itself(data):
    logits, _, targets = data
    scores = Scores()
    scores.add(logits, targets, logits.clone())
    found = scores.summary()
    assert (found["kld_max"], found["top1"], found["rms_dp"]) == (0.0, 1.0, 0.0)
    assert found["ppl"] == found["base_ppl"]


def test_tiny_divergence_is_not_lost_in_rounding():
    """KL of a logit moved by e is p(1-p) e^2 / 2 to second order: 5e-9 for e = 2e-4, below float32's step at 1."""
    base = torch.zeros(1, 2, dtype=torch.float64)
    logits = torch.tensor([[2e-4, 0.0]], dtype=torch.float64)
    scores = Scores()
    scores.add(logits, torch.tensor([0]), base)
    assert scores.summary()["kld_max"] == pytest.approx(5e-9, rel=1e-4)


def test_a_token_that_the_baseline_excludes_adds_nothing():
    base = torch.tensor([[0.0, 0.0, -torch.inf]])
    logits = torch.tensor([[0.0, 0.0, 0.0]])
    scores = Scores()
    scores.add(logits, torch.tensor([0]), base)
    assert scores.summary()["kld_mean"] == pytest.approx(math.log(1.5), rel=1e-12)


def test_logits_that_are_no_numbers_are_refused(data):
    logits, base, targets = data
    logits[3, 4] = torch.nan
    with pytest.raises(NumericsError, match="nll that is NaN or infinite"):
        Scores().add(logits, targets, base)


@pytest.mark.parametrize("n", [1, 2, 10, 1001])
def test_quantiles_equal_numpy(n):
    x = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    shares = torch.tensor([0.0, 0.1, 0.5, 0.9, 0.999, 1.0], dtype=torch.float64)
    np.testing.assert_allclose(quantiles(x, shares), np.quantile(x.numpy(), shares.numpy()), rtol=1e-12)


def test_memory_stays_flat_in_the_number_of_chunks():
    def chunk() -> None:
        base = torch.randn(255, 49152)
        scores.add(base + 0.1 * torch.randn_like(base), torch.arange(255), base)

    scores = Scores()
    for _ in range(3):
        chunk()
    before = resident_bytes()
    for _ in range(4):
        chunk()
    assert resident_bytes() - before < 50_000_000  # once 250 MB a chunk
