"""The library: its page as it stands, and what callers may rely on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qtool
from qtool import api
from qtool.errors import GateError, NumericsError, PlanError, RecipeError, UsageError
from qtool.formats.int import Int
from qtool.methods.rtn import RTN

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROSE = "Nothing is printed: progress goes to a listener, which is called for each step and for each warning. " * 20


@pytest.fixture
def beside(tiny_checkpoint, tmp_path, monkeypatch):
    """The working folder holds a model and a text."""
    (tmp_path / "SmolLM2-135M").symlink_to(tiny_checkpoint("llama"))
    (tmp_path / "prose.txt").write_text(PROSE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_runs_as_it_stands(beside, capsys):
    space: dict[str, object] = {}
    for block in BLOCK.findall((ROOT / "docs" / "api.md").read_text(encoding="utf-8")):
        exec(compile(block, "docs/api.md", "exec"), space)
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    report, quality, mixed = space["report"], space["quality"], space["mixed"]
    quantized = [e for e in report.layers if e.format]
    assert space["worst"] == min(quantized, key=lambda e: e.output_error_db).name
    assert f", {len(quantized)} matrices, the worst is {space['worst']} with " in printed.out
    assert 0 < quality.kld_mean < 1
    assert f"KL divergence {quality.kld_mean:.4f}" in printed.out
    assert re.search(
        r"^mlx \d+ bytes\n4 .*fp8.*int4-g64.*: model\.layers\.0\.\S+ and 13 more$", printed.out, re.MULTILINE
    )
    decibels = {m: float(d) for m, d in re.findall(r"^q4_k .*(rtn|gptq).* (\d+\.\d) dB$", printed.out, re.MULTILINE)}
    assert decibels["gptq"] > decibels["rtn"] + 2
    assert torch.equal(space["weight"], space["stored"].decode())
    assert qtool.plan("SmolLM2-135M", mixed).bits_per_weight == pytest.approx(float(lines[-1]))


def test_importing_the_package_imports_nothing_heavy():
    program = (
        "import sys, qtool\nassert {'quantize', 'plan'} <= set(dir(qtool)), dir(qtool)\n"
        "print(sorted({'torch', 'numpy', 'pydantic', 'qtool.api'} & set(sys.modules)))\n"
        "import qtool.plan, qtool.calibrate.tokens, qtool.evaluate.run\n"
        "print(qtool.plan.__name__, qtool.calibrate.__module__, callable(qtool.evaluate), qtool.quantize.__module__)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert result.stdout == "[]\nplan qtool.api True qtool.api\n"


def test_the_package_offers_what_the_module_does_and_is_typed():
    assert all(getattr(qtool, name) is getattr(api, name) for name in qtool.API)
    assert set(re.findall(r"import (\w+) as \1", (ROOT / "qtool" / "__init__.pyi").read_text())) == set(qtool.API)
    assert (ROOT / "qtool" / "py.typed").exists()
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `qtool\.(\w+)", page, re.MULTILINE)) == set(qtool.API) - {"QtoolError"}


def test_a_recipe_survives_being_a_mapping_and_overrides():
    recipe = qtool.load_recipe("w4a16-gptq-g64")
    content = recipe.model_dump(mode="json", exclude_none=True)
    assert qtool.load_recipe(content).model_dump() == recipe.model_dump()
    assert qtool.load_recipe(content, ["calibration.samples=3"]).calibration.samples == 3
    short = {"recipe": 1, "name": "short", "extends": "w4a16-gptq-g64", "calibration": {"samples": 7}}
    found = qtool.load_recipe(short)
    assert (found.method, found.calibration.samples) == (recipe.method, 7)


def test_mistakes_of_a_mapping_come_at_once():
    rules = [{"match": "*", "weights": "int4-g33x"}, {"match": "*", "wights": "q4_0"}]
    with pytest.raises(RecipeError) as caught:
        qtool.load_recipe({"recipe": 1, "name": "bad", "layers": rules})
    assert [line.partition(": ")[0] for line in caught.value.problems] == ["recipe"] * 3
    assert "layers[0].weights" in str(caught.value)
    assert "did you mean 'weights'?" in str(caught.value)
    with pytest.raises(RecipeError, match=r"wanted what a file could say, found Circular"):
        rules.append(rules)
        qtool.load_recipe({"recipe": 1, "layers": rules})


def test_overrides_of_a_loaded_recipe_and_an_open_model(beside):
    model = qtool.open_model(Path("SmolLM2-135M"))
    recipe = qtool.load_recipe("w4a16-gptq-g64")
    assert qtool.plan(model, recipe).layers == qtool.plan("SmolLM2-135M", "w4a16-gptq-g64").layers
    assert qtool.plan(model, recipe, overrides=["method=rtn"]).layers == (
        qtool.plan(model, "w4a16-gptq-g64", overrides=["method=rtn"]).layers
    )
    with pytest.raises(PlanError, match="does not fit SmolLM2-135M"):
        qtool.plan(model, recipe, overrides=["layers.0.match=nothing*"])


def test_calibrate_measures_for_quantize(beside):
    recipe = {"recipe": 1, "name": "weighted", "method": {"rtn": {"importance": True}}, "export": [{"to": "gguf"}]}
    recipe |= {"calibration": {"samples": 4, "length": 32}, "layers": [{"match": "*", "weights": "q4_0"}]}
    recipe = qtool.load_recipe(
        recipe | {"layers": [{"match": "*_proj", "weights": "q4_0"}, {"match": "*", "keep": True}]}
    )
    measured = qtool.calibrate("SmolLM2-135M", recipe, "stats.safetensors")
    assert (measured.tokens, measured.nbytes) == (128, Path("stats.safetensors").stat().st_size)
    report = qtool.quantize("SmolLM2-135M", recipe, "a", stats="stats.safetensors")
    again = qtool.quantize("SmolLM2-135M", recipe, Path("b"))
    errors, others = ({e.name: e.weight_error_db for e in r.layers if e.format} for r in (report, again))
    first = {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"}
    assert {name for name in errors if errors[name] == others[name]} == first  # behind them, inputs were rounded or not


def test_gates(beside):
    arguments = {"text": "prose.txt", "baseline": qtool.open_model("SmolLM2-135M"), "context": 64}
    assert qtool.evaluate("SmolLM2-135M", gates={"kld": 0.0}, **arguments).kld_mean == 0
    with pytest.raises(GateError, match=r"top1 wanted at least 1\.1, found 1"):
        qtool.evaluate("SmolLM2-135M", gates={"top1": 1.1}, **arguments)


def test_a_matrix_gets_the_codes_that_a_run_would_choose():
    w, x = torch.randn(8, 256), torch.randn(2, 40, 256)
    found = qtool.quantize_matrix(w.double(), {"type": "int", "bits": 4, "group": 32})
    wanted = RTN().solve(w, None, Int(bits=4, group=32)).quantized
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(qtool.quantize_matrix(w, "q4_k", "rtn", inputs=x).codes, qtool.quantize_matrix(w, "q4_k").codes)
    weighted = qtool.quantize_matrix(w, "q4_k", {"rtn": {"importance": True}}, inputs=x * torch.arange(256))
    assert not torch.equal(weighted.codes, qtool.quantize_matrix(w, "q4_k").codes)
    assert qtool.quantize_matrix(w, "nvfp4").format.label == "nvfp4"


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"format": "q4_kk"}, UsageError, "no format is called 'q4_kk'; did you mean 'q4_k'"),
        ({"format": "q4_0", "method": "gtpq"}, UsageError, "no method is called 'gtpq'; did you mean 'gptq'"),
        ({"format": "q4_k"}, UsageError, r"q4_k: rows of 64 columns are not divisible by 256"),
        ({"format": "q4_0", "method": "gptq"}, UsageError, r"method gptq measures inputs: wanted inputs=\.\.\."),
        (
            {"format": "q4_0", "method": "gptq", "inputs": torch.ones(3, 2)},
            UsageError,
            r"wanted \[\.\.\., 64\].*\[3, 2\]",
        ),
        ({"format": "q4_0", "method": "gptq", "inputs": torch.ones(3, 64) / 0}, NumericsError, "inputs is not finite"),
        (
            {"w": torch.ones(2, 64).int(), "format": "q4_0"},
            UsageError,
            r"wanted float \[N, K\], found torch.int32 \[2, 64\]",
        ),
        ({"w": torch.full((2, 64), torch.nan), "format": "q4_0"}, NumericsError, "w is not finite"),
    ],
)
def test_what_a_matrix_may_not_be(arguments, kind, message):
    with pytest.raises(kind, match=message):
        qtool.quantize_matrix(**{"w": torch.ones(2, 64), **arguments})


BUDGETED = {
    "recipe": 1,
    "name": "fit",
    "calibration": {"data": "builtin", "samples": 4, "length": 64},
    "layers": [{"match": "role:embedding", "weights": "q8_0"}, {"match": "*", "weights": "q8_0"}],
    "budget": {"formats": ["q4_0", "q8_0"], "samples": 2, "held_out": 2},
    "export": [{"to": "gguf"}],
}


def test_budgets(tiny_checkpoint, tmp_path):
    import qtool

    recipe, model = qtool.load_recipe(BUDGETED), tiny_checkpoint("llama")
    plans = [qtool.plan(model, recipe, fit=fit, scores=tmp_path) for fit in ("125KB", 10**6)]
    assert [{p.label for p in plan.layers} for plan in plans] == [{"q4_0", "q8_0"}, {"q8_0"}]
    assert len(list(tmp_path.iterdir())) == 1
    report = qtool.quantize(model, recipe, tmp_path / "out", bits=9.0, scores=tmp_path, device="cpu")
    assert report.allocation.wanted == "9 bits per weight"
    (file,) = (tmp_path / "out").glob("*.gguf")
    assert file.stat().st_size == report.allocation.nbytes <= report.allocation.limit
    for wrong in ({"fit": "4XB"}, {"fit": 0}, {"bits": 0.0}, {"kld": float("nan")}, {"fit": 1, "bits": 2.0}):
        with pytest.raises(qtool.QtoolError) as caught:
            qtool.plan(model, recipe, **wrong)
        assert caught.value.exit_code == 2
