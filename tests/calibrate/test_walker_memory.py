"""What a walk keeps in memory: one block, and the parts of the embedding that are needed."""

from __future__ import annotations

import ctypes
import gc
import math
from types import SimpleNamespace

import pytest
import torch

from qtool.calibrate import blocks as blocks_module
from qtool.calibrate import walker as walker_module
from qtool.calibrate.hidden import waiting_limit
from qtool.calibrate.reference import Reference
from qtool.calibrate.walker import Walker
from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import CheckpointError
from qtool.pipeline.memory import resident_bytes
from qtool.stats.channels import Channels
from tests.calibrate.conftest import load_reference
from tests.calibrate.test_walker import CPU, TOKENS


class Parts(HFCheckpoint):
    """Notes which rows of the embedding are read."""

    def __init__(self, folder):
        super().__init__(folder)
        self.read = []

    def tensor(self, name):
        assert name != "model.embed_tokens.weight", "read as a whole"
        return super().tensor(name)

    def rows(self, name, start, stop):
        self.read.append((start, stop))
        return super().rows(name, start, stop)


def test_embeddings_are_read_in_parts_and_only_where_needed(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(blocks_module, "TABLE_VALUES", 64 * 100)
    folder = tiny_checkpoint("llama")
    tokens = torch.tensor([[0, 99, 100, 511], [500, 300, 399, 0]])
    checkpoint = Parts(folder)
    found = Walker(checkpoint, CPU, torch.float32).embed(tokens)
    assert checkpoint.read == [(0, 100), (100, 200), (300, 400), (500, 512)]
    table = load_reference(folder).model.embed_tokens
    assert torch.equal(found.values, table(tokens).detach())


def test_the_output_layer_is_read_in_parts(tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(walker_module, "TABLE_VALUES", 8 * 64 * 200)
    folder = tiny_checkpoint("llama-tied")
    checkpoint = Parts(folder)
    walker = Walker(checkpoint, CPU, torch.float32)
    _, table = walker.output_layer()
    assert checkpoint.read == [(0, 200), (200, 400), (400, 512)]
    assert torch.equal(table, load_reference(folder).lm_head.weight.detach())


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_one_sample_meets_the_output_layer_in_parts_that_are_not_kept(tiny_checkpoint, monkeypatch, kind):
    monkeypatch.setattr(walker_module, "TABLE_VALUES", 8 * 64 * 200)
    folder = tiny_checkpoint(kind)
    checkpoint = Parts(folder)
    walker = Walker(checkpoint, CPU, torch.float32)
    tokens = torch.tensor([[3, 511, 100, 7]])
    hidden = walker.embed(tokens)
    for i in range(len(walker.blocks)):
        walker.advance(walker.load_block(i), i, hidden)
    checkpoint.read.clear()
    found = walker.logits(hidden, 0, 1)
    assert walker.head is None and checkpoint.read == [(0, 200), (200, 400), (400, 512)]
    with torch.no_grad():
        expected = load_reference(folder)(input_ids=tokens).logits[0, 1:]
    assert torch.allclose(found, expected, 1e-4, 1e-5)


def test_a_token_that_the_model_does_not_have(llama):
    with pytest.raises(CheckpointError) as caught:
        llama.embed(torch.tensor([[3, 512]]))
    assert str(caught.value) == "tokenizer and model do not belong together: wanted token ids below 512, found 512"


def live_bytes():
    """Bytes of all tensors that hold memory."""
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.device.type == "cpu"]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class Weighed(HFCheckpoint):
    """Notes how much memory tensors take each time that one was read."""

    def tensor(self, name):
        tensor = super().tensor(name)
        self.peak = max(self.peak, live_bytes())
        return tensor


def test_one_block_is_in_memory_at_a_time(tiny_checkpoint):
    checkpoint = Weighed(tiny_checkpoint("llama-tied"))  # three blocks, stored in half the width
    gc.collect()
    before = checkpoint.peak = live_bytes()
    walker = Walker(checkpoint, CPU, torch.float32)
    hidden = walker.embed(TOKENS)
    for i in range(3):
        walker.collect(walker.load_block(i), i, hidden, frozenset({Channels}))
    sizes = [4 * math.prod(checkpoint.info(n).shape) for n in checkpoint.names() if "layers.0." in n]
    carried = hidden.values.nbytes + sum(t.nbytes for a in walker.arguments[40] for t in tensors_in(a))
    assert checkpoint.peak - before > sum(sizes)
    assert checkpoint.peak - before < carried + sum(sizes) + max(sizes) + 4096
    assert live_bytes() - before < carried + 4096


def tensors_in(arguments):
    """Tensors among the arguments of a block."""
    flat = [x for value in arguments.values() for x in (value if isinstance(value, tuple) else (value,))]
    return [x for x in flat if isinstance(x, torch.Tensor)]


def test_batches_wait_on_a_device_in_less_room_where_a_block_is_trained(monkeypatch):
    properties = SimpleNamespace(total_memory=160 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device = torch.device("cuda")
    for part, gib in ((1.0, 160), (0.5, 80)):  # of which others may have some
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device, part=part: part)
        assert (waiting_limit(device), waiting_limit(device, trains=True)) == (gib << 28, gib << 26)


@pytest.mark.parametrize(("keep", "begun"), [(False, 3), (True, 12)])
def test_batches_start_anew_where_what_waits_leaves_no_room_for_training(keep, begun, llama, monkeypatch):
    monkeypatch.setattr(walker_module, "waiting_limit", lambda device, trains=False: 0 if trains else 1 << 40)
    monkeypatch.setattr(blocks_module, "BATCH_TOKENS", 1)
    hidden, block, seen = llama.embed(TOKENS), llama.load_block(0), []
    block.register_forward_pre_hook(lambda *_: seen.append(1))
    wanted = {m.reads: frozenset({Channels}) for m in llama.modules[0] if m.role != "o"}
    assert len(list(llama.steps(block, 0, hidden, wanted, keep=keep))) == 3
    assert len(seen) == begun  # three samples, and from the beginning behind each of three places


def test_what_batches_that_start_anew_were_spared_is_gone_once_they_are_through(llama):
    reference, hidden, block = Reference(llama, TOKENS, every=True), llama.embed(TOKENS), llama.load_block(0)
    reference.begin(0, [])
    reference.found = {part.start: reference.compute(part) for part in llama.parts(hidden)}
    for part in llama.parts(hidden):
        _, ahead = reference.run(part)
        reference.advance(part, ahead)
    assert not reference.found
    llama.advance(block, 0, hidden)
    assert torch.equal(reference.outputs.values, hidden.values)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="a C library without malloc_trim")
def test_between_solving_and_forward_passes_the_heap_is_given_back(llama):
    hidden, block, kept = llama.embed(TOKENS), llama.load_block(0), []
    wanted = {m.reads: frozenset({Channels}) for m in llama.modules[0] if m.role != "o"}

    def litter(*_):
        pieces = [bytes(range(250)) * 200 for _ in range(2000)]
        kept.append(bytes(50_000))  # behind them, or they would go by themselves
        del pieces

    steps = llama.steps(block, 0, hidden, wanted)
    next(steps)
    before = resident_bytes()
    with block.post_attention_layernorm.register_forward_hook(litter):
        next(steps)
        assert resident_bytes() - before < 20e6
    litter()
    assert resident_bytes() - before > 90e6
    next(steps)
    assert resident_bytes() - before < 20e6
