"""Bias correction: outputs have the mean that they had, layer behind layer, and nothing else moves."""

from __future__ import annotations

import pytest
import torch
import yaml

from qtool.calibrate.walker import Walker
from qtool.models import open_artifact
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.stages.biases import Biases
from qtool.store.overlay import Overlaid
from tests.stages.conftest import quantized_task

CPU = torch.device("cpu")
CORRECTED = [f"model.layers.{i}.self_attn.{role}_proj" for i in range(2) for role in "qkv"]


@pytest.fixture
def recipe(tmp_path):
    def write(finish):
        rules = [
            {"match": "lm_head", "keep": True},
            {"match": "*", "weights": "int3-g32", "activations": "int6-token", "method": "rtn"},
        ]
        told = {"recipe": 1, "name": "b", "calibration": {"samples": 4, "length": 48}, "layers": rules}
        (tmp_path / "b.yaml").write_text(yaml.safe_dump(told | {"finish": finish, "export": [{"to": "qtool"}]}))
        return str(tmp_path / "b.yaml")

    return write


def output_means(model, tokens):
    """Of what every layer with a bias writes, by hooks on the modules themselves."""
    walker, found = Walker(model, CPU, torch.float32), {}
    hidden = walker.embed(tokens)
    for i in range(len(walker.blocks)):
        block, sums = walker.load_block(i), {}
        for module in (m for m in walker.modules[i] if m.name in CORRECTED):

            def count(_, __, output, name=module.name, sums=sums):
                sums.setdefault(name, []).append(output.double().flatten(0, -2))

            walker.linear(block, module).register_forward_hook(count)
        walker.advance(block, i, hidden)
        found |= {name: torch.cat(parts).mean(0) for name, parts in sums.items()}
    return found


def test_outputs_have_the_mean_that_they_had(recipe, tiny_checkpoint, tmp_path):
    task = quantized_task(tiny_checkpoint("qwen2"), recipe([]), tmp_path / "out", (4, 24))
    model, found = task.model, Biases().run(task)
    assert sorted(found.tensors) == sorted(f"{name}.bias" for name in CORRECTED)
    assert not found.params
    assert found.about["biases"] == len(CORRECTED)
    corrected = Overlaid(model, found.params, found.tensors, "biases")
    wanted, before, after = (output_means(m, task.tokens) for m in (task.original, model, corrected))
    for name in CORRECTED:
        stored = 0.004 * float(model.tensor(f"{name}.bias").abs().max())  # as far as bfloat16 can say
        limit = stored if model.tensor(f"{name}.bias").dtype != torch.float32 else 1e-5
        assert float((after[name] - wanted[name]).abs().max()) < limit, name
        assert float((before[name] - wanted[name]).abs().max()) > 3 * limit, name


def test_from_recipe_to_artifact(recipe, tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("qwen2")
    reports = [
        run(QuantizeOptions(str(source), recipe(finish), tmp_path / name, device="cpu", dtype="fp32"))
        for name, finish in (("plain", []), ("corrected", ["biases"]))
    ]
    (entry,) = reports[1].finish
    assert (entry.name, entry.changed) == ("biases", len(CORRECTED))
    plain, corrected = (open_artifact(str(tmp_path / name)) for name in ("plain", "corrected"))
    changed = {name for name in plain.names() if not torch.equal(plain.tensor(name), corrected.tensor(name))}
    assert changed == {f"{name}.bias" for name in CORRECTED}
