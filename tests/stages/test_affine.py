"""Affine correction: factors of rows and biases are those of least squares, and nothing that does not help is kept."""

from __future__ import annotations

import pytest
import torch
import yaml

from qtool.calibrate.walker import Walker
from qtool.errors import PlanError
from qtool.models import open_artifact
from qtool.pipeline.prepare import prepare
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.stages import affine
from qtool.stages.affine import Scaling, factors
from qtool.store.overlay import Overlaid
from tests.stages.conftest import quantized_task

CPU = torch.device("cpu")
ROLES = {"mlp.down_proj": False, "self_attn.k_proj": True}
"""Layers that are looked at, and whether they have biases."""


@pytest.fixture
def recipe(tmp_path):
    def write(finish, weights="int2-g32"):
        rules = [
            {"match": "lm_head", "keep": True},
            {"match": "*", "weights": weights, "activations": "int6-token", "method": "rtn"},
        ]
        told = {"recipe": 1, "name": "a", "calibration": {"samples": 8, "length": 48}, "layers": rules}
        (tmp_path / "a.yaml").write_text(yaml.safe_dump(told | {"finish": finish, "export": [{"to": "qtool"}]}))
        return str(tmp_path / "a.yaml")

    return write


@pytest.mark.parametrize("biased", [False, True])
def test_factors_are_those_of_least_squares_row_by_row(biased):
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(5, 24, generator=g), torch.randn(24, 300, generator=g) + 1.5
    q = 0.8 * w + 0.4 * torch.randn(w.shape, generator=g)
    q[4] = 0
    found = factors(w, q, x @ x.T, x.double().mean(1) if biased else None, 300)
    assert found[4] == 1
    for row in range(4):
        columns = [(q[row] @ x).double(), torch.ones(300).double()][: 2 if biased else 1]
        wanted = torch.linalg.lstsq(torch.stack(columns, 1), (w[row] @ x).double()[:, None]).solution[0, 0]
        assert float(found[row]) == pytest.approx(float(wanted), rel=1e-4)
        assert abs(float(wanted) - 1) > 0.02


def outputs(model, weights, tokens):
    """What layers write in a model, and what other weights would write of the same inputs: name -> two [T, N]."""
    walker, found = Walker(model, CPU, torch.float32), {}
    hidden = walker.embed(tokens)
    for i in range(len(walker.blocks)):
        block = walker.load_block(i)
        for module in (m for m in walker.modules[i] if m.name.split(".", 3)[3] in ROLES):

            def look(linear, inputs, output, name=module.name):
                own = torch.nn.functional.linear(inputs[0], weights.tensor(f"{name}.weight").float())
                found.setdefault(name, []).append((output.double().flatten(0, -2), own.double().flatten(0, -2)))

            walker.linear(block, module).register_forward_hook(look)
        with walker.quantized_inputs(block, i):
            walker.advance(block, i, hidden)
    return {name: tuple(torch.cat(parts) for parts in zip(*pairs, strict=True)) for name, pairs in found.items()}


def slopes(written, wanted, biased):
    """Of the line through a row's outputs that predicts the wanted ones best, [N]."""
    if biased:
        written, wanted = written - written.mean(0), wanted - wanted.mean(0)
    return (written * wanted).sum(0) / written.square().sum(0)


def test_outputs_need_no_factor_any_more(recipe, tiny_checkpoint, tmp_path):
    task = quantized_task(tiny_checkpoint("qwen2"), recipe([]), tmp_path / "out", (4, 24))
    model, scaling = task.model, Scaling(task)
    biases = scaling.all()
    assert scaling.params.keys() == model.layers.keys()
    assert sorted(biases) == sorted(name for name in model.names() if name.endswith(".bias"))
    corrected = Overlaid(model, scaling.params, biases, "affine")
    before, after = (outputs(m, task.original, task.tokens) for m in (model, corrected))
    for name, (written, wanted) in after.items():
        biased = ROLES[name.split(".", 3)[3]]
        off, left = ((slopes(*pair, biased) - 1).abs().mean() for pair in (before[name], (written, wanted)))
        assert left < 0.006 and off > 5 * left, name  # as far as scales of 16 bits can say


def test_from_recipe_to_artifact_and_only_what_helps(recipe, tiny_checkpoint, tmp_path, monkeypatch):
    source = tiny_checkpoint("qwen2")

    def made(name, finish):
        report = run(QuantizeOptions(str(source), recipe(finish), tmp_path / name, device="cpu", dtype="fp32"))
        return report, open_artifact(str(tmp_path / name))

    monkeypatch.setattr(affine, "divergence", lambda task: float(not isinstance(task.model, Overlaid)))
    _, plain = made("plain", [])
    report, corrected = made("corrected", [{"affine": {"holdout": 0.25}}])
    (entry,) = report.finish
    assert entry.name == "affine" and entry.about["held out"] < entry.about["held out before"]
    assert entry.changed == len(plain.layers) + sum(name.endswith(".bias") for name in plain.names())
    changed = {name for name in plain.names() if not torch.equal(plain.tensor(name), corrected.tensor(name))}
    assert changed == {f"{name}.weight" for name in plain.layers} | {n for n in plain.names() if n.endswith(".bias")}
    for name in plain.layers:
        assert torch.equal(plain.matrix(name).quantized.codes, corrected.matrix(name).quantized.codes)
    monkeypatch.setattr(affine, "divergence", lambda task: float(isinstance(task.model, Overlaid)))
    report, same = made("same", ["affine"])
    assert report.finish[0].changed == 0
    assert all(torch.equal(plain.tensor(name), same.tensor(name)) for name in plain.names())


def test_where_no_matrix_has_rows_of_its_own_the_plan_says_so(recipe, tiny_checkpoint):
    with pytest.raises(PlanError, match="affine: no matrix that all tokens go through has scales of rows"):
        prepare(str(tiny_checkpoint("llama")), recipe(["affine"], "fp8-tensor"), device="cpu")
