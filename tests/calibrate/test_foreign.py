"""What is handed to transformers' code has its effect, or is an error that names the release."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from torch import nn

from qtool.calibrate import meta
from qtool.calibrate.attention import attention_errors
from qtool.calibrate.cache import MeteredCache, RoundedCache
from qtool.calibrate.foreign import assign, cache_argument, run_block
from qtool.calibrate.reference import Reference
from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import Layer
from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import QtoolError
from qtool.recipe.cache import parse_cache
from qtool.recipe.load import load_recipe
from qtool.stats.channels import Channels
from tests.conftest import TINY

TOKENS = torch.randint(512, (3, 16), generator=torch.Generator().manual_seed(1))
INT3 = parse_cache("int3-token")


def told(what: str) -> str:
    """A pattern for an error about the release at hand."""
    return re.escape(f"transformers {transformers.__version__} does not work with this qtool: ") + what


def wrapped(block: nn.Module, forward) -> nn.Module:
    """The block, whose class's forward is another one."""
    block.__class__ = type(type(block).__name__, (type(block),), {"forward": forward(type(block).forward)})
    return block


@pytest.mark.parametrize("name", TINY)
def test_keys_and_values_of_every_family_are_rounded(name, tiny_checkpoint):
    walker = Walker(HFCheckpoint(tiny_checkpoint(name)), torch.device("cpu"), torch.float32)
    hidden, block = walker.embed(TOKENS), walker.load_block(0)
    exact, rounded = (walker.output(block, 0, hidden, slice(0, 3), c) for c in (None, RoundedCache(INT3, ((), ()))))
    assert float((exact - rounded).norm() / (exact - hidden[slice(0, 3)]).norm()) > 0.01


@pytest.mark.parametrize("argument", ["cache", "past_key_values"])
def test_the_argument_is_the_one_that_a_block_takes(argument):
    class Block(nn.Module):
        exec(f"def forward(self, x, mask=None, {argument}=None, **others): return {argument}.update(x, x)[0]")

    assert cache_argument(Block) == argument
    x = torch.randn(1, 2, 8, 16)
    found = run_block(Block(), x, {"cache": None, "past_key_values": None}, RoundedCache(INT3, ((), ())))
    assert len(found[0, 0, 0].unique()) <= 8


def test_a_block_that_knows_no_cache(llama):
    block = wrapped(llama.load_block(0), lambda forward: lambda self, x, **others: x)
    with pytest.raises(QtoolError, match=told("LlamaDecoderLayer takes no cache by any of the names cache")):
        llama.output(block, 0, llama.embed(TOKENS), slice(0, 3), RoundedCache(INT3, ((), ())))


def test_a_block_that_drops_its_cache(llama):
    block = wrapped(
        llama.load_block(0),
        lambda forward: lambda self, x, cache=None, past_key_values=None, **others: forward(self, x, **others),
    )
    hidden = llama.embed(TOKENS)
    pattern = told("LlamaDecoderLayer updated its KV cache 0 times instead of once")
    with pytest.raises(QtoolError, match=pattern):
        list(llama.steps(block, 0, hidden, {}, cache=MeteredCache(INT3)))
    with pytest.raises(QtoolError, match=pattern):
        attention_errors(llama, block, 0, hidden, RoundedCache(INT3, ((), ())))


def without_mlp(forward):
    """A block that leaves its MLP out."""
    return lambda self, x, **others: x + self.self_attn(hidden_states=self.input_layernorm(x), **others)[0]


def test_a_block_that_leaves_layers_out(llama, tmp_path):
    block = wrapped(llama.load_block(0), without_mlp)
    with pytest.raises(QtoolError, match=told("LlamaDecoderLayer showed model.layers.0.mlp.gate_proj 0 tokens")):
        llama.collect(block, 0, llama.embed(TOKENS), frozenset({Channels}))
    reference = Reference(llama, TOKENS)
    reference.begin(0, [m for m in llama.modules[0] if m.role in ("q", "gate")])
    wrapped(reference.block, without_mlp)
    with pytest.raises(QtoolError, match=told("LlamaDecoderLayer did not run what reads model.layers.0.mlp_in")):
        reference.run(slice(0, 1))


@pytest.mark.parametrize(
    ("forward", "times", "what"),
    [
        (without_mlp, None, r"mlp.\w+ 0 times instead of at least once"),
        (lambda forward: forward, 2, "self_attn.q_proj 1 times instead of 2"),
    ],
)
def test_inputs_that_are_not_rounded(forward, times, what, llama, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text('recipe: 1\nname: n\nlayers: [{match: "*", weights: int8-channel, activations: int8-token}]\n')
    rule = load_recipe(str(path)).layers[0]
    layers = {m.name: Layer(rule.weights, rule.activations) for m in llama.modules[0]}
    block = wrapped(llama.load_block(0), forward)
    with (
        pytest.raises(QtoolError, match=told(f"LlamaDecoderLayer ran model.layers.0.{what}")),
        llama.quantized_inputs(block, 0, layers, times),
    ):
        llama.output(block, 0, llama.embed(TOKENS), slice(0, 3))


def test_a_block_that_gives_something_else(llama):
    block = wrapped(llama.load_block(0), lambda forward: lambda self, x, **others: forward(self, x, **others)[:, :1])
    with pytest.raises(QtoolError, match=told(r"LlamaDecoderLayer made \[3, 1, 64\] of hidden states \[3, 16, 64\]")):
        llama.output(block, 0, llama.embed(TOKENS), slice(0, 3))


def test_a_model_that_calls_its_blocks_otherwise(llama, monkeypatch):
    body = type(llama.model.model)
    monkeypatch.setattr(body, "forward", lambda self, inputs_embeds, **_: self.layers[0](inputs_embeds, None))
    with pytest.raises(QtoolError, match=told("Recorder in place of LlamaDecoderLayer was called 0 times")):
        llama.block_arguments(4)


def test_arguments_by_position_are_recorded_by_name():
    class Block(nn.Module):
        def forward(self, x, attention_mask=None, position_ids=None, **others):
            return x

    recorder = meta.Recorder(Block())
    recorder(torch.zeros(1), "mask", "ids", more=1)
    assert recorder.recorded() == {"attention_mask": "mask", "position_ids": "ids", "more": 1}


@pytest.mark.parametrize(
    ("state", "what"),
    [
        ({"weight": torch.zeros(2, 3)}, r"Linear lacks weights \(bias\)"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "scale": torch.zeros(1)}, "wants none of scale"),
        ({"weight": torch.zeros(3, 3), "bias": torch.zeros(2)}, "Linear refuses its weights"),
    ],
)
def test_weights_that_do_not_fit(state, what):
    with pytest.raises(QtoolError, match=told(f".*{what}")):
        assign(nn.Linear(3, 2, device="meta"), state)
