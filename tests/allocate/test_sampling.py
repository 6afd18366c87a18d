"""Rows that stand for all: how many, which for certain, and what sums they estimate."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtool.allocate.sampling import systematic


def test_few_rows_are_all_taken_but_those_that_do_not_count():
    sample = systematic(torch.tensor([3.0, 0.0, 1.0, 2.0]), 3)
    assert sample.rows.tolist() == [0, 2, 3]
    assert sample.weights.tolist() == [1, 1, 1]
    assert systematic(torch.zeros(5), 2).rows.tolist() == []


@pytest.mark.parametrize("count", [1, 7, 64, 256])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_sums_of_what_is_proportional_are_exact(count, spread):
    """Equal probabilities, and ones of which some would be far above 1."""
    sizes = torch.from_numpy(np.random.default_rng(count).lognormal(0, spread, 3000))
    sample = systematic(sizes, count)
    assert abs(len(sample.rows) - count) <= 1
    assert sample.rows.tolist() == sorted(set(sample.rows.tolist()))
    assert float((3 * sizes[sample.rows]) @ sample.weights) == pytest.approx(3 * float(sizes.sum()), rel=1.01 / count)
    share = sizes * count / sizes.sum()
    assert set(torch.where(share >= 1)[0].tolist()) <= set(sample.rows[sample.weights == 1].tolist())
    assert float(sample.weights.min()) >= 1


def test_estimates_of_what_is_nearly_proportional_are_right_on_average():
    """50 sums over 4096 rows by 256: their mean is right, and the spread what the theory of sampling allows."""
    rng, ratios = np.random.default_rng(0), []
    for _ in range(50):
        sizes = rng.lognormal(0, 1, 4096)
        values = sizes * rng.lognormal(0, 0.5, 4096)
        sample = systematic(torch.from_numpy(sizes), 256)
        ratios.append(float(torch.from_numpy(values)[sample.rows] @ sample.weights) / values.sum())
    assert np.mean(ratios) == pytest.approx(1, abs=0.01)
    assert np.std(ratios) < 1.2 * 0.53 / 16  # of exp(0.5 N): 0.53 of the mean; by 256 rows
