"""Scales of a table and the codes under them, moved in turn: against a slow loop that looks at the whole objective."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qtool.numerics.solving.settle import BLOCK, add_rows, settle, settles
from tests.methods.test_refine import gram_of

LEVELS = torch.tensor([-6.0, -3.0, -1.0, 0.0, 1.0, 3.0, 6.0])
VALUES = {"powers": 2.0 ** torch.arange(-6.0, 3.0), "fine": torch.arange(40) * 0.03}


def settle_slowly(w, gram, values, found, codes):  # type: ignore[no-untyped-def]
    """One row at a time in float64: the best scale of all for each group of a block, then the best level for each code.

    The first scale of the table is never taken.
    """
    w, gram, values, levels = w.double(), gram.double(), values.double(), LEVELS.double()
    found, codes, width = found.clone(), codes.clone().long(), w.shape[1] // found.shape[1]

    def best(n: int, scales: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        d = w[n] - scales.repeat_interleave(width, 1) * levels[entries]
        return ((d @ gram) * d).sum(1).argmin()

    for n in range(len(w)):
        for a in range(0, w.shape[1], BLOCK):
            b = min(a + BLOCK, w.shape[1])
            for g in range(a // width, b // width):
                tries = found[n].repeat(len(values), 1)
                tries[:, g] = torch.arange(len(values))
                found[n, g] = 1 + best(n, values[tries[1:]], codes[n].expand(len(values) - 1, -1))
            for j in range(a, b):
                tries = codes[n].repeat(len(levels), 1)
                tries[:, j] = torch.arange(len(levels))
                codes[n, j] = best(n, values[found[n]].expand(len(levels), -1), tries)
    return found, codes.to(torch.uint8)


@pytest.mark.parametrize("table", VALUES)
@pytest.mark.parametrize(("k", "groups"), [(24, 3), (160, 10), (320, 10)])
def test_a_pass_is_that_of_the_slow_loop(k: int, groups: int, table: str) -> None:
    generator = torch.Generator().manual_seed(k)
    values, gram, w = VALUES[table], gram_of(k, 2 * k), torch.randn(4, k, generator=generator)
    found = torch.randint(1, len(values), (4, groups), generator=generator)
    codes = torch.randint(0, len(LEVELS), (4, k), generator=generator).to(torch.uint8)
    codes[2, : k // groups] = 3  # zeros, which no scale makes better or worse
    pull = (w - LEVELS[codes.long()] * values[found].repeat_interleave(k // groups, 1)) @ gram
    given = found.clone(), codes.clone(), pull.clone()
    moved, better, left = settle(gram, values, LEVELS, found, codes, pull)
    assert all(torch.equal(now, before) for now, before in zip((found, codes, pull), given, strict=True))
    assert moved[2, 0] == found[2, 0]
    rows = torch.tensor([0, 1, 3])
    want_moved, want = settle_slowly(w[rows], gram, values, found[rows], codes[rows])
    assert torch.equal(moved[rows], want_moved)
    assert torch.equal(better[rows], want)
    decoded = LEVELS[better.long()] * values[moved].repeat_interleave(k // groups, 1)
    torch.testing.assert_close(left, (w - decoded) @ gram, rtol=1e-3, atol=1e-4 * float(gram.diagonal().mean()))


def test_only_groups_that_blocks_consist_of() -> None:
    assert settles(16) and settles(32) and settles(BLOCK)
    assert not settles(24) and not settles(2 * BLOCK)


@pytest.mark.parametrize("width", [1, 4, 7])
def test_rows_are_added_in_their_order(width: int) -> None:
    generator = np.random.default_rng(width)
    rows, factors = generator.standard_normal((width, 33)), generator.standard_normal(width)
    total = generator.standard_normal(33).astype(np.float32)
    want = total + factors @ rows
    add_rows(rows.astype(np.float32), factors.astype(np.float32), total)
    np.testing.assert_allclose(total, want, rtol=1e-5, atol=1e-5)
