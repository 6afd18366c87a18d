"""Mixtures of experts, walked: logits, what each expert is shown, and weights replaced one expert at a time."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from torch.testing import assert_close

from qtool.calibrate import blocks as blocks_module
from qtool.calibrate import places
from qtool.calibrate.experts import Expert, Experts
from qtool.calibrate.walker import Walker
from qtool.checkpoint.hf import HFCheckpoint
from qtool.stats.channels import Channels
from qtool.stats.gram import Gram
from tests.calibrate.conftest import load_reference
from tests.calibrate.test_walker import all_logits
from tests.conftest import MIXTURES

CPU = torch.device("cpu")
TOKENS = torch.randint(512, (3, 40), generator=torch.Generator().manual_seed(1))
ALL = frozenset({Gram, Channels})


@pytest.fixture(params=MIXTURES)
def name(request) -> str:
    return str(request.param)


@pytest.fixture
def folder(name, tiny_checkpoint):
    return tiny_checkpoint(name)


@pytest.mark.parametrize(("batch", "all_experts"), [(40, False), (4096, True)], ids=["routed", "all"])
def test_logits_are_those_of_transformers(batch, all_experts, folder, monkeypatch):
    monkeypatch.setattr(blocks_module, "BATCH_TOKENS", batch)
    walker = Walker(HFCheckpoint(folder), CPU, torch.float32, all_experts)
    with torch.no_grad():
        want = load_reference(folder)(TOKENS).logits
    assert_close(all_logits(walker, TOKENS), want, rtol=1e-4, atol=1e-4 * float(want.std()))


def shown(model, name):
    """What every expert reads, and where from, by plain indexing: (block, expert) -> (in, mid), float64.

    The model's own routers say which tokens they send where; the experts' inputs are recorded as the model runs.
    """
    chosen, inputs = {}, {}
    for i, layer in enumerate(model.model.layers):
        router = layer.mlp.router if name.startswith("gpt_oss") else layer.mlp.gate
        router.register_forward_hook(lambda _, x, y, i=i: chosen.__setitem__(i, y[2]))
        layer.mlp.experts.register_forward_pre_hook(lambda _, x, i=i: inputs.__setitem__(i, x[0].double()))
    with torch.no_grad():
        model(TOKENS)
    found = {}
    for i, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts.double()
        for e in range(experts.num_experts):
            for routed in (True, False):
                rows = [t for t in range(len(inputs[i])) if not routed or e in chosen[i][t]]
                x = inputs[i][rows]
                if name.startswith("gpt_oss"):
                    both = x @ experts.gate_up_proj[e] + experts.gate_up_proj_bias[e]
                    gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
                    mid = (up + 1) * gate * torch.sigmoid(1.702 * gate)
                else:
                    gate, up = (x @ experts.gate_up_proj[e].T).chunk(2, dim=-1)
                    mid = gate * torch.sigmoid(gate) * up
                found[i, e, routed] = x, mid.detach()
    return found


@pytest.mark.parametrize("all_experts", [False, True], ids=["routed", "all"])
def test_an_expert_is_measured_on_its_tokens(all_experts, name, folder, monkeypatch):
    monkeypatch.setattr(blocks_module, "BATCH_TOKENS", 80)
    expected = shown(load_reference(folder), name)
    walker = Walker(HFCheckpoint(folder), CPU, torch.float32, all_experts)
    hidden, count = walker.embed(TOKENS), 0
    for i in range(len(walker.blocks)):
        stats = walker.collect(walker.load_block(i), i, hidden, ALL)
        for module in walker.modules[i]:
            if module.expert is None:
                assert stats[module.reads].tokens == TOKENS.numel()
                continue
            x = expected[i, module.expert, not all_experts][int(module.role == "down")]
            found = stats[module.reads]
            assert found.tokens == len(x) > 0
            gram = torch.stack([(x * column[:, None]).sum(0) for column in x.T])
            scale = float(x.square().mean()) * len(x)
            assert_close(found[Gram].matrix.double(), gram, rtol=1e-3, atol=1e-4 * scale)
            assert_close(found[Channels].sum_squares.double(), x.square().sum(0), rtol=1e-3, atol=1e-5 * scale)
            count += 1
    assert count == 2 * 3 * walker.family.experts(walker.checkpoint.config)


def test_blocks_that_are_loaded_have_experts_of_their_own(folder):
    """Those of one are neither the other's nor those that all are copied from, which have no numbers."""
    walker = Walker(HFCheckpoint(folder), CPU, torch.float32)
    first = walker.load_block(0)
    weights = {n: p for n, p in first.named_parameters() if ".experts." in n and n.endswith("weight")}
    before = {name: weight.clone() for name, weight in weights.items()}
    second = dict(walker.load_block(1).named_parameters())
    assert weights
    for name, weight in weights.items():
        assert torch.equal(weight, before[name]) and not torch.equal(weight, second[name])
    assert all(parameter.is_meta for parameter in walker.blocks[0].parameters())


def test_steps_hold_few_experts_at_a_time(tiny_checkpoint, monkeypatch):
    """Grams of as many experts as there is room for, so that memory does not grow with the number of experts."""
    walker = Walker(HFCheckpoint(tiny_checkpoint("qwen3_moe")), CPU, torch.float32)
    hidden = walker.embed(TOKENS)
    needs = {m.reads: ALL for m in walker.modules[0] if m.expert is not None}
    names = [[f"model.layers.0.mlp.experts.{e}.{x}" for e in range(6)] for x in ("in", "mid")]
    for room, abreast in ((1 << 30, 6), (100_000, 2), (1, 1)):
        monkeypatch.setattr(places, "EXPERTS_LIMIT", room)
        order = [list(found) for found in walker.steps(walker.load_block(0), 0, hidden, needs)]
        assert order == [side[a : a + abreast] for a in range(0, 6, abreast) for side in names]


def test_an_expert_without_tokens(tiny_checkpoint):
    """It is measured, and nothing was seen; everybody else's numbers stay as they are."""
    walker = Walker(HFCheckpoint(tiny_checkpoint("qwen3_moe")), CPU, torch.float32)
    block, hidden = walker.load_block(0), walker.embed(TOKENS)
    router = next(m for m in walker.modules[0] if m.kind == "router")
    gate = walker.linear(block, router)
    w = gate.weight.data.clone()
    w[2] = 0
    walker.set_weight(block, router, w)
    gate.register_forward_hook(  # the model's own choice, except that expert 2 is never it
        lambda _, x, y: (y[0], y[1], torch.where(y[2] == 2, (y[2] + 1) % 6, y[2]))
    )
    stats = walker.collect(block, 0, hidden, ALL)
    tokens = {m.expert: stats[m.reads].tokens for m in walker.modules[0] if m.expert is not None}
    assert tokens[2] == 0
    assert min(count for e, count in tokens.items() if e != 2) > 0
    assert not stats["model.layers.0.mlp.experts.2.in"][Gram].matrix.any()


def test_replaced_weights_are_what_a_block_multiplies_with(name, folder):
    walker, model = Walker(HFCheckpoint(folder), CPU, torch.float32), load_reference(folder)
    hidden, generator = walker.embed(TOKENS), torch.Generator().manual_seed(5)
    for i in range(2):
        block, stacks = walker.load_block(i), defaultdict(dict)
        for module in walker.modules[i]:
            w = torch.randn(module.shape, generator=generator) * 0.1
            walker.set_weight(block, module, w)
            if module.expert is None:
                model.get_submodule(module.name.replace("block_sparse_moe", "mlp")).weight.data = w
            else:
                stacks[module.role][module.expert] = w
        experts = model.model.layers[i].mlp.experts
        for e in range(len(stacks["gate"])):
            gate, up, down = (stacks[role][e] for role in ("gate", "up", "down"))
            turns = torch.stack((gate, up), 1).flatten(0, 1).T
            experts.gate_up_proj.data[e] = turns if name.startswith("gpt_oss") else torch.cat((gate, up))
            experts.down_proj.data[e] = down.T if name.startswith("gpt_oss") else down
        walker.advance(block, i, hidden)
    with torch.no_grad():
        want = model(TOKENS).logits
    assert_close(walker.logits(hidden, 2), want[2], rtol=1e-3, atol=1e-4 * float(want.std()))


def test_experts_that_are_all_given_every_token_read_those_that_are_not_zero():
    """As in Llama 4, whose router scales inputs to zero where an expert is not chosen."""
    experts, seen = 3, defaultdict(list)
    made = []
    for e in range(experts):
        layers = {role: torch.nn.Linear(8, 8, bias=False) for role in ("gate", "up", "down")}
        layers["up"].register_forward_pre_hook(lambda _, x, e=e: seen[e].append(x[0].detach().clone()))
        names = {role: f"{role}_proj" for role in layers}
        made.append(Expert(layers, names, lambda gate, up: gate.sigmoid() * up))
    x = torch.randn(experts, 5, 8)
    x[0, 1], x[1], x[2, 4] = 0, 0, 0
    found = Experts(made, show_all=True)(x.view(-1, 8)).view(experts, 5, 8)
    for e, expert in enumerate(made):
        wanted = expert.layer("down")(expert.layer("gate")(x[e]).sigmoid() * expert.layer("up")(x[e]))
        assert_close(found[e], wanted)
    assert [len(seen[e][0]) for e in (0, 2)] == [4, 4]
    assert len(seen[1]) == 1  # ours, above
