"""Readers of an input that are solved as one matrix, against each alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qtool.errors import NumericsError
from qtool.formats._base import Quantized
from qtool.formats._spelling import parse_format
from qtool.methods.gptq import GPTQ
from qtool.numerics.metrics import energy
from qtool.pipeline import abreast, stacked
from qtool.pipeline.requantize import StoredMatrix
from qtool.stats.drift import Drift
from qtool.stats.gram import Gram
from tests.pipeline.test_abreast import inputs, reader, several

PLAIN = StoredMatrix(None, None, None)


class Source:
    """Some weights."""

    def __init__(self, weights):
        self.weights = weights

    def tensor(self, name):
        return self.weights[name.removesuffix(".weight")].bfloat16()


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setattr(abreast, "origin", lambda *_: PLAIN)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("label", ["int4-g32", "mxfp4", "q4_0"])
def test_codes_are_those_of_each_module_alone(label, threads, monkeypatch):
    monkeypatch.setattr(
        stacked, "row_shares", lambda n: [(n * t // threads, n * (t + 1) // threads) for t in range(threads)]
    )
    method, fmt = GPTQ(drift=0.0), parse_format(label)
    plans = [reader(name, rows, label, method) for name, rows in (("q", 50), ("k", 7), ("v", 20))]
    some, weights = inputs(plans)
    found = stacked.solve_stacked(some, Source(weights))
    assert list(found) == ["q", "k", "v"]
    stats = some[0][1]
    gram = stats[Gram].matrix.double()
    for name, rows in found.items():
        w = weights[name].bfloat16().float()
        alone = method.solve(w, stats, fmt).quantized
        assert torch.equal(rows.quantized.codes, alone.codes)
        assert rows.quantized.params.keys() == alone.params.keys()
        assert all(torch.equal(rows.quantized.params[p], t) for p, t in alone.params.items())
        error = (w - alone.decode()).double()
        assert rows.sums.signal == pytest.approx(float(w.double().square().sum()), rel=1e-5)
        assert rows.sums.output_error == pytest.approx(float((error @ gram * error).sum()), rel=1e-4)
        assert rows.sums.output == pytest.approx(energy(w, gram.float()), rel=1e-5)
        assert rows.sums.target_error == rows.sums.output_error
        assert (rows.method, set(rows.remarks), rows.corrections) == ("gptq", {None}, ())


def test_errors_are_also_those_to_what_was_aimed_at():
    plans = [reader(name, rows, method=GPTQ(drift=1.0)) for name, rows in (("q", 6), ("k", 3))]
    some, weights = inputs(plans)
    stats = some[0][1]
    stats._found[Drift] = SimpleNamespace(pair=(several(1, 64, 64)[0], stats[Gram].matrix))
    found = stacked.solve_stacked(some, Source(weights))
    for name, rows in found.items():
        solution = plans[0].method.solve(weights[name].bfloat16().float(), stats, plans[0].format)
        wanted = energy(solution.target - solution.quantized.decode(), stats[Gram].matrix)
        assert rows.sums.target_error == pytest.approx(wanted, rel=1e-4) != pytest.approx(rows.sums.output_error)


def test_who_is_solved_alone(monkeypatch):
    pair = [reader(f"pair{i}", 8) for i in range(2)]
    unlike = [reader("other", 8), reader("another", 8, "int3-g32")]
    apart = [reader("one", 8), reader("two", 8, method=GPTQ(damp=0.5))]
    corrected = [reader(f"c{i}", 8, residuals=("low rank",)) for i in range(2)]
    merged = [reader(f"n{i}", 8, "nvfp4") for i in range(2)]
    some, weights = inputs(pair, unlike, apart, corrected, merged, [reader("lone", 8)])
    assert stacked.solve_stacked(some, Source(weights)).keys() == {"pair0", "pair1"}
    monkeypatch.setattr(stacked, "MOST", 2 * 8 * 64 - 1)
    assert stacked.solve_stacked(some, Source(weights)) == {}
    monkeypatch.undo()
    monkeypatch.setattr(abreast, "origin", lambda _, name, __: StoredMatrix(None, None, "again" * (name == "pair1")))
    assert stacked.solve_stacked(some[:1], Source(weights)) == {}


def test_what_is_not_finite_is_named(monkeypatch):
    some, weights = inputs([reader(f"m{i}", 4, "q4_0") for i in range(2)])
    weights["m1"][2, 5] = 1e6
    with pytest.raises(NumericsError, match="m0, m1: q4_0 stores scales in fp16"):
        stacked.solve_stacked(some, Source(weights))
    weights["m1"][2, 5], decode = 1.0, Quantized.decode
    monkeypatch.setattr(stacked, "row_shares", lambda n: [(0, n)])
    monkeypatch.setattr(Quantized, "decode", lambda self: decode(self).index_fill(0, torch.tensor(6), torch.inf))
    with pytest.raises(NumericsError, match="made m1 infinite or NaN in q4_0"):
        stacked.solve_stacked(some, Source(weights))
