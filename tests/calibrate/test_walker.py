"""The walk, block by block, against transformers' own forward pass over the whole model."""

from __future__ import annotations

import gc
import json
import math

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from qtool.calibrate import walker as walker_module
from qtool.calibrate.walker import Walker, build_on_meta, compute_dtype, quantize_tokens
from qtool.checkpoint._base import Module
from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import CheckpointError
from qtool.formats.int import Int
from qtool.stats import Stat
from tests.artifact.conftest import quantize
from tests.conftest import TINY, make_checkpoint, make_tokenizer

CPU = torch.device("cpu")
TOKENS = torch.randint(512, (3, 40), generator=torch.Generator().manual_seed(1))
ALL = frozenset({Stat.GRAM, Stat.CHANNELS})
PER_TOKEN = Int(bits=8, group="token", scales="minmax", scale_dtype="fp32")


@pytest.fixture(scope="module")
def sliding(tmp_path_factory):
    """Mistral whose window is shorter than the samples here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TINY, "mistral-sliding", {"dtype": "float32", "sliding_window": 8})
        return make_checkpoint("mistral-sliding", tmp_path_factory.mktemp("sliding"), make_tokenizer())


@pytest.fixture(params=[*TINY, "mistral-sliding"])
def folder(request, tiny_checkpoint, sliding):
    return sliding if request.param == "mistral-sliding" else tiny_checkpoint(request.param)


@pytest.fixture
def llama(tiny_checkpoint):
    return Walker(HFCheckpoint(tiny_checkpoint("llama")), CPU, torch.float32)


def load_reference(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


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
    monkeypatch.setattr(walker_module, "BATCH_TOKENS", batch)
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
    (tmp_path / "model.safetensors").symlink_to(sliding / "model.safetensors")
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


def test_bfloat16_walks_follow_transformers(tiny_checkpoint):
    folder = tiny_checkpoint("llama")
    _, want = inputs_and_logits(load_reference(folder), TOKENS)
    found = all_logits(Walker(HFCheckpoint(folder), CPU, torch.bfloat16), TOKENS)
    assert float((found - want).std() / want.std()) < 0.03


def assert_measured(stats, x):
    """Every statistic of inputs x, float64 [tokens, K], by plain sums."""
    size = float(x.abs().max())
    assert stats.tokens == len(x) == TOKENS.numel()
    gram = torch.stack([(x * column[:, None]).sum(0) for column in x.T])
    assert_close(stats.gram.double(), gram, rtol=1e-4, atol=1e-4 * len(x) * float(x.square().mean()))
    assert_close(stats.sum_squares.double(), x.square().sum(0), rtol=1e-4, atol=1e-6)
    assert_close(stats.low.double(), x.min(0).values, rtol=1e-4, atol=1e-5 * size)
    assert_close(stats.high.double(), x.max(0).values, rtol=1e-4, atol=1e-5 * size)


def test_statistics_are_those_of_hooks_on_transformers(folder, monkeypatch):
    monkeypatch.setattr(walker_module, "BATCH_TOKENS", 80)  # two samples, then one
    walker = Walker(HFCheckpoint(folder), CPU, torch.float32)
    seen, _ = inputs_and_logits(load_reference(folder), TOKENS)
    hidden, names = walker.embed(TOKENS), set()
    for i in range(len(walker.blocks)):
        stats = walker.collect(walker.load_block(i), i, hidden, ALL, advance=True)
        assert len(stats) == 4
        for module in walker.modules[i]:
            assert_measured(stats[module.reads], seen[module.name])
            names.add(module.name)
    assert_measured(walker.collect_head(hidden, ALL), seen["lm_head"])
    assert names | {"lm_head"} == set(seen)


def test_only_what_is_needed_is_measured(llama):
    hidden = llama.embed(TOKENS)
    compact = llama.collect(llama.load_block(0), 0, hidden, frozenset({Stat.CHANNELS}))
    whole = llama.collect(llama.load_block(0), 0, hidden, ALL)
    for reads, stats in compact.items():
        assert stats.gram is None
        assert_close(stats.sum_squares, whole[reads].sum_squares, rtol=1e-5, atol=1e-5)


def test_collecting_leaves_the_inputs_unless_told(llama):
    hidden, advanced = llama.embed(TOKENS), llama.embed(TOKENS)
    before, block = hidden.values.clone(), llama.load_block(0)
    llama.collect(block, 0, hidden, ALL)
    assert torch.equal(hidden.values, before)
    llama.collect(block, 0, hidden, ALL, advance=True)
    llama.advance(llama.load_block(0), 0, advanced)
    assert torch.equal(hidden.values, advanced.values)
    assert not torch.equal(hidden.values, before)
    assert not any(module._forward_pre_hooks for module in block.modules())


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
        list(walker.outputs(block, 0, hidden))
    for hook in hooks:
        hook.remove()
    return seen


def test_inputs_are_rounded_where_asked_and_while_asked(llama):
    block, hidden = llama.load_block(0), llama.embed(TOKENS[:2, :16])
    plain = inputs_in_walk(llama, block, hidden)
    name = "model.layers.0.self_attn.v_proj"
    with llama.quantized_inputs(block, 0, {name: PER_TOKEN, "model.layers.1.mlp.up_proj": PER_TOKEN}):
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
    formats = dict.fromkeys(declared.layers, PER_TOKEN)
    assert len(formats) == 2 * 6 + 1
    for i in range(2):
        walkers[0].advance(walkers[0].load_block(i), i, hidden)
        block = walkers[1].load_block(i)
        with walkers[1].quantized_inputs(block, i, formats):
            walkers[1].advance(block, i, want)
    assert torch.equal(hidden.values, want.values)
    assert not torch.equal(hidden.values, through_all_blocks(walkers[1], TOKENS).values)
    with torch.inference_mode():
        normed = walkers[1].load_norm()(want[1:2])
    logits = rounded_token_by_token(normed)[0].double() @ declared.tensor("lm_head.weight").double().T
    assert_close(walkers[0].logits(hidden, 1).double(), logits, rtol=1e-4, atol=1e-4)
    assert float((walkers[1].logits(hidden, 1) - logits).abs().max()) > 1e-2


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
    monkeypatch.setattr(walker_module, "TABLE_VALUES", 64 * 100)
    folder = tiny_checkpoint("llama")
    tokens = torch.tensor([[0, 99, 100, 511], [500, 300, 399, 0]])
    checkpoint = Parts(folder)
    found = Walker(checkpoint, CPU, torch.float32).embed(tokens)
    assert checkpoint.read == [(0, 100), (100, 200), (300, 400), (500, 512)]
    table = load_reference(folder).model.embed_tokens
    assert torch.equal(found.values, table(tokens).detach())


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
        walker.collect(walker.load_block(i), i, hidden, frozenset({Stat.CHANNELS}), advance=True)
    sizes = [4 * math.prod(checkpoint.info(n).shape) for n in checkpoint.names() if "layers.0." in n]
    carried = hidden.values.nbytes + sum(t.nbytes for a in walker.arguments[40] for t in tensors_in(a))
    assert checkpoint.peak - before > sum(sizes)
    assert checkpoint.peak - before < carried + sum(sizes) + max(sizes) + 4096
    assert live_bytes() - before < carried + 4096


def tensors_in(arguments):
    """Tensors among the arguments of a block."""
    flat = [x for value in arguments.values() for x in (value if isinstance(value, tuple) else (value,))]
    return [x for x in flat if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize(
    "change",
    [{"model_type": "no such family"}, {"num_attention_heads": "four"}, {"hidden_size": 63}, {"rope_scaling": 7}],
    ids=str,
)
def test_a_config_that_transformers_refuses(change, tiny_checkpoint):
    config = json.loads((tiny_checkpoint("llama") / "config.json").read_text())
    for name in ("head_dim", "rope_parameters"):
        config.pop(name, None)
    with pytest.raises(CheckpointError, match=r"config\.json does not describe a model that transformers builds"):
        build_on_meta(config | change, torch.float32)


def test_the_type_to_compute_in(monkeypatch):
    assert compute_dtype(torch.device("cuda")) == torch.bfloat16
    for capabilities, dtype in (
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx2": True}, torch.float32),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert compute_dtype(CPU) == dtype


def test_modules_are_those_of_the_block(llama):
    assert all(isinstance(m, Module) and m.block == i for i in (0, 1) for m in llama.modules[i])
    assert [m.role for m in llama.modules[1]] == ["q", "k", "v", "o", "gate", "up", "down"]
