"""The walk, block by block, against transformers' own forward pass over the whole model."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch.testing import assert_close

from qtool.calibrate import blocks as blocks_module
from qtool.calibrate import hidden as hidden_module
from qtool.calibrate import reference as reference_module
from qtool.calibrate import walker as walker_module
from qtool.calibrate.meta import build_on_meta, quiet
from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import Module
from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import CheckpointError
from qtool.stats.channels import Channels
from qtool.stats.drift import Drift
from qtool.stats.gram import Gram
from tests.calibrate.conftest import load_reference
from tests.conftest import TINY

CPU = torch.device("cpu")
TOKENS = torch.randint(512, (3, 40), generator=torch.Generator().manual_seed(1))
ALL = frozenset({Gram, Channels})


@pytest.fixture(params=[*TINY, "mistral-sliding"])
def folder(request, tiny_checkpoint, sliding):
    return sliding if request.param == "mistral-sliding" else tiny_checkpoint(request.param)


def inputs_and_logits(model, tokens):
    """What every linear layer reads, float64 [S * T, K] by name, and the logits."""
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, x, name=name: seen.__setitem__(name, x[0].flatten(0, -2).double())
            )
    with torch.no_grad():
        logits = model(tokens).logits
    return seen, logits


def through_all_blocks(walker, tokens):
    hidden = walker.embed(tokens)
    for i in range(len(walker.blocks)):
        walker.advance(walker.load_block(i), i, hidden)
    return hidden


def all_logits(walker, tokens):
    hidden = through_all_blocks(walker, tokens)
    return torch.stack([walker.logits(hidden, s) for s in range(len(tokens))])


@pytest.mark.parametrize("batch", [1, 80, 4096], ids="{} tokens a pass".format)
def test_logits_are_those_of_transformers(batch, folder, monkeypatch):
    monkeypatch.setattr(blocks_module, "BATCH_TOKENS", batch)
    walker = Walker(HFCheckpoint(folder), CPU, torch.float32)
    for tokens in (TOKENS, TOKENS[:, :17]):  # recorded arguments depend on the length
        _, want = inputs_and_logits(load_reference(folder), tokens)
        found = all_logits(walker, tokens)
        assert found.dtype == torch.float32
        assert_close(found, want, rtol=1e-4, atol=1e-4 * float(want.std()))


def test_the_window_of_attention_matters_here(sliding, tmp_path):
    """Guards the case above: without its window, the sliding model computes something else."""
    walker = Walker(HFCheckpoint(sliding), CPU, torch.float32)
    narrow = all_logits(walker, TOKENS)
    config = json.loads((sliding / "config.json").read_text()) | {"sliding_window": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").hardlink_to(sliding / "model.safetensors")
    wide = all_logits(Walker(HFCheckpoint(tmp_path), CPU, torch.float32), TOKENS)
    assert_close(narrow[:, :8], wide[:, :8], rtol=1e-4, atol=1e-4)
    assert (narrow - wide)[:, 8:].std() > 0.05 * wide.std()


def test_logits_from_a_position_on(llama):
    hidden = through_all_blocks(llama, TOKENS)
    assert torch.equal(llama.logits(hidden, 1, 25), llama.logits(hidden, 1)[25:])


def test_bfloat16_walks_end_in_a_float32_product(tiny_checkpoint, monkeypatch):
    folder = tiny_checkpoint("llama")
    monkeypatch.setattr(walker_module, "TABLE_VALUES", 64 * 100)  # 512 rows: five parts and a rest
    walker = Walker(HFCheckpoint(folder), CPU, torch.bfloat16)
    hidden = through_all_blocks(walker, TOKENS)
    assert hidden.values.dtype == torch.bfloat16
    model = load_reference(folder, torch.bfloat16)
    with torch.no_grad():
        normed = model.model.norm(hidden[2:3][0]).double()
    found = walker.logits(hidden, 2)
    want = normed @ model.lm_head.weight.detach().double().T
    assert_close(found.double(), want, rtol=1e-5, atol=1e-5)
    assert float((want.bfloat16().double() - want).abs().max()) > 1e-3


def test_bfloat16_walks_are_as_close_as_transformers(folder):
    _, want = inputs_and_logits(load_reference(folder), TOKENS)
    _, theirs = inputs_and_logits(load_reference(folder, torch.bfloat16), TOKENS)
    found = all_logits(Walker(HFCheckpoint(folder), CPU, torch.bfloat16), TOKENS)
    # the median, because a token whose expert changes by rounding is far off
    error, their_error = ((x - want).square().mean(-1).flatten().median().sqrt() for x in (found, theirs.float()))
    assert 0 < error < 1.2 * their_error


def assert_measured(stats, x):
    """Every statistic of inputs x, float64 [tokens, K], by plain sums."""
    size = float(x.abs().max())
    assert stats.tokens == len(x) == TOKENS.numel()
    gram = torch.stack([(x * column[:, None]).sum(0) for column in x.T])
    assert_close(stats[Gram].matrix.double(), gram, rtol=1e-4, atol=1e-4 * len(x) * float(x.square().mean()))
    assert_close(stats[Channels].sum_squares.double(), x.square().sum(0), rtol=1e-4, atol=1e-6)
    assert_close(stats[Channels].low.double(), x.min(0).values, rtol=1e-4, atol=1e-5 * size)
    assert_close(stats[Channels].high.double(), x.max(0).values, rtol=1e-4, atol=1e-5 * size)


def test_statistics_are_those_of_hooks_on_transformers(folder, monkeypatch):
    monkeypatch.setattr(blocks_module, "BATCH_TOKENS", 80)  # two samples, then one
    walker = Walker(HFCheckpoint(folder), CPU, torch.float32)
    seen, _ = inputs_and_logits(load_reference(folder), TOKENS)
    hidden, names = walker.embed(TOKENS), set()
    for i in range(len(walker.blocks)):
        stats = walker.collect(walker.load_block(i), i, hidden, ALL)
        assert len(stats) == 4
        for module in walker.modules[i]:
            assert_measured(stats[module.reads], seen[module.name])
            names.add(module.name)
    assert_measured(walker.collect_head(hidden, ALL), seen["lm_head"])
    assert names | {"lm_head"} == set(seen)


def test_only_what_is_needed_is_measured(llama):
    compact = llama.collect(llama.load_block(0), 0, llama.embed(TOKENS), frozenset({Channels}))
    whole = llama.collect(llama.load_block(0), 0, llama.embed(TOKENS), ALL)
    for reads, stats in compact.items():
        assert Gram not in stats
        assert_close(stats[Channels].sum_squares, whole[reads][Channels].sum_squares, rtol=1e-5, atol=1e-5)


def test_collecting_runs_the_block_once_and_cleans_up(llama):
    hidden, advanced = llama.embed(TOKENS), llama.embed(TOKENS)
    before, block = hidden.values.clone(), llama.load_block(0)
    llama.collect(block, 0, hidden, ALL)
    llama.advance(llama.load_block(0), 0, advanced)
    assert torch.equal(hidden.values, advanced.values)
    assert not torch.equal(hidden.values, before)
    assert not any(module._forward_pre_hooks for module in block.modules())


def replaced(module):
    """Some other weight for a layer."""
    return torch.randn(module.shape, generator=torch.Generator().manual_seed(sum(module.shape))) * 0.1


@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_drift_is_measured_against_the_unquantized_model(limit, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(blocks_module, "BATCH_TOKENS", 80)  # two samples, then one
    monkeypatch.setattr(hidden_module, "MEMORY_LIMIT", limit)
    monkeypatch.setattr(reference_module, "SHARE", 0.3)  # of three samples: the first
    folder = tiny_checkpoint("llama-biased")
    walker, model = Walker(HFCheckpoint(folder), CPU, torch.float32), load_reference(folder)
    original, _ = inputs_and_logits(load_reference(folder), TOKENS)
    hidden, reference = walker.embed(TOKENS), reference_module.Reference(walker, TOKENS)
    first = TOKENS.shape[1]
    for i in range(2):
        block = walker.load_block(i)
        wanted = dict.fromkeys((m.reads for m in walker.modules[i]), frozenset({Gram, Drift}))
        for ((reads, stats),) in map(dict.items, walker.steps(block, i, hidden, wanted, reference)):
            here = [m for m in walker.modules[i] if m.reads == reads]
            seen, _ = inputs_and_logits(model, TOKENS)
            x, x_0 = seen[here[0].name][:first], original[here[0].name][:first]
            drift, gram = stats[Drift].pair
            size = float(x.square().mean()) * first
            assert_close(drift.double(), (x_0 - x).T @ x, rtol=1e-3, atol=1e-4 * size)
            assert_close(gram.double(), x.T @ x, rtol=1e-3, atol=1e-4 * size)
            assert stats.tokens == TOKENS.numel()
            for module in here:
                walker.set_weight(block, module, replaced(module))
                model.get_submodule(module.name).weight.data = replaced(module)


@pytest.mark.parametrize("limit", [1 << 30, 0])
def test_an_input_is_measured_behind_the_weights_replaced_before_it(limit, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(blocks_module, "BATCH_TOKENS", 80)  # two samples, then one
    monkeypatch.setattr(hidden_module, "MEMORY_LIMIT", limit)  # 0: waiting batches start anew
    folder = tiny_checkpoint("llama-biased")
    walker, model = Walker(HFCheckpoint(folder), CPU, torch.float32), load_reference(folder)
    hidden, block, order = walker.embed(TOKENS), walker.load_block(0), []
    wanted = dict.fromkeys(("model.layers.0.attn_in", "model.layers.0.mlp_in", "model.layers.0.mlp_mid"), ALL)
    for ((reads, stats),) in map(dict.items, walker.steps(block, 0, hidden, wanted)):
        order.append(reads)
        here = [m for m in walker.modules[0] if m.reads == reads]
        seen, _ = inputs_and_logits(model, TOKENS)
        assert_measured(stats, seen[here[0].name])
        for module in here:
            walker.set_weight(block, module, replaced(module))
            model.get_submodule(module.name).weight.data = replaced(module)
    assert order == list(wanted)
    seen, _ = inputs_and_logits(model, TOKENS)
    found = walker.collect(walker.load_block(1), 1, hidden, ALL)["model.layers.1.attn_in"]
    assert_measured(found, seen["model.layers.1.self_attn.q_proj"])


def test_a_replaced_weight_is_what_the_block_multiplies_with(tiny_checkpoint):
    folder = tiny_checkpoint("llama-biased")
    walker, model = Walker(HFCheckpoint(folder), CPU, torch.float32), load_reference(folder)
    hidden, generator = walker.embed(TOKENS), torch.Generator().manual_seed(5)
    for i in range(2):
        block = walker.load_block(i)
        for module in walker.modules[i]:
            w = torch.randn(module.shape, generator=generator) * 0.1
            walker.set_weight(block, module, w)
            model.get_submodule(module.name).weight.data = w
        walker.advance(block, i, hidden)
    _, want = inputs_and_logits(model, TOKENS)
    assert_close(walker.logits(hidden, 2), want[2], rtol=1e-4, atol=1e-4 * float(want.std()))


@pytest.mark.parametrize(
    "change",
    [{"model_type": "no such family"}, {"num_attention_heads": "four"}, {"rope_scaling": 7}],
    ids=str,
)
def test_a_config_that_transformers_refuses(change, tiny_checkpoint):
    config = json.loads((tiny_checkpoint("llama") / "config.json").read_text())
    for name in ("head_dim", "rope_parameters"):
        config.pop(name, None)
    with pytest.raises(CheckpointError, match=r"config\.json does not describe a model that transformers builds"):
        build_on_meta(config | change, torch.float32)


def test_transformers_wishes_about_a_config_are_kept_quiet():
    logger, level = logging.getLogger("transformers.modeling_rope_utils"), logging.getLogger("transformers").level
    with pytest.raises(KeyError), quiet():
        assert logger.isEnabledFor(logging.ERROR) and not logger.isEnabledFor(logging.WARNING)
        raise KeyError
    assert logging.getLogger("transformers").level == level


def test_modules_are_those_of_the_block(llama):
    assert all(isinstance(m, Module) and m.block == i for i in (0, 1) for m in llama.modules[i])
    assert [m.role for m in llama.modules[1]] == ["q", "k", "v", "o", "gate", "up", "down"]
