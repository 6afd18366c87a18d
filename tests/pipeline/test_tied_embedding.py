"""A matrix that embeds tokens and makes logits is rounded by what it reads as the output layer, if a recipe says so."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from qtool.calibrate.tokens import load_tokens
from qtool.checkpoint.open import open_checkpoint
from qtool.formats._spelling import parse_format
from qtool.methods.rtn import RTN
from qtool.models import open_artifact
from qtool.pipeline.calibrate import CalibrateOptions
from qtool.pipeline.calibrate import run as calibrate
from qtool.pipeline.quantize import QuantizeOptions
from qtool.pipeline.quantize import run as quantize
from qtool.recipe.load import load_recipe
from qtool.store.imatrix import read_imatrix

RECIPE = """
recipe: 1
name: tied
calibration: {samples: 4, length: 48, propagate: float}
layers:
  - {match: "role:embedding", weights: q4_1, method: METHOD}
  - {match: "role:down", weights: q4_0, method: gptq}
  - {match: "*", keep: true}
export: [{to: gguf}]
"""
EMBEDDING = "model.embed_tokens"


@pytest.fixture
def tied(tiny_checkpoint):
    return tiny_checkpoint("llama-tied")


@pytest.fixture
def written(tmp_path):
    def write(method):
        path = tmp_path / f"{method.strip('{')[:4]}.yaml"
        path.write_text(RECIPE.replace("METHOD", method))
        return str(path)

    return write


def head_inputs(folder, recipe):
    """What the output layer of the original reads: float64 [tokens, H]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, -2).double()))
    with torch.no_grad():
        model(load_tokens(load_recipe(recipe).calibration, open_checkpoint(str(folder))))
    return seen[0]


def quantized(folder, recipe, out, **options):
    report = quantize(QuantizeOptions(str(folder), recipe, out, device="cpu", dtype="fp32", **options))
    (entry,) = (e for e in report.layers if e.name == EMBEDDING)
    return open_artifact(str(next(out.glob("*.gguf")))).tensor(f"{EMBEDDING}.weight").float(), entry


def test_importances_are_those_of_the_output_layer(tied, written, tmp_path):
    recipe = written("{rtn: {importance: true}}")
    found, entry = quantized(tied, recipe, tmp_path / "out")
    w, x = open_checkpoint(str(tied)).tensor(f"{EMBEDDING}.weight").float(), head_inputs(tied, recipe)
    fmt, importance = parse_format("q4_1"), x.square().mean(0).float()
    params = fmt.fit(w, importance)
    wanted = fmt.decode(fmt.snap(w, params, importance), params)
    same = (found == wanted).all(1).float().mean()
    assert same > 0.99  # sums of squares round differently
    plain = RTN().solve(w, None, fmt).quantized.decode()
    error, before = (((w - w_hat).double() @ x.T).square().sum() for w_hat in (found, plain))
    assert error < before
    assert entry.tokens == len(x)


def test_gptq_makes_better_logits(tied, written, tmp_path):
    recipe = written("gptq")
    found, entry = quantized(tied, recipe, tmp_path / "out")
    w, x = open_checkpoint(str(tied)).tensor(f"{EMBEDDING}.weight").float(), head_inputs(tied, recipe)
    plain = RTN().solve(w, None, parse_format("q4_1")).quantized.decode()
    error, before = (float(((w - w_hat).double() @ x.T).square().sum()) for w_hat in (found, plain))
    assert error < 0.6 * before
    signal = float((w.double() @ x.T).square().sum())
    assert entry.output_error_db == pytest.approx(10 * torch.log10(torch.tensor(signal / error)).item(), abs=0.02)


@pytest.mark.parametrize("method", ["{rtn: {importance: true}}", "gptq"])
def test_statistics_hold_what_it_reads(method, tied, written, tmp_path):
    """A run with statistics that were measured before comes to the same codes, but for ties that sums decide."""
    recipe, stats = written(method), tmp_path / "stats"
    calibrate(CalibrateOptions(str(tied), recipe, stats, device="cpu", dtype="fp32"))
    own, _ = quantized(tied, recipe, tmp_path / "own")
    again, _ = quantized(tied, recipe, tmp_path / "again", stats=stats)
    assert (own == again).all(1).float().mean() > 0.95


def test_importance_matrix_holds_it_only_if_it_is_asked_for(tied, written, tmp_path):
    names = []
    for method in ("rtn", "{rtn: {importance: true}}"):
        out = tmp_path / f"{len(names)}.gguf"
        calibrate(CalibrateOptions(str(tied), written(method), out, device="cpu", dtype="fp32"))
        names.append(set(read_imatrix(out).entries))
    assert names[1] - names[0] == {"token_embd.weight"}
    assert names[0] <= names[1]


def test_an_importance_matrix_stands_in_for_what_it_does_not_hold(tied, written, tmp_path):
    """Of llama-imatrix, which says nothing about the embedding: that is rounded without data."""
    matrix, recipe = tmp_path / "m.gguf", written("gptq")
    calibrate(CalibrateOptions(str(tied), written("rtn"), matrix, device="cpu", dtype="fp32"))
    found, entry = quantized(tied, recipe, tmp_path / "out", imatrix=matrix)
    w = open_checkpoint(str(tied)).tensor(f"{EMBEDDING}.weight").float()
    assert torch.equal(found, RTN().solve(w, None, parse_format("q4_1")).quantized.decode())
    assert (entry.method, entry.fallback) == ("rtn", None)
