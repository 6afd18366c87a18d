"""Steps that are recorded leave the gradients of steps that are run."""

from __future__ import annotations

from functools import partial

import torch

from qtool.methods import _repeated
from qtool.methods._repeated import Repeated, recorded


class Recorder:
    """Stands in for a device: what it recorded always reads and writes the memory that it read and wrote first."""

    def __init__(self):
        self.replayed = 0

    def __call__(self, run, leaves, device):
        run()
        written = [leaf.grad for leaf in leaves]

        def replay():
            self.replayed += 1
            for leaf in leaves:
                leaf.grad = None
            run()
            for memory, leaf in zip(written, leaves, strict=True):
                memory.copy_(leaf.grad)

        return replay


def descend(repeated, leaves, batches):
    for batch in batches:
        repeated(*batch)
        with torch.no_grad():
            for leaf in leaves:
                leaf -= 0.1 * leaf.grad.sign_()  # as optimizers do, in the gradient's own memory
                leaf.grad = None
    return [leaf.detach().clone() for leaf in leaves]


def test_gradients_are_those_of_each_steps_inputs(monkeypatch):
    torch.manual_seed(0)
    batches = [(torch.randn(5, 3), torch.randn(5, 2)) for _ in range(6)]
    batches.insert(4, (torch.randn(2, 3), torch.randn(2, 2)))  # not what was recorded
    kept = [(x.clone(), y.clone()) for x, y in batches]
    found, device = [], Recorder()
    monkeypatch.setattr(_repeated, "recorded", device)
    for record in (False, True):
        leaves = [torch.ones(2, 3).requires_grad_(), torch.zeros(2).requires_grad_()]

        def run(x, y, leaves=leaves):
            (x @ leaves[0].T + leaves[1] - y).square().sum().backward()

        found.append(descend(partial(Repeated(leaves, record), run), leaves, batches))
    assert device.replayed == 6
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    changed = [not torch.equal(a, b) for pair in zip(batches, kept, strict=True) for a, b in zip(*pair, strict=True)]
    assert not any(changed)


def test_the_processor_records_nothing():
    assert recorded(lambda: 1 / 0, [], torch.device("cpu")) is None
