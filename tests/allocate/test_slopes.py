"""Squared gradients of the loss, gathered block by block, against those of the whole model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from qtool.allocate.slopes import POSITIONS, Slopes
from qtool.calibrate.walker import Walker
from qtool.checkpoint.hf import HFCheckpoint

TOKENS = torch.randint(3, 500, (3, 96), generator=torch.Generator().manual_seed(4))


def whole(folder, cap):
    """Per linear layer (inputs, squared gradients of its outputs), and squares at the embedding, sample by sample."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    seen, at_embedding = {}, []

    def note(place, inputs, output):
        output.retain_grad()
        place.append((inputs[0], output))

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, x, y, name=name: note(seen.setdefault(name, []), x, y))
    model.model.embed_tokens.register_forward_hook(lambda _, x, y: note(at_embedding, x, y))
    draw = torch.Generator().manual_seed(11)
    for row in TOKENS:
        logits = model(row[None], use_cache=False).logits[0]
        targets = [torch.multinomial(p.softmax(1), 1, generator=draw) for p in logits.detach().split(POSITIONS)]
        torch.nn.functional.cross_entropy(logits, torch.cat(targets)[:, 0], reduction="sum").backward()
    inputs = {name: torch.cat([x.detach().flatten(0, -2) for x, _ in calls]) for name, calls in seen.items()}
    squares = {name: torch.cat([y.grad.flatten(0, -2).square() for _, y in calls]) for name, calls in seen.items()}
    return {name: (inputs[name], squares[name]) for name in seen}, torch.cat([y.grad.square() for _, y in at_embedding])


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2", "phi3"])
def test_gradients_are_those_of_the_whole_model(family, tiny_checkpoint):
    folder = tiny_checkpoint(family)
    checkpoint = HFCheckpoint(folder)
    walker = Walker(checkpoint, torch.device("cpu"), torch.float32)
    slopes = Slopes(walker, TOKENS, seed=11)
    wanted, embedded = whole(folder, checkpoint.family.logit_softcap(checkpoint.config))
    blocks = dict(slopes.blocks())
    assert list(blocks) == sorted(blocks, reverse=True)
    found = {name: seen for block in blocks.values() for name, seen in block.items()}
    assert found.keys() == wanted.keys() - {"lm_head"}
    for name, seen in found.items():
        x, squares = wanted[name]
        torch.testing.assert_close(seen.x, x, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(seen.squares, squares, rtol=5e-3, atol=1e-3 * float(squares.mean()))
    torch.testing.assert_close(slopes.embedded, embedded, rtol=5e-3, atol=1e-3 * float(embedded.mean()))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_squares_at_the_output_layer_are_expected_ones(family, tiny_checkpoint):
    checkpoint = HFCheckpoint(tiny_checkpoint(family))
    slopes = Slopes(Walker(checkpoint, torch.device("cpu"), torch.float32), TOKENS[:1, :20], seed=0)
    list(slopes.blocks())
    seen = slopes.head.seen(torch.arange(100, 140))
    name = "model.embed_tokens.weight" if checkpoint.tied else "lm_head.weight"
    raw = (seen.x @ checkpoint.tensor(name).float().T).double().requires_grad_()
    cap = checkpoint.family.logit_softcap(checkpoint.config)
    log_p = torch.log_softmax(raw if cap is None else cap * torch.tanh(raw / cap), 1)
    everything = slopes.head.seen(torch.arange(raw.shape[1]))
    felt = (everything.x.double().square().sum(1)[:, None] * everything.squares.double()).sum(0)
    torch.testing.assert_close(slopes.head.care.double(), felt, rtol=1e-4, atol=1e-9)
    for t in (0, 7, 19):
        expected = torch.zeros(40, dtype=torch.float64)
        for y in range(raw.shape[1]):
            (slope,) = torch.autograd.grad(log_p[t, y], raw, retain_graph=True)
            expected += log_p[t, y].exp().detach() * slope[t, 100:140].square()
        torch.testing.assert_close(seen.squares[t].double(), expected, rtol=1e-3, atol=1e-9)
