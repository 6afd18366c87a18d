"""Models whose weights training left on a grid: found by their values, taken over exactly, or said to be destroyed."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.formats._spelling import parse_format
from qtool.formats.int import Int
from qtool.models import open_artifact
from qtool.numerics.grids.trained import multiples
from qtool.numerics.threads.ranks import Ranks
from qtool.pipeline.prepare import prepare
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.pipeline.trained import PLAIN, forms, held, trained_grid, trained_lines
from tests.artifact.conftest import save_llama

LEVELS = {
    "ternary": (-1, 0, 1),
    "paretoq": (-1.5, -0.5, 0.5, 1.5),
    "two bits": (-2, -1, 0, 1),
    "two bits upside down": (-1, 0, 1, 2),
    "three bits": (-4, -3, -2, -1, 0, 1, 2, 3),
}


def drawn(levels, width, dtype=torch.bfloat16, n=5, k=512, scales=torch.float32):
    """Random levels times a scale per row and group of columns: the products, level by level, rounded to a type."""
    draw = torch.Generator().manual_seed(len(levels) + width)
    codes = torch.tensor(levels, dtype=torch.float64)[torch.randint(len(levels), (n, k), generator=draw)]
    scale = (0.01 + torch.rand(n, k // width, generator=draw)).to(scales).double()
    return (codes * scale.repeat_interleave(width, dim=1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [512, 128, 32])
@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
def test_products_are_found_again_whatever_rounded_them(levels, width, dtype):
    w = drawn(levels, width, dtype)
    codes, scale = multiples(w)
    assert scale.shape == (5, 512 // width)
    again = torch.empty_like(w)
    for i in range(5):
        for j in range(512):
            again[i, j] = float(codes[i, j]) * float(scale[i, j // width])
    assert torch.equal(again, w)
    assert int(codes.abs().max()) == max(abs(level) for level in levels) * (2 if 0.5 in levels else 1)


def test_only_grids_are_grids():
    w = drawn(LEVELS["ternary"], 128)
    other = w.clone()
    other[4, 300] *= 1.5
    infinite = w.clone()
    infinite[0, 0] = torch.nan
    random = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    for tensor in (other, infinite, random, torch.zeros(4, 512), w.float() + 0.01):
        assert multiples(tensor) is None
    w[:, 128:256] = 0
    assert bool((multiples(w)[1][:, 1] == 1).all())
    nine = drawn(range(-4, 5), 512)
    assert multiples(nine) is not None
    assert forms(nine) == ()


@pytest.mark.parametrize(
    ("levels", "width", "wanted"),
    [
        ("ternary", 512, "tq1_0"),
        ("ternary", 256, "tq2_0"),
        ("ternary", 128, "int2-g128"),
        ("ternary", 128, "q4_0"),
        ("ternary", 512, "q2_k"),
        ("two bits", 128, "int2-g64"),
        ("two bits upside down", 512, "int2-g64"),
        ("paretoq", 512, "biased2-channel"),
        ("paretoq", 128, "biased2-g64"),
        ("paretoq", 128, "int3-g128"),
        ("paretoq", 512, "q2_k"),
        ("paretoq", 512, "q3_k"),
        ("three bits", 128, "int3-g128"),
        ("three bits", 512, "q3_k"),
    ],
)
def test_formats_that_have_the_values_hold_them(levels, width, wanted):
    w = drawn(LEVELS[levels], width, scales=torch.bfloat16)
    same = held(parse_format(wanted), forms(w))
    assert same.format.label == wanted
    assert torch.equal(same.decode().bfloat16(), w)


@pytest.mark.parametrize(
    ("levels", "width", "wanted", "why"),
    [
        ("ternary", 128, "tq2_0", "tq2_0 needs groups that are a multiple of 256 columns, not 128"),
        ("ternary", 512, "iq2_xxs", "iq2_xxs holds no int2-channel"),
        ("two bits", 512, "tq1_0", "tq1_0 has three levels, and all four of int2-channel are used"),
        ("paretoq", 512, "int2-g128", "int2-g128 holds no biased2-channel"),
        ("three bits", 512, "q2_k", "the range of int3-channel does not fit q2_k"),
    ],
)
def test_others_say_why_not(levels, width, wanted, why):
    assert held(parse_format(wanted), forms(drawn(LEVELS[levels], width))) == why


def test_scales_that_fp16_does_not_have_are_told():
    w = drawn(LEVELS["ternary"], 512) * 2.0**-30
    assert held(parse_format("tq1_0"), forms(w)) == "some scales are not exact in fp16"
    assert held(Int(bits=2, group=128), forms(w)).format.scale_dtype == "bf16"


@pytest.fixture
def trained(tmp_path: Path):
    """Writes a tiny Llama whose linear layers are on a grid, and gives its folder and tensors."""

    def write(levels: str, width: int | None = None):
        folder = save_llama(tmp_path / "in", 256, torch.bfloat16)
        tensors = load_file(folder / "model.safetensors")
        for name, w in tensors.items():
            if "_proj" in name:
                tensors[name] = drawn(LEVELS[levels], width or w.shape[1], n=len(w), k=w.shape[1]).to(w.dtype)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder, tensors

    return write


def recipe(folder: Path, weights: str, to: str, method: object = "rtn") -> str:
    """A recipe for all linear layers of blocks."""
    rules = [{"match": "lm_head", "keep": True}, {"match": "*", "weights": weights, "method": method}]
    data = {"data": "builtin", "samples": 2, "length": 32}
    text = {"recipe": 1, "name": "some", "calibration": data, "layers": rules, "export": [{"to": to}]}
    (path := folder / "some.yaml").write_text(json.dumps(text))
    return str(path)


@pytest.mark.parametrize(
    ("levels", "weights", "to", "method"),
    [
        ("ternary", "tq2_0", "gguf", "rtn"),
        ("ternary", "int2-g64", "compressed-tensors", "gptq"),
        ("ternary", "int2-g32", "qtool", "learned"),
        ("paretoq", "q2_k", "gguf", "gptq"),
        ("paretoq", "biased2-g64", "mlx", "rtn"),
    ],
)
def test_a_trained_model_is_taken_over_whatever_method_the_recipe_names(levels, weights, to, method, trained, tmp_path):
    folder, tensors = trained(levels)
    report = run(QuantizeOptions(str(folder), recipe(tmp_path, weights, to, method), tmp_path / "out"))
    found = open_artifact(str(tmp_path / "out"))
    done = [entry for entry in report.layers if entry.format]
    assert {entry.method for entry in done} == {"taken over"}
    for entry in done:
        w = tensors[f"{entry.name}.weight"]
        assert torch.equal(found.tensor(f"{entry.name}.weight").to(w.dtype), w), entry.name
    assert any(
        "matrices are on a grid that training left" in text and "taken over as" in text for text in report.warnings
    )


def test_what_does_not_hold_it_is_told_by_plan_and_report(trained, tmp_path):
    folder, _ = trained("ternary", 128)
    chosen = recipe(tmp_path, "tq2_0", "gguf")
    (line,) = (text for text in prepare(str(folder), chosen).plan.warnings if "grid" in text)
    assert "(3 levels, a scale per 128 columns) and rounded again to tq2_0, which they do not survive" in line
    report = run(QuantizeOptions(str(folder), chosen, tmp_path / "out"))
    fallbacks = {entry.fallback for entry in report.layers if entry.format}
    assert len(fallbacks) == 1
    assert "rounded off the grid that training left (3 levels, a scale per 128 columns): tq2_0 needs" in fallbacks.pop()


def test_transforms_move_weights_off_their_grid_and_plans_say_so(trained, tmp_path):
    folder, _ = trained("ternary")
    asked = ("transforms=[equalize]",)
    warnings = prepare(str(folder), recipe(tmp_path, "int2-g64", "qtool"), asked).plan.warnings
    assert any("transforms move them off it" in text for text in warnings)


class Pair(Ranks):
    """One of two processes that are threads."""

    def __init__(self, rank, items, met):
        super().__init__(rank, 2)
        self.items, self.met = items, met

    def gather(self, item):
        self.items[self.rank] = item
        self.met.wait(60)
        return self.items


def test_several_processes_look_at_weights_and_say_what_one_does(trained, tmp_path):
    folder, tensors = trained("ternary")
    name = "model.layers.0.self_attn.k_proj"
    tensors[f"{name}.weight"] = torch.randn_like(tensors[f"{name}.weight"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    job = prepare(str(folder), recipe(tmp_path, "tq2_0", "gguf"))
    alone, plain = trained_lines(job.plan, job.original), PLAIN.pop(job.original)
    assert len(alone) == 1 and plain == {name}
    items, met = [None, None], threading.Barrier(2)
    with ThreadPoolExecutor(2) as both:
        told = both.map(lambda rank: trained_lines(job.plan, job.original, Pair(rank, items, met)), (0, 1))
        assert [*told] == [alone, alone]
    assert PLAIN[job.original] == plain


def test_a_run_does_not_look_again_where_the_plan_found_no_grid(tiny_checkpoint, recipes, tmp_path, monkeypatch):
    probes = []

    def counted(checkpoint, module, probe=False):
        probes.append((module, probe))
        return trained_grid(checkpoint, module, probe)

    monkeypatch.setattr("qtool.pipeline.requantize.trained_grid", counted)
    run(QuantizeOptions(str(tiny_checkpoint("qwen3")), recipes["gguf"], tmp_path / "out"))
    assert probes == []
    monkeypatch.setattr("qtool.pipeline.requantize.PLAIN", {})
    run(QuantizeOptions(str(tiny_checkpoint("qwen3")), recipes["gguf"], tmp_path / "again"))
    assert len(probes) > 10
