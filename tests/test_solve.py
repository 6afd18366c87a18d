"""The benchmark of solvers says how far outputs are off, and what is compared with what."""

from __future__ import annotations

import math

import pytest

from benchmarks import solve
from qtool.methods.gptq import GPTQ


@pytest.mark.parametrize(("label", "most", "least"), [("int4-g128", 26.0, 15.0), ("q6_k", 45.0, 30.0)])
def test_decibels_are_those_of_the_outputs(label, most, least, monkeypatch):
    w, x, reference = solve.problem(6, 256, 512)
    found = []
    original = GPTQ.solve

    def kept(self, *given):
        found.append(original(self, *given))
        return found[-1]

    monkeypatch.setattr(GPTQ, "solve", kept)
    monkeypatch.setattr(solve, "REPEATS", 1)
    seconds, decibels = solve.solved(w, x, reference, label, GPTQ())
    assert len(found) == 2 and seconds > 0
    wrong = x.double() @ (w - found[-1].quantized.decode()).double().T
    signal = float((x.double() @ w.double().T).square().sum())
    assert decibels == pytest.approx(10 * math.log10(signal / float(wrong.square().sum())), abs=0.01)
    assert least < decibels < most


def test_all_are_compared_with_the_first(monkeypatch):
    times = iter((0.5, 1.0, 0.25))
    monkeypatch.setattr(solve, "FAMILIES", {"int4": ("int4-g128",), "others": ("mxfp4", "q4_k")})
    monkeypatch.setattr(solve, "problem", lambda *_: ())
    monkeypatch.setattr(solve, "solved", lambda label, method: (next(times), float(method.rounds)))
    assert [tuple(line) for line in solve.lines()] == [
        ("int4-g128", 0.5, 1.0, 0.0),
        ("mxfp4", 1.0, 2.0, 1.0),
        ("q4_k", 0.25, 0.5, 1.0),
    ]
