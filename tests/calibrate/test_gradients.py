"""Squared gradients block by block against autograd of transformers' whole model."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from qtool.calibrate import gradients
from qtool.calibrate.gradients import group_means, squared_gradients
from qtool.calibrate.walker import Walker
from qtool.checkpoint.open import open_checkpoint

TOKENS = torch.randint(3, 500, (5, 40), generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")


def whole_model(folder, tokens, labels):
    """Gradients of the summed -log p by outputs of modules [1, T, N] and of blocks [1, T, H], sample by sample."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    seen = {}
    for name, module in model.named_modules():
        block = name.removeprefix("model.layers.").isdigit()
        if block or isinstance(module, torch.nn.Linear) or name.endswith("mlp.gate"):

            def keep(_, __, y, name=name):
                y = y[0] if isinstance(y, tuple) else y
                y.retain_grad()
                seen[name] = y

            module.register_forward_hook(keep)
    for sample, wanted in zip(tokens, labels, strict=True):
        logits = model(sample[None]).logits[0]
        likelihood = logits[: len(wanted)].log_softmax(-1)[torch.arange(len(wanted)), wanted]
        (-likelihood.sum()).backward()
        yield {name: y.grad.view(1, len(sample), -1) for name, y in seen.items()}


def inputs_and_gradients(folder, tokens):
    """What linear layers read, [S * T, K], and gradients of the text's -log p by their outputs, [S * T, N]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            hook = lambda _, x, name=name: inputs.setdefault(name, []).append(x[0].flatten(0, -2))  # noqa: E731
            module.register_forward_pre_hook(hook)
    with torch.no_grad():
        for sample in tokens:
            model(sample[None])
    gradients = list(whole_model(folder, tokens, tokens[:, 1:]))
    names = gradients[0].keys() & inputs.keys()
    return {n: torch.cat(inputs[n]) for n in names}, {
        n: torch.cat([g[n] for g in gradients]).flatten(0, 1) for n in names
    }


@pytest.mark.parametrize("name", ["llama-biased", "llama-tied", "gemma2", "qwen3_moe"])
def test_they_are_those_of_the_whole_model(name, tiny_checkpoint, monkeypatch):
    folder = tiny_checkpoint(name)
    walker = Walker(open_checkpoint(str(folder)), CPU, torch.float32)
    groups = {m.name: 3 if m.role == "v" else 1 for i in walker.modules for m in walker.modules[i] if m.expert is None}
    monkeypatch.setattr(gradients, "at_a_time", lambda *_: 2)  # 5 samples: three sweeps forth and back
    monkeypatch.setattr(gradients, "POSITIONS", 16)
    told = []
    found = squared_gradients(walker, TOKENS, groups, "text", 0, lambda *steps: told.append(steps))
    wanted = list(whole_model(folder, TOKENS, TOKENS[:, 1:]))
    assert found.modules.keys() == groups.keys()
    for module, squares in found.modules.items():
        expected = torch.cat([group_means(w[module].square(), groups[module]) for w in wanted])
        assert expected.std() > 0
        assert_close(squares, expected, rtol=1e-3, atol=1e-5 * float(expected.max()), msg=module)
    for i, squares in enumerate(found.blocks):
        expected = torch.cat([w[f"model.layers.{i}"].square().mean(-1) for w in wanted])
        assert_close(squares, expected, rtol=1e-3, atol=1e-5 * float(expected.max()), msg=f"block {i}")
    count = 6 * len(walker.blocks)
    assert told == [(i, count) for i in range(1, count + 1)]


def test_labels_are_drawn_by_the_model(tiny_checkpoint):
    folder = tiny_checkpoint("llama")
    walker = Walker(open_checkpoint(str(folder)), CPU, torch.float32)
    name = "model.layers.0.mlp.up_proj"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        p = model(TOKENS).logits.softmax(-1)
    drawn = [torch.multinomial(q, 1, generator=torch.Generator().manual_seed(7 + s))[:-1, 0] for s, q in enumerate(p)]
    wanted = torch.cat([w[name].square().mean(-1, keepdim=True) for w in whole_model(folder, TOKENS, drawn)])
    found = squared_gradients(walker, TOKENS, {name: 1}, "sampled", 7).modules[name]
    assert_close(found, wanted, rtol=1e-3, atol=1e-5 * float(wanted.max()))
    assert not torch.allclose(found, squared_gradients(walker, TOKENS, {name: 1}, "text", 7).modules[name], rtol=0.1)


def test_groups_are_rows_of_about_equal_number():
    x = torch.randn(2, 10)
    found = group_means(x, 3)
    assert_close(found, torch.stack([x[:, :3].mean(1), x[:, 3:6].mean(1), x[:, 6:].mean(1)], 1))
    assert_close(group_means(x, 1), x.mean(1, keepdim=True))
