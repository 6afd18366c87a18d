"""A block run with other weights: values of the walk, gradients against differences, inputs rounded all the same."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from qtool.calibrate.copies import twin
from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import Layer
from qtool.checkpoint.hf import HFCheckpoint
from qtool.formats._spelling import parse_format

CPU = torch.device("cpu")
TOKENS = torch.randint(500, (3, 24), generator=torch.Generator().manual_seed(1))
FAMILIES = ("llama-biased", "gemma2", "gemma3_text", "phi3", "qwen3", "qwen3_moe", "gpt_oss", "mixtral")


def others(walker, i=0):
    """Other weights for all linear layers of a block."""
    generator = torch.Generator().manual_seed(3)
    return {m.name: torch.randn(m.shape, generator=generator) * 0.1 for m in walker.modules[i] if m.kind == "linear"}


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_the_block(name, tiny_checkpoint):
    walker = Walker(HFCheckpoint(tiny_checkpoint(name)), CPU, torch.float64)
    x, block = walker.embed(TOKENS)[slice(0, 2)], walker.load_block(0)
    before = {n: p.clone() for n, p in block.named_parameters()}
    mixture = any(m.expert is not None for m in walker.modules[0])  # where another expert may be chosen for a token
    moves = [m.name for m in walker.modules[0] if m.kind == "linear" and (m.expert is not None or not mixture)]
    weights = {n: w.double().requires_grad_(n in moves) for n, w in others(walker).items()}
    generator = torch.Generator().manual_seed(4)
    towards = {n: torch.randn(w.shape, generator=generator, dtype=w.dtype) * (n in moves) for n, w in weights.items()}
    probe = torch.randn(x.shape, generator=generator, dtype=x.dtype)

    def value(step):
        moved = {n: w + step * towards[n] for n, w in weights.items()}
        return (walker.differentiable(block, 0, x, moved, {}) * probe).sum()

    grads = torch.autograd.grad(value(0.0), [weights[n] for n in moves], allow_unused=True)
    slope = sum(float((g * towards[n]).sum()) for g, n in zip(grads, moves, strict=True) if g is not None)
    numeric = float((value(1e-3) - value(-1e-3)).detach()) / 2e-3  # norms compute in float32
    assert slope == pytest.approx(numeric, rel=5e-3)
    assert abs(slope) > 1e-3
    assert all(torch.equal(p, before[n]) for n, p in block.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inputs", [None, "int8-token"])
def test_values_are_those_of_the_walk_behind_replaced_weights(inputs, dtype, tiny_checkpoint):
    walker = Walker(HFCheckpoint(tiny_checkpoint("llama-biased")), CPU, dtype)
    weights, block, hidden = others(walker), walker.load_block(0), walker.embed(TOKENS)
    activations = inputs and parse_format(inputs)
    layers = {n: Layer(parse_format("int8-channel"), activations) for n in weights} if inputs else {}
    with torch.no_grad():
        found = walker.differentiable(block, 0, hidden[torch.tensor([2, 0])], weights, layers)
    learned = {n: w.clone().requires_grad_() for n, w in weights.items()}
    output = walker.differentiable(block, 0, hidden[torch.tensor([2, 0])], learned, layers)
    grads = torch.autograd.grad(output.float().square().sum(), list(learned.values()))
    assert all(float(g.abs().sum()) > 0 for g in grads)
    for module in walker.modules[0]:
        walker.set_weight(block, module, weights[module.name])
    walker.advance(block, 0, hidden, layers)
    size = float(hidden.values.float().std())
    assert torch.equal(found, hidden[torch.tensor([2, 0])]) or dtype == torch.bfloat16
    for each in (found, output):
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        assert_close(each.float(), hidden[torch.tensor([2, 0])].float(), rtol=0, atol=tolerance * size)
    if inputs:
        with torch.no_grad():
            unrounded = walker.differentiable(block, 0, walker.embed(TOKENS)[slice(0, 1)], weights, {})
        assert not torch.equal(unrounded[0], found[1])


def test_norms_are_replaced_by_name(tiny_checkpoint):
    walker = Walker(HFCheckpoint(tiny_checkpoint("llama-biased")), CPU, torch.float32)
    block, x = walker.load_block(1), torch.randn(1, 24, 64)
    norm = (2 * walker.tensor("model.layers.1.input_layernorm.weight")).requires_grad_()
    output = walker.differentiable(block, 1, x, {"model.layers.1.input_layernorm": norm}, {})
    block.get_submodule("input_layernorm").weight.data *= 2
    with torch.no_grad():
        assert_close(output, walker.differentiable(block, 1, x, {}, {}))
    assert float(torch.autograd.grad(output.sum(), norm)[0].abs().sum()) > 0


def test_a_twin_has_hooks_and_weights_of_its_own():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Sequential(torch.nn.Linear(2, 2)))
    other = twin(module)
    other[1][0].register_forward_pre_hook(lambda *_: pytest.fail("called"))
    del other[0]._parameters["weight"]
    other[0].weight = torch.zeros(2, 2)
    assert other[1][0].weight is module[1][0].weight
    assert float(module[0].weight.detach().abs().sum()) > 0
    module(torch.zeros(1, 2))
