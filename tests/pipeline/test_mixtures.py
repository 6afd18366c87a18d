"""Mixtures of experts, the whole way: tokens per expert, experts without enough of them, statistics from a file."""

from __future__ import annotations

import pydoc_data.topics
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from qtool.artifact.qtool import Qtool
from qtool.calibrate.shards import StatsFolder
from qtool.calibrate.tokens import load_tokens
from qtool.calibrate.walker import Walker
from qtool.checkpoint.modules import modules
from qtool.checkpoint.open import open_checkpoint
from qtool.formats.int import Int
from qtool.methods.rtn import RTN
from qtool.models import open_artifact
from qtool.pipeline.calibrate import CalibrateOptions
from qtool.pipeline.calibrate import run as calibrate
from qtool.pipeline.prepare import prepare
from qtool.pipeline.quantize import QuantizeOptions
from qtool.pipeline.quantize import run as quantize
from qtool.pipeline.units import comparable
from qtool.recipe.load import load_recipe
from qtool.stats.drift import Drift

RECIPE = """
recipe: 1
name: mixture
calibration: {data: TEXT, samples: 3, length: 48, propagate: float}
layers:
  - {match: lm_head, keep: true}
  - {match: "*", weights: int3-g32, method: gptq}
export: [{to: qtool}]
"""
INT3 = Int(bits=3, group=32)


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(list(pydoc_data.topics.topics.values())[:9]))
    path = tmp_path / "mixture.yaml"
    path.write_text(RECIPE.replace("TEXT", str(tmp_path / "text.txt")))
    return str(path)


def routed(folder, recipe):
    """Tokens that transformers' routers send to each expert: (block, expert) -> count."""
    from transformers import AutoModelForCausalLM

    model, counts = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), {}
    for i, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(
            lambda _, x, y, i=i: counts.update({(i, e): int((y[2] == e).any(1).sum()) for e in range(len(y[0][0]))})
        )
    with torch.no_grad():
        model(load_tokens(load_recipe(recipe, ()).calibration, open_checkpoint(str(folder))))
    return counts


def test_inputs_that_drift_by_other_routes_are_not_compared(recipe, tiny_checkpoint):
    """What an expert reads, and what is as wide as the MLP, is measured without the unquantized model beside it."""
    job = prepare(str(tiny_checkpoint("qwen3_moe")), recipe, device="cpu")
    asked = {p.module.name: Drift in comparable((p,)) for p in job.plan.layers if p.format}
    assert all(Drift in p.needs for p in job.plan.layers if p.format)
    assert {name.split(".")[-1] for name, drifts in asked.items() if drifts} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {name.split(".")[-1] for name, drifts in asked.items() if not drifts} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }


def test_experts_that_few_tokens_reach_are_rounded_without_data(recipe, tiny_checkpoint, tmp_path):
    folder, counts = tiny_checkpoint("qwen3_moe"), routed(tiny_checkpoint("qwen3_moe"), recipe)
    least = sorted(counts.values())[4]
    options = {"device": "cpu", "dtype": "fp32", "overrides": (f"calibration.min_tokens={least}",)}
    report = quantize(QuantizeOptions(str(folder), recipe, tmp_path / "out", **options))
    source, found = open_checkpoint(str(folder)), Qtool().open(tmp_path / "out")
    entries = [entry for entry in report.layers if entry.expert is not None]
    assert len(entries) == 2 * 6 * 3
    few = 0
    for entry in entries:
        assert entry.tokens == counts[entry.block, entry.expert]
        rounded = RTN().solve(source.tensor(f"{entry.name}.weight").float(), None, INT3).quantized.codes
        starved = counts[entry.block, entry.expert] < least
        few += starved
        if starved:
            assert entry.fallback == f"rounded to nearest: fewer than {least} calibration tokens reached this expert"
            assert (entry.method, entry.output_error_db) == ("rtn", None)
        else:
            assert (entry.method, entry.fallback) == ("gptq", None)
            assert entry.output_error_db > entry.weight_error_db
        assert torch.equal(found.matrix(entry.name).quantized.codes, rounded) == starved
    assert 3 <= few <= 4 * 3
    assert {e.tokens for e in report.layers if e.expert is None and e.format} == {3 * 48}
    assert "## Tokens per expert" in (tmp_path / "out" / "report.md").read_text()


def test_all_tokens_may_be_shown_to_all_experts(recipe, tiny_checkpoint, tmp_path):
    """Which changes what experts are measured on, and nothing that other layers read."""
    folder, errors = str(tiny_checkpoint("qwen2_moe")), {}
    for shown in ("routed", "all"):
        overrides = ("calibration.min_tokens=1", f"calibration.experts={shown}")
        options = QuantizeOptions(folder, recipe, tmp_path / shown, overrides=overrides, device="cpu", dtype="fp32")
        report = quantize(options)
        tokens = {entry.tokens for entry in report.layers if entry.expert is not None}
        assert (tokens == {3 * 48}) == (shown == "all")
        errors[shown] = {entry.name: entry.output_error_db for entry in report.layers if entry.format}
    for entry in report.layers:
        if entry.format:
            same = errors["all"][entry.name] == pytest.approx(errors["routed"][entry.name], rel=1e-5)
            assert same == (entry.expert is None)


@pytest.fixture
def unreached(tiny_checkpoint, tmp_path):
    """gpt-oss whose routers never choose expert 3 of block 1."""
    folder = shutil.copytree(tiny_checkpoint("gpt_oss"), tmp_path / "unreached")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.router.bias"][3] = -1e4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_an_expert_that_no_token_reaches(unreached, recipe, tmp_path):
    overrides = ("calibration.min_tokens=1",)
    report = quantize(QuantizeOptions(str(unreached), recipe, tmp_path / "out", overrides=overrides, device="cpu"))
    fallen = {entry.name: (entry.tokens, entry.fallback) for entry in report.layers if entry.fallback}
    text = "rounded to nearest: fewer than 1 calibration tokens reached this expert"
    assert fallen == {f"model.layers.1.mlp.experts.3.{x}_proj": (0, text) for x in ("gate", "up", "down")}


@pytest.mark.parametrize("name", ["stats", "imatrix.gguf"])
def test_statistics_in_a_file(name, unreached, recipe, tmp_path):
    """Inputs that nothing reached are not in it, and the layers behind them say so."""
    path = tmp_path / name
    calibrate(CalibrateOptions(str(unreached), recipe, path, device="cpu", dtype="fp32"))
    if name == "stats":
        experts = {reads: held.tokens for reads, held in StatsFolder(path).index.inputs.items() if ".experts." in reads}
        assert len(experts) == 2 * (2 * 4) - 2
        assert not [reads for reads in experts if ".1.mlp.experts.3." in reads]
        assert sum(n for reads, n in experts.items() if reads.endswith(".in")) == 2 * 2 * 3 * 48
    by_importance = Path(recipe).read_text().replace("gptq", "{rtn: {importance: true}}").replace("int3-g32", "q4_0")
    Path(recipe).write_text(by_importance)
    options = {"stats": path, "overrides": ("calibration.min_tokens=1",), "device": "cpu"}
    report = quantize(QuantizeOptions(str(unreached), recipe, tmp_path / "out", **options))
    fallen = {entry.name: entry.fallback for entry in report.layers if entry.fallback}
    assert set(fallen) == {f"model.layers.1.mlp.experts.3.{x}_proj" for x in ("gate", "up", "down")}
    assert all("chosen without data" in text for text in fallen.values())


def test_smoothing_expert_by_expert_keeps_outputs_and_routes(tiny_checkpoint, tmp_path):
    """Of a model with outliers in what routers and experts read, whose inputs are rounded to four bits."""
    source = tmp_path / "outliers"
    shutil.copytree(tiny_checkpoint("mixtral"), source)
    w = load_file(source / "model.safetensors")
    for name in [name for name in w if "block_sparse_moe" in name and not name.endswith("w2.weight")]:
        w[name][:, ::21] /= 30
    for i in range(2):
        w[f"model.layers.{i}.post_attention_layernorm.weight"][::21] *= 30
    save_file(w, source / "model.safetensors", metadata={"format": "pt"})
    tokens = torch.randint(3, 500, (4, 48), generator=torch.Generator().manual_seed(4))
    wanted, routes = outputs_and_routes(open_checkpoint(str(source)), tokens)
    lost, agree = {}, {}
    for name, transforms in (("plain", []), ("experts", [{"smooth": {"alpha": 0.6, "experts": "largest"}}])):
        inside = {"match": "role:gate,up,down", "weights": "int6-channel", "activations": "int4-token"}
        told = {"recipe": 1, "name": name, "calibration": {"samples": 4, "length": 48, "min_tokens": 1}}
        told |= {
            "transforms": transforms,
            "layers": [inside, {"match": "*", "keep": True}],
            "export": [{"to": "qtool"}],
        }
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(told))
        quantize(QuantizeOptions(str(source), str(tmp_path / "r.yaml"), tmp_path / name, dtype="fp32"))
        found, taken = outputs_and_routes(open_artifact(str(tmp_path / name)), tokens)
        lost[name] = float((found - wanted).square().sum() / wanted.square().sum())
        agree[name] = sum(float((a == b).float().mean()) for a, b in zip(taken, routes, strict=True)) / len(routes)
    assert lost["experts"] < 0.3 * lost["plain"]
    assert agree["plain"] < 0.98
    assert agree["experts"] > agree["plain"]


def outputs_and_routes(model, tokens):
    """Hidden states behind the last block, and which experts every token visits in each, as bool [T, E]."""
    walker, routes = Walker(model, torch.device("cpu"), torch.float32), []
    hidden = walker.embed(tokens)
    for i in range(len(walker.blocks)):
        block, scores = walker.load_block(i), []
        (router,) = (m for m in modules(model) if m.block == i and m.kind == "router")
        module = block.get_submodule(walker.path(router))
        module.register_forward_hook(lambda _, __, y, scores=scores: scores.append(y[0] if isinstance(y, tuple) else y))
        walker.advance(block, i, hidden)
        scores = torch.cat(scores)
        routes.append(scores >= scores.topk(2, dim=1).values[:, 1:])
    return hidden.values.float(), routes
