"""Recipes that weigh calibration tokens by the gradient of the model's loss: what methods are given of it."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from qtool import registry
from qtool.calibrate.tokens import load_tokens
from qtool.checkpoint.open import open_checkpoint
from qtool.errors import PlanError
from qtool.models import open_artifact
from qtool.pipeline.calibrate import CalibrateOptions
from qtool.pipeline.calibrate import run as calibrate
from qtool.pipeline.quantize import QuantizeOptions
from qtool.pipeline.quantize import run as quantize
from qtool.pipeline.weigh import tempered
from qtool.recipe.load import load_recipe
from qtool.recipe.schema import TokenWeights
from qtool.stats.gram import Gram
from tests.calibrate.test_gradients import inputs_and_gradients

RECIPE = """
recipe: 1
name: weighed
calibration: {samples: 6, length: 48}
layers:
  - {match: lm_head, keep: true}
  - {match: "*", weights: WEIGHTS}
method: METHOD
export: [{to: qtool}]
"""
WEIGHED = "calibration.token_weights={groups: 2, power: 1, cap: 20}"
FLOAT = "calibration.propagate=float"


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe: its path."""

    def write(weights="int3-g32", method="gptq"):
        path = tmp_path / "weighed.yaml"
        path.write_text(RECIPE.replace("WEIGHTS", weights).replace("METHOD", method))
        return str(path)

    return write


@pytest.fixture
def written(tmp_path, tiny_checkpoint):
    """Quantizes a tiny model, and gives its matrices as they are decoded."""

    def run(path, name, *overrides, model="llama", **options):
        out = tmp_path / name
        source = str(tiny_checkpoint(model))
        report = quantize(QuantizeOptions(source, path, out, overrides, device="cpu", dtype="fp32", **options))
        result = open_artifact(str(out))
        return {e.name: result.tensor(f"{e.name}.weight") for e in report.layers if e.format}, report

    return run


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("weights", "method"),
    [("int3-g32", "gptq"), ("nvfp4", "gptq"), ("q4_0", "{rtn: {importance: true}}"), ("int2-g32", "learned")],
)
def test_weights_without_power_change_nothing_and_others_do(weights, method, recipe, written):
    path = recipe(weights, "{learned: {steps: 4}}" if method == "learned" else method)
    plain, report = written(path, "plain")
    weighed, told = written(path, "weighed", WEIGHED)
    assert not any(torch.equal(plain[name], weighed[name]) for name in plain if "embed" not in name)
    assert same(written(path, "again", WEIGHED)[0], weighed)
    assert told.calibration["token_weights"] == {"groups": 2, "power": 1, "cap": 20, "labels": "text"}
    assert {e.tokens for e in told.layers if e.method == "gptq"} <= {6 * 48}
    if method != "learned":  # which then has all tokens count alike, instead of by their energy
        even, others = written(path, "even", WEIGHED, "calibration.token_weights.power=0")
        assert same(even, plain)
        assert [e.output_error_db for e in others.layers] == pytest.approx([e.output_error_db for e in report.layers])


def test_gram_matrices_are_sums_over_weighted_tokens(recipe, written, tiny_checkpoint, monkeypatch):
    """Of all layers of a model that nothing is quantized in front of, against autograd of the whole model."""
    seen, kind = [], registry.load("methods", "gptq")
    original = kind.solve

    def spy(self, w, stats, fmt):
        seen.append((w.clone(), stats[Gram].matrix.clone()))
        return original(self, w, stats, fmt)

    monkeypatch.setattr(kind, "solve", spy)
    monkeypatch.setattr("qtool.pipeline.solve.rows_abreast", lambda w, *_: [(0, len(w))])
    path, source = recipe(), tiny_checkpoint("llama-biased")
    written(path, "out", WEIGHED, FLOAT, model="llama-biased")
    tokens = load_tokens(load_recipe(path).calibration, open_checkpoint(str(source)))
    inputs, gradients = inputs_and_gradients(source, tokens)
    state = open_checkpoint(str(source))
    assert len(seen) == 2 * 2 * 7
    names = [f"model.layers.{i}.{name}_proj" for i in (0, 1) for name in ORDER]
    for number, (w, gram) in enumerate(seen):
        name, half = names[number // 2], number % 2
        whole = state.tensor(f"{name}.weight").float()
        rows = slice(half * len(whole) // 2, (half + 1) * len(whole) // 2)
        assert torch.equal(w, whole[rows])
        squares = gradients[name][:, rows].double().square().mean(1)
        weights = (squares / squares.mean()).clamp(max=20)
        wanted = torch.zeros(w.shape[1], w.shape[1], dtype=torch.float64)
        for x, weight in zip(inputs[name].double(), weights / weights.mean(), strict=True):
            wanted += weight * torch.outer(x, x)
        assert_close(gram.double(), wanted, rtol=2e-3, atol=1e-4 * float(wanted.diagonal().mean()))


ORDER = [f"self_attn.{x}" for x in "qkvo"] + [f"mlp.{x}" for x in ("gate", "up", "down")]


def test_tempered_weights():
    squares = torch.tensor([[[1.0, 0.0], [3.0, 0.0]], [[4.0, 0.0], [8.0, 0.0]]])
    plain = tempered(squares, TokenWeights(power=1))
    assert_close(plain[..., 0], torch.tensor([[0.25, 0.75], [1.0, 2.0]]))
    assert_close(plain[..., 1], torch.ones(2, 2))
    roots = tempered(squares, TokenWeights())[..., 0]
    assert_close(roots, torch.tensor([[1, 3], [4, 8]]).sqrt() / torch.tensor([1.0, 3, 4, 8]).sqrt().mean())
    capped = tempered(squares, TokenWeights(power=1, cap=1))[..., 0]
    assert_close(capped, torch.tensor([[1.0, 3], [4, 4]]) / 3)


@pytest.mark.parametrize(("weights", "method"), [("int3-g32", "gptq"), ("q4_0", "{rtn: {importance: true}}")])
def test_stored_statistics_serve_as_those_that_are_walked(weights, method, recipe, written, tiny_checkpoint, tmp_path):
    path, source = recipe(weights, method), str(tiny_checkpoint("llama"))
    walked, _ = written(path, "walked", WEIGHED, FLOAT)
    calibrate(CalibrateOptions(source, path, tmp_path / "stats", (WEIGHED, FLOAT), dtype="fp32"))
    stored, _ = written(path, "stored", WEIGHED, FLOAT, stats=tmp_path / "stats")
    assert same(stored, walked)
    with pytest.raises(PlanError, match="token_weights is left out, it was measured with"):
        written(path, "other", FLOAT, stats=tmp_path / "stats")


def test_an_importance_matrix_weighs_tokens_for_each_matrix(recipe, written, tiny_checkpoint, tmp_path):
    path, source = recipe("q4_0", "{rtn: {importance: true}}"), str(tiny_checkpoint("llama"))
    one = WEIGHED.replace("groups: 2", "groups: 1")
    walked, _ = written(path, "walked", one, FLOAT)
    calibrate(CalibrateOptions(source, path, tmp_path / "m.gguf", (WEIGHED, FLOAT), dtype="fp32"))
    stored, _ = written(path, "stored", imatrix=tmp_path / "m.gguf")
    assert same(stored, walked)
    plain, _ = written(path, "plain", FLOAT)
    assert not torch.equal(plain["model.layers.0.self_attn.q_proj"], stored["model.layers.0.self_attn.q_proj"])


def test_experts_and_what_they_share_inputs_with(recipe, written):
    plain, _ = written(recipe(), "plain", "calibration.min_tokens=1", model="qwen3_moe")
    weighed, _ = written(recipe(), "weighed", WEIGHED, "calibration.min_tokens=1", model="qwen3_moe")
    first = "model.layers.0.self_attn.v_proj"
    assert not torch.equal(plain[first], weighed[first])
    assert plain.keys() == weighed.keys()
