"""Matrices that are trained as one end in what each alone ends in."""

from __future__ import annotations

import pytest
import torch

from qtool.formats._spelling import parse_format
from qtool.methods import _joined
from qtool.methods._base import Solution
from qtool.methods._joined import joined
from qtool.methods._optimizers import optimizer
from qtool.methods.learned import WAYS
from qtool.methods.rtn import RTN

SHAPES = {"q": (24, 256), "k": (8, 256), "down": (24, 512), "up": (16, 256)}


def matrices(labels):
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    found = {}
    for name, w in weights.items():
        fmt = parse_format(labels.get(name, labels[""])).with_largest(float(w.abs().max()))
        found[name] = Solution(RTN().solve(w, None, fmt).quantized)
    return weights, found


def trained(several, inputs, wanted):
    """Codes, values and first gradients after some steps, by module."""
    leaves = [leaf for one in several for leaf in one.relaxed.leaves()]
    step = optimizer("sign", [(leaf, 0.05 if decides else 0.01) for leaf, decides in leaves])
    for i in range(4):
        weights = {name: w for one in several for name, w in one.weights(i / 4).items()}
        sum((inputs[n] @ w.T - wanted[n]).square().sum() for n, w in weights.items()).backward()
        step(1.0)
    return {name: quantized for one in several for name, quantized in one.solutions().items()}


@pytest.mark.parametrize("way", ["steps", "weights", "divide", "none"])
@pytest.mark.parametrize(
    ("labels", "groups"),
    [
        ({"": "int3-g64"}, [["q", "k", "up"], ["down"]]),
        ({"": "q4_k", "up": "q6_k"}, [["q", "k"], ["down"], ["up"]]),
        ({"": "int4-tensor"}, [["q"], ["k"], ["down"], ["up"]]),
        ({"": "nvfp4"}, [["q", "k", "up"], ["down"]]),
    ],
)
def test_each_as_if_alone(labels, groups, way, monkeypatch):
    weights, found = matrices(labels)
    inputs = {name: torch.randn(32, w.shape[1]) for name, w in weights.items()}
    wanted = {name: inputs[name] @ w.T for name, w in weights.items()}
    results = []
    for small in (_joined.SMALL, 0):
        monkeypatch.setattr(_joined, "SMALL", small)
        several = joined(WAYS[way], weights, found, True, torch.Generator().manual_seed(0))
        names = [list(one.starts) for one in several]
        assert sorted(names) == sorted(groups if small else [[name] for name in SHAPES])
        results.append(trained(several, inputs, wanted))
    together, alone = results
    moved = 0
    for name, start in found.items():
        assert torch.equal(together[name].codes, alone[name].codes)
        assert torch.equal(together[name].decode(), alone[name].decode())
        assert together[name].format == start.quantized.format
        moved += int((alone[name].decode() != start.quantized.decode()).sum())
    assert moved


@pytest.mark.parametrize("way", ["low-rank", "sigmoid"])
def test_ways_that_know_the_whole_matrix_stay_alone(way):
    weights, found = matrices({"": "int3-g64"})
    assert len(joined(WAYS[way], weights, found, True, torch.Generator())) == len(SHAPES)


def test_large_matrices_stay_alone(monkeypatch):
    monkeypatch.setattr(_joined, "SMALL", 20 * 256)
    weights, found = matrices({"": "int3-g64"})
    several = joined(WAYS["steps"], weights, found, True, torch.Generator())
    assert [list(one.starts) for one in several] == [["q"], ["k", "up"], ["down"]]
