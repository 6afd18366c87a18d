"""Inputs rounded per token on the way through a model, against a loop over tokens."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from qtool.calibrate.inputs import quantize_tokens
from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import Layer
from qtool.formats.int import Int
from tests.artifact.conftest import quantize
from tests.calibrate.test_walker import CPU, TOKENS, through_all_blocks

PER_TOKEN = Int(bits=8, group="token", scales="minmax", scale_dtype="fp32")


def rounded_token_by_token(x):
    """8 bits, one scale per token that splits the error of its largest value between both ends of the grid."""
    out = torch.empty_like(x)
    for s in range(x.shape[0]):
        for t in range(x.shape[1]):
            scale = max(abs(v) for v in x[s, t].tolist()) / 127.5
            scale = torch.tensor(scale, dtype=torch.float32)
            for k, v in enumerate(x[s, t]):
                out[s, t, k] = scale * min(max(round(float(v / scale)), -128), 127)
    return out


def test_tokens_are_rounded_one_by_one():
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2)) * torch.tensor([1.0, 50.0])[:, None, None]
    assert_close(quantize_tokens(x, PER_TOKEN), rounded_token_by_token(x), rtol=1e-6, atol=0)
    half = quantize_tokens(x.bfloat16(), PER_TOKEN)
    assert half.dtype == torch.bfloat16
    assert_close(half, rounded_token_by_token(x.bfloat16().float()).bfloat16(), rtol=0, atol=0)


def inputs_in_walk(walker, block, hidden):
    """What the linear layers of block 0 read, after anything that was hooked in before."""
    seen = {}
    hooks = [
        walker.linear(block, m).register_forward_pre_hook(lambda _, x, n=m.name: seen.__setitem__(n, x[0].clone()))
        for m in walker.modules[0]
    ]
    with torch.inference_mode():
        walker.output(block, 0, hidden, slice(0, hidden.samples))
    for hook in hooks:
        hook.remove()
    return seen


def test_inputs_are_rounded_where_asked_and_while_asked(llama):
    block, hidden = llama.load_block(0), llama.embed(TOKENS[:2, :16])
    plain = inputs_in_walk(llama, block, hidden)
    name = "model.layers.0.self_attn.v_proj"
    layers = dict.fromkeys((name, "model.layers.1.mlp.up_proj"), Layer(PER_TOKEN, PER_TOKEN))
    with llama.quantized_inputs(block, 0, layers):
        rounded = inputs_in_walk(llama, block, hidden)
    assert_close(rounded[name], rounded_token_by_token(plain[name]), rtol=1e-6, atol=0)
    for untouched in ("self_attn.q_proj", "self_attn.k_proj"):  # of the same input
        assert torch.equal(rounded[f"model.layers.0.{untouched}"], plain[f"model.layers.0.{untouched}"])
    assert not torch.equal(rounded["model.layers.0.mlp.up_proj"], plain["model.layers.0.mlp.up_proj"])
    after = inputs_in_walk(llama, block, hidden)
    assert all(torch.equal(after[n], plain[n]) for n in plain)


def test_declared_inputs_are_rounded_on_the_way_and_before_the_head(tiny_checkpoint):
    folder = tiny_checkpoint("llama")
    weights = Int(bits=8, group="channel")
    declared = quantize(folder, weights, PER_TOKEN, head=weights, q=None)
    plain = quantize(folder, weights, None, head=weights, q=None)
    walkers = [Walker(checkpoint, CPU, torch.float32) for checkpoint in (declared, plain)]
    hidden, want = (walker.embed(TOKENS) for walker in walkers)
    layers = dict.fromkeys(declared.layers, Layer(weights, PER_TOKEN))
    assert len(layers) == 2 * 6 + 1
    for i in range(2):
        walkers[0].advance(walkers[0].load_block(i), i, hidden)
        block = walkers[1].load_block(i)
        with walkers[1].quantized_inputs(block, i, layers):
            walkers[1].advance(block, i, want)
    assert torch.equal(hidden.values, want.values)
    assert not torch.equal(hidden.values, through_all_blocks(walkers[1], TOKENS).values)
    with torch.inference_mode():
        normed = walkers[1].load_norm()(want[1:2])
    logits = rounded_token_by_token(normed)[0].double() @ declared.tensor("lm_head.weight").double().T
    assert_close(walkers[0].logits(hidden, 1).double(), logits, rtol=1e-4, atol=1e-4)
    assert float((walkers[1].logits(hidden, 1) - logits).abs().max()) > 1e-2
