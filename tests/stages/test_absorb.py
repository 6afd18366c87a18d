"""Scales of channels that go from readers into writers: their equations, what stays exact, what is won."""

from __future__ import annotations

import pytest
import torch
import yaml

from qtool.checkpoint.families._edges import Edge
from qtool.formats._base import Quantized
from qtool.formats._spelling import parse_format
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.stages import absorb
from qtool.stages.absorb import Absorb, columns, error_of, factors, multiplied
from tests.stages.conftest import quantized_task

CPU = torch.device("cpu")


@pytest.fixture
def recipe(tmp_path):
    def write(finish, weights="int2-g32", up="int4-g32", method="gptq"):
        rules = [
            {"match": "lm_head", "keep": True},
            {"match": "role:up,v", "weights": up},
            {"match": "*", "weights": weights},
        ]
        told = {"recipe": 1, "name": "a", "calibration": {"samples": 24, "length": 48}, "layers": rules}
        told |= {"method": method}
        path = tmp_path / "a.yaml"
        path.write_text(yaml.safe_dump(told | {"finish": finish, "export": [{"to": "qtool"}]}))
        return str(path)

    return write


def test_factors_are_those_of_least_squares_over_all_outputs(monkeypatch):
    monkeypatch.setattr(absorb, "NEAR", 0.0)
    g = torch.Generator().manual_seed(0)
    edge = Edge("heads", ("v",), ("o",), 8, repeat=2, dim=4)
    channel = columns(edge)
    assert channel.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7, 4, 5, 6, 7]
    w, x = torch.randn(6, 16, generator=g), torch.randn(16, 200, generator=g)
    q = w + 0.3 * torch.randn(w.shape, generator=g)
    found = factors(w, q, x @ x.T, channel, 8)
    design = torch.stack([(q[:, channel == c] @ x[channel == c]).flatten() for c in range(8)], dim=1).double()
    wanted = torch.linalg.lstsq(design, (w @ x).flatten().double()[:, None]).solution[:, 0]
    assert torch.allclose(found.double(), wanted, rtol=1e-3)
    assert (wanted - 1).abs().max() > 0.02
    exact = ((w - q * found[channel]) @ x).square().sum()
    assert error_of(w, q * found[channel], x @ x.T) == pytest.approx(float(exact), rel=1e-3)


@pytest.mark.parametrize("turns", [1, 3])
def test_both_matrices_together_stand_for_what_was_found(turns, recipe, tiny_checkpoint, tmp_path, monkeypatch):
    """Reader times factors is nearer than before; the writer is what it was times the same factors."""
    task = quantized_task(tiny_checkpoint("llama"), recipe([]), tmp_path / "out", (24, 48))
    model = task.model
    monkeypatch.setattr(absorb, "divergence", lambda t: float(t.model is model))  # whatever comes out
    found = Absorb(turns=turns).run(task)
    names = {f"model.layers.{i}.{name}" for i in range(2) for name in ("mlp.up_proj", "mlp.down_proj")}
    assert names <= found.params.keys()
    assert found.about["error left"] < (0.97 if turns == 1 else 0.95)
    for i in range(2):
        up, down = (f"model.layers.{i}.mlp.{name}_proj" for name in ("up", "down"))
        before = model.matrix(up).quantized
        ratio = before.format.affine(found.params[up])[0] / before.format.affine(before.params)[0]
        assert (ratio - ratio[:, :1]).abs().max() < 0.02  # one factor a row, as bfloat16 has it
        assert (ratio - 1).abs().max() > 0.02
        same = torch.equal(found.params[down]["codes"], model.matrix(down).quantized.codes)
        assert same == (turns == 1)


def test_scales_that_are_too_coarse_stay(recipe, tiny_checkpoint, tmp_path):
    source, path = tiny_checkpoint("llama"), recipe(["absorb"], up="mxfp4")
    report = run(QuantizeOptions(str(source), path, tmp_path / "out", device="cpu", dtype="fp32"))
    assert report.finish[0].changed == 0


def test_nothing_changes_unless_predictions_that_were_held_out_are_nearer(recipe, texts, tiny_checkpoint, tmp_path):
    source, klds = tiny_checkpoint("llama"), []
    for finish in ([], [{"absorb": {"turns": 1}}]):
        path, out = recipe(finish), tmp_path / f"out{len(finish)}"
        told = (f"calibration.data={texts / 'calibration.txt'}", f"eval.text={texts / 'other.txt'}", "eval.context=32")
        report = run(QuantizeOptions(str(source), path, out, told, device="cpu", dtype="fp32"))
        klds.append(report.evaluations[0].kld_mean)
    (entry,) = report.finish
    assert (entry.changed == 0) == (entry.about["held out"] == entry.about["held out before"])
    assert entry.about["held out"] <= entry.about["held out before"]
    assert (klds[1] == klds[0]) == (entry.changed == 0)


def test_only_rows_that_write_channels_are_multiplied():
    w = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    fmt = parse_format("int4-g32-asym")
    params = fmt.fit(w)
    writer = Quantized(fmt.snap(w, params), params, fmt)
    factors_by_hand = torch.tensor([2.0, 0.5, 1.0, 4.0])
    found = multiplied(writer, Edge("product", ("up",), ("down",), 4, first=2), factors_by_hand)
    wanted = writer.decode() * torch.tensor([1.0, 1.0, 2.0, 0.5, 1.0, 4.0])[:, None]
    assert torch.equal(fmt.decode(writer.codes, found), wanted)
