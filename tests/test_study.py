"""The study of docs/study.md: its page, its formats, and what it computes on a tiny model."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from benchmarks import models, page, study, tensors
from benchmarks.comparisons import FORMATS, METHODS, PAIRS, TABLES, VARIANTS, Row, Run, Table, runs, tensor_formats
from benchmarks.tensors import Pair
from qtool.calibrate.inputs import quantize_tokens
from qtool.checkpoint.hf import HFCheckpoint
from qtool.evaluate.run import evaluate
from qtool.formats._spelling import parse_format
from qtool.methods._base import Method
from qtool.models import open_artifact
from qtool.pipeline.quantize import QuantizeOptions, run
from scripts.prose import prose
from tests.artifact.conftest import quantize

TEXT = page.PAGE.read_text(encoding="utf-8")


def cells(table):
    """A Markdown table as rows of cells."""
    return [line.strip("| ").split(" | ") for line in table.strip().splitlines()]


def test_page_has_the_tables_of_the_bench():
    parts = {part[1]: cells(part[2]) for part in (match.groups() for match in page.PART.finditer(TEXT))}
    assert parts.keys() == page.PARTS.keys()
    assert TEXT.count("<!-- table ") == 2 * len(parts)
    for name, made in page.PARTS.items():
        labels = len(TABLES[name].labels) if name in TABLES else 1
        blank = cells(made({}))
        assert parts[name][:2] == blank[:2]
        assert [line[:labels] for line in parts[name]] == [line[:labels] for line in blank]
        assert all(len(line) == len(blank[0]) for line in parts[name])


def test_page_is_complete():
    assert page.MISSING not in "".join(match[3] for match in page.PART.finditer(TEXT))
    plots = set(re.findall(r"\]\((study-[\w-]+\.svg)\)", TEXT))
    assert plots == {f"study-{name}.svg" for name in page.PLOTS}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_hold_the_rows_of_the_model(name):
    fmt = parse_format(FORMATS[name])
    assert [fmt.misfit(k) for k in (576, 1536)] == [None, None]


def test_runs_are_all_that_the_tables_show_and_each_once():
    assert {Method.of(m).name() for m in METHODS.values()} == {"rtn", "gptq"}
    found = runs()
    keys = [run.key("plain") for run in found]
    assert len(set(keys)) == len(keys)
    shown = {run for table in TABLES.values() for row in table.rows for run in row.runs}
    assert set(found) == shown
    for table in TABLES.values():
        assert all((len(row.labels), len(row.runs)) == (len(table.labels), len(table.headings)) for row in table.rows)
    for weights, inputs, method in found:
        assert weights in FORMATS and method in METHODS and inputs in {"", *FORMATS}
        assert (
            not inputs
            or parse_format(FORMATS[inputs]).levels().numel() == parse_format(FORMATS[weights]).levels().numel()
        )
    same = [(run.weights, run.method) for run in found]
    assert sum(a != b for a, b in pairwise(same)) == len(set(same)) - 1  # weights are rounded once
    for pair in PAIRS:  # both sides by every way of the other
        sides = [{(bool(r.inputs), r.method) for r in found if r.weights == name} for name in pair[:2]]
        assert sides[0] <= sides[1] and sides[0]


@pytest.mark.parametrize(
    ("name", "label"), [("MXINT8", "mxint8-up"), ("MXFP8", "mxfp8-up"), ("MXFP6", "mxfp6-up"), ("MXFP4", "mxfp4-up")]
)
def test_covering_formats_are_those_of_the_specification(name, label):
    x = torch.randn(8, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 8)[:, None]
    fmt, wanted = parse_format(FORMATS[name]), parse_format(label)
    params = wanted.fit(x)
    expected = wanted.decode(wanted.snap(x, params), params)
    assert torch.equal(tensors.rounded(x, fmt, "weight"), expected)
    assert torch.equal(quantize_tokens(x, fmt), expected)  # as well at run time


@pytest.mark.parametrize("outliers", [1.0, 40.0])
def test_models_off_grid_compute_the_same(outliers, tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("llama")
    made = models.off_grid(source, tmp_path / "made", outliers=outliers)
    tokens, inputs, logits = torch.arange(3, 200).view(1, -1), [], []
    for folder in (source, made):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        for layer in model.model.layers:
            for linear in (layer.self_attn.q_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                linear.register_forward_pre_hook(lambda _, x: inputs.append(x[0][0].square().mean(0).sqrt()))
        with torch.no_grad():
            logits.append(model(tokens).logits)
    assert (logits[1] - logits[0]).norm() < 0.02 * logits[0].norm()  # weights are rounded to bfloat16 once more
    half = len(inputs) // 2
    for before, after in zip(inputs[:half], inputs[half:], strict=True):
        assert int((after / before > 15).sum()) == (models.CHANNELS if outliers > 1 else 0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "prose.txt"
    path.write_text(prose()[:8000], encoding="utf-8")
    return path


@pytest.fixture
def bench(tiny_checkpoint, text, tmp_path):
    return study.Bench(tiny_checkpoint("llama"), text, 2, torch.device("cpu"), tmp_path)


@pytest.mark.parametrize("inputs", ["", "MXFP6", "NVFP4"])
def test_divergence_is_that_of_eval(inputs, bench, text):
    fmt, rounded = parse_format(FORMATS["MXFP4"]), parse_format(FORMATS[inputs]) if inputs else None
    model, source = quantize(bench.path, fmt, rounded), HFCheckpoint(bench.path)
    if inputs == "NVFP4":
        model.layers = bench.layers("MXFP4", inputs)  # which may have to be calibrated
    settings = {"context": 512, "chunks": 2, "device": torch.device("cpu"), "dtype": torch.float32}
    wanted = evaluate(model, source, text, **settings, progress=lambda *_: None).kld_mean
    found = bench.divergence(bench.matrices("MXFP4", "RTN"), bench.layers("MXFP4", inputs))
    assert found == pytest.approx(wanted, rel=1e-6)
    assert found > 1e-3


def test_scales_for_all_tokens_are_those_of_a_run(bench, tmp_path):
    rule = {"match": "*", "weights": "int8-channel", "activations": FORMATS["INT8, tensor"]}
    calibration = study.CALIBRATION | {"propagate": "float"}
    recipe = {"recipe": 1, "name": "x", "calibration": calibration, "layers": [rule], "export": [{"to": "qtool"}]}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(recipe))
    run(QuantizeOptions(str(bench.path), str(tmp_path / "x.yaml"), tmp_path / "out", device="cpu", dtype="fp32"))
    wanted = open_artifact(tmp_path / "out").layers
    for name, layer in bench.layers("INT8, channel", "INT8, tensor").items():
        assert layer.static is not None
        assert layer == wanted[name]


def test_gptq_gives_its_own_matrices(bench):
    found = [bench.matrices("MXFP4, searched", method) for method in METHODS]
    for name, rounded in found[0].items():
        assert not any(torch.equal(rounded, other[name]) for other in found[1:])
        assert not torch.equal(found[1][name], found[2][name])


def test_a_run_that_was_cut_goes_on(bench, text, tmp_path, monkeypatch):
    wanted = [Run("MXINT8"), Run("MXFP4"), Run("MXFP4", "MXFP4")]
    monkeypatch.setattr(study, "runs", lambda: wanted[:2])
    monkeypatch.setattr(models, "checkpoint", lambda out: out)
    monkeypatch.setattr(models, "off_grid", lambda source, out, outliers: bench.path)
    first = study.study(tmp_path, text, 1, "cpu")
    monkeypatch.setattr(study, "runs", lambda: wanted)
    monkeypatch.setattr(tensors, "measure", None)  # nothing is done twice
    second = study.study(tmp_path, text, 1, "cpu")
    added = {run.key(variant) for run in wanted[2:] for variant in VARIANTS}
    assert {key: second[key] for key in first} == first
    assert second.keys() - first.keys() == added
    monkeypatch.setattr(study, "Bench", None)
    assert study.study(tmp_path, text, 1, "cpu") == second == json.loads((tmp_path / "study.json").read_text())
    assert study.study(tmp_path, text, 2, "cpu") == second  # nothing to measure, under whatever conditions
    monkeypatch.setattr(study, "runs", lambda: [*wanted, Run("MXFP8")])
    with pytest.raises(SystemExit, match="was begun with"):
        study.study(tmp_path, text, 2, "cpu")


def test_tensors_against_loops(bench):
    names = {kind: {n: f for n, f in every.items() if n[:2] == "NV"} for kind, every in tensor_formats().items()}
    pair = PAIRS[-1]
    found = tensors.measure(bench.checkpoint, bench.tokens[:1, :64], bench.device, names, (pair,))
    assert [(r["kind"], r["role"]) for r in found["tensors"][:8]] == [
        *(("weight", role) for role in ("q", "k", "v", "o", "gate", "up", "down")),
        ("input", "attn_in"),
    ]
    w = bench.checkpoint.tensor("model.layers.0.self_attn.q_proj.weight").float()
    blocks, record = w.view(-1, 16), found["tensors"][0]
    errors = {}
    for name in pair[:2]:
        fmt = parse_format(FORMATS[name])
        params = fmt.fit(w)
        errors[name] = fmt.decode(fmt.snap(w, params), params) - w
        decibels = 10 * math.log10(float(w.square().sum() / errors[name].square().sum()))
        assert record["decibels"][name] == pytest.approx(decibels, abs=1e-3)
    crests = sorted(float(max(abs(v) for v in block) / block.square().mean().sqrt()) for block in blocks)
    at = 0.75 * (len(crests) - 1)
    below, above = crests[int(at)], crests[int(at) + 1]
    assert record["crests"]["16"] == pytest.approx(below + (at - int(at)) * (above - below), rel=1e-4)
    total = tensors.binned(w, *(e.square() for e in errors.values()), 16, 41)
    sums = {}
    for i, block in enumerate(blocks):
        at = int(float(block.abs().max() / block.square().mean().sqrt()) / tensors.STEP)
        share = [float(e.view(-1, 16)[i].square().sum() / block.square().sum()) for e in errors.values()]
        old = sums.get(at, (0.0, 0.0, 0.0))
        sums[at] = (old[0] + share[0], old[1] + share[1], old[2] + 1)
    assert {i: pytest.approx(tuple(row)) for i, row in enumerate(total.tolist()) if row[2]} == sums
    every = tensors.every(bench.checkpoint, bench.tokens[:1, :64], bench.device)
    assert sum(n for *_, n in found["crests"]["NVFP4"]) == sum(tensor.values.numel() // 16 for tensor in every)


def test_least_divergence_of_rivals_is_bold():
    rows = tuple(Row((w,), (Run(w),), rival) for w, rival in (("MXINT8", 0), ("MXFP8", 0), ("NVFP4", 1)))
    values = {"MXINT8": (0.02, 0.5), "MXFP8": (0.0312345, 0.4), "NVFP4": (2.0, 3.0)}
    found = {Run(w).key(v): x for w, pair in values.items() for v, x in zip(VARIANTS, pair, strict=True)}
    lines = cells(page.divergences(Table(("format",), ("weights",), rows), found))
    assert lines[0] == ["format", "weights, plain", "weights, outliers"]
    assert lines[2:] == [
        ["MXINT8", "**0.02**", "0.5"],
        ["MXFP8", "0.0312", "**0.4**"],
        ["NVFP4", "**2**", "**3**"],
    ]


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        ([(1.0, 10.0), (1.0, 10**0.1), (10**0.3, 1.0)], "2.25"),  # 10, 1 and -3 dB
        ([(1.0, 2.0), (1.0, 2.0), (1.0, 1.1)], "> 3.00"),
        ([(2.0, 1.0), (1.0, 2.0), (1.0, 2.0)], "< 1.00"),
    ],
)
def test_crest_factor_at_which_integers_fall_behind(errors, said):
    bins = [[float(at), *pair, 1000] for at, pair in enumerate(errors, 1)]
    bins.append([9.0, 5.0, 1.0, page.SCARCE - 1])  # too few blocks to count
    found = {"plain": {"crests": {"F": bins}}}
    assert page.crossing(found, "plain", Pair("I", "F", 32)) == said
