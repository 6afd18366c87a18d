"""Modules that are solved side by side, against the same one by one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qtool.formats._base import Quantized
from qtool.formats._spelling import parse_format
from qtool.methods._base import Method
from qtool.methods.gptq import GPTQ, activation_order
from qtool.numerics.metrics import energies, energy
from qtool.numerics.solving.linalg import inverse_factor, inverse_factors
from qtool.numerics.solving.split import subtract_product, subtract_times, times
from qtool.pipeline import abreast
from qtool.pipeline.requantize import StoredMatrix
from qtool.stats._base import InputStats
from qtool.stats.gram import Gram
from tests.methods.test_refine import gram_of

K = 64


def several(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


class Rounding(GPTQ):
    """Rounds what it is given together, scale by scale."""

    def abreast(self, fmt, k):
        return k == K

    def solve_abreast(self, w, stats, fmt):
        if len(w) != len(stats):
            return None
        rows = w.flatten(0, 1)
        params = fmt.fit(rows)
        return Quantized(fmt.snap(rows, params), params, fmt)


def reader(name, rows, label="int4-g32", method=None, residuals=(), k=K):
    module = SimpleNamespace(name=name, shape=(rows, k))
    fmt = parse_format(label)
    return SimpleNamespace(module=module, format=fmt, method=method or Rounding(), residuals=residuals, fallback=None)


def inputs(*groups):
    """Readers and statistics of some inputs, and their weights."""
    found, weights = [], {}
    for i, plans in enumerate(groups):
        stats = InputStats(plans[0].module.shape[1], frozenset({Gram}))
        stats[Gram].matrix = gram_of(plans[0].module.shape[1], 100 + i)
        found.append((plans, stats))
        weights |= {p.module.name: several(*p.module.shape, seed=len(weights) + j) for j, p in enumerate(plans)}
    return found, weights


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setattr("qtool.pipeline.abreast.origin", lambda *_: StoredMatrix(None, None, None))


def test_each_module_gets_its_own_rows_and_errors():
    some, weights = inputs(*([reader(f"gate{i}", 32), reader(f"up{i}", 96)] for i in range(3)))
    found = abreast.solve_alike(some, None, weights, torch.device("cuda"))
    assert found.keys() == weights.keys()
    for plans, stats in some:
        for p in plans:
            w, gram = weights[p.module.name], stats[Gram].matrix
            params = p.format.fit(w)
            rounded = p.format.decode(p.format.snap(w, params), params)
            quantized, sums = found[p.module.name].quantized, found[p.module.name].sums
            assert torch.equal(quantized.decode(), rounded)
            d, g = (w - rounded).double(), gram.double()
            assert sums.signal == pytest.approx(float(w.double().square().sum()), rel=1e-6)
            assert sums.error == pytest.approx(float(d.square().sum()), rel=1e-6)
            assert sums.output == pytest.approx(float((w.double() @ g * w.double()).sum()), rel=1e-5)
            assert sums.output_error == pytest.approx(float((d @ g * d).sum()), rel=1e-5)
            assert sums.target_error == sums.output_error


def test_what_is_left_to_be_solved_alone():
    lone = reader("lone", 64, "int3-g32")
    odd = [reader(f"odd{i}", 65) for i in range(2)]
    wide = [reader(f"wide{i}", 64, k=2 * K) for i in range(2)]
    unlike = [reader("other", 32), reader("another", 32, "int3-g32")]
    corrected = [reader(f"c{i}", 64, residuals=("low rank",)) for i in range(2)]
    pair = [reader(f"pair{i}", 64) for i in range(2)]
    some, weights = inputs([lone], *([p] for p in odd + wide + corrected + pair), unlike, [reader("absent", 64)])
    weights.pop("absent")
    found = abreast.solve_alike(some, None, weights, torch.device("cuda"))
    assert found.keys() == {"pair0", "pair1"}
    assert abreast.solve_alike(some, None, weights, torch.device("cpu")) == {}


def test_at_most_so_many_at_a_time_and_never_one():
    assert [len(some) for some in abreast.batches(range(33))] == [11, 11, 11]
    assert [len(some) for some in abreast.batches(range(16))] == [16]
    assert list(abreast.batches([1])) == []


def test_what_fails_together_is_left_to_be_solved_alone(monkeypatch):
    some, weights = inputs(*([reader(f"up{i}", 64)] for i in range(2)))
    monkeypatch.setattr(Rounding, "solve_abreast", lambda *_: None)
    assert abreast.solve_batch(some, weights) == {}
    monkeypatch.undo()
    some[1][1][Gram].matrix = torch.full((K, K), 3e38)
    assert abreast.solve_batch(some, weights) == {}


def test_which_formats_are_solved_side_by_side():
    gptq = Method.of("gptq")
    taken = {"int4-g32", "int4-g128", "int3-g64-asym", "int8-g16"}
    left = {"int4-channel", "int4-g256", "int4-g24", "q4_k", "q4_0", "nvfp4", "mxfp4", "fp8-channel", "iq3_xxs"}
    assert {label for label in taken | left if gptq.abreast(parse_format(label), 768)} == taken
    assert not gptq.abreast(parse_format("int4-g128"), 4096)
    assert not GPTQ(fit="before").abreast(parse_format("int4-g32"), 768)


def test_products_of_several_matrices():
    m, n, k, b = 3, 5, 12, 4
    matrix, x, total = several(m, k, b), several(b, m * n), several(k, m * n)
    want = total.clone()
    for i in range(m):
        want[:, i * n : (i + 1) * n] -= matrix[i] @ x[:, i * n : (i + 1) * n]
    subtract_product(total, matrix, x)
    torch.testing.assert_close(total, want)
    rows, left = several(m * n, k), several(m * n, b)
    product = torch.cat([rows[i * n : (i + 1) * n] @ matrix[i] for i in range(m)])
    torch.testing.assert_close(times(rows, matrix), product)
    want = left - product
    subtract_times(left, rows, matrix)
    torch.testing.assert_close(left, want)


def test_factors_and_energies_of_several_matrices():
    grams = torch.stack([gram_of(96, 200 + i) for i in range(3)])
    found = inverse_factors(grams, 0.02)
    for gram, factor in zip(grams, found, strict=True):
        torch.testing.assert_close(factor, inverse_factor(gram, 0.02)[0], rtol=1e-4, atol=1e-6)
    w = several(3, 7, 96)
    assert energies(w, grams).tolist() == pytest.approx(
        [energy(*pair) for pair in zip(w, grams, strict=True)], rel=1e-5
    )
    assert energies(w).tolist() == pytest.approx([energy(each) for each in w], rel=1e-6)
    grams[1] = -torch.eye(96)
    assert inverse_factors(grams, 0.02) is None


def test_orders_of_several_inputs():
    diagonal = several(4, 96).exp()
    for widths in ((), (16,), (4, 8, 32)):
        one_by_one = torch.stack([activation_order(each, widths) for each in diagonal])
        assert torch.equal(activation_order(diagonal, widths), one_by_one)
        assert torch.equal(one_by_one.sort(1).values, torch.arange(96).expand(4, -1))
