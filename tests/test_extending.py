"""The package that docs/extending.md shows, installed as its readers would, and packages of careless authors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from qtool import registry
from qtool.calibrate.walker import Walker
from qtool.errors import QtoolError
from qtool.formats.int import Int
from qtool.methods.rtn import RTN
from qtool.models import open_artifact, open_model
from qtool.numerics.metrics import energy
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.pipeline.work import code_digest
from qtool.report.model import Report
from qtool.stats._base import InputStats
from qtool.stats.gram import Gram
from tests.cli.test_commands import qtool as here
from tests.conftest import make_tokenizer

ROOT = Path(__file__).parents[1]
FILE = re.compile(r"^```\w+\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
GROUP = re.compile(r'^\[project\.entry-points\."(.+)"\]\n((?:\w.*\n)+)', re.MULTILINE)


def install(folder: Path, name: str, files: dict[str, str], entry_points: str) -> Path:
    """Lays a distribution out as an installer does."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(entry_points)
    return folder


@pytest.fixture(scope="module")
def extra(tmp_path_factory):
    """A site folder with the package of the page, and the recipe beside it."""
    files = dict(FILE.findall((ROOT / "docs" / "extending.md").read_text(encoding="utf-8")))
    groups = GROUP.findall(files.pop("pyproject.toml"))
    assert {group for group, _ in groups} == {registry.group(room) for room in registry.ROOMS}
    points = "".join(f"[{group}]\n{lines.replace(chr(34), '')}\n" for group, lines in groups)
    return install(tmp_path_factory.mktemp("site"), "extra", files, points)


def qtool(site, *arguments):
    """Runs the program with another folder of packages."""
    program = [sys.executable, "-m", "qtool", *map(str, arguments)]
    paths = os.pathsep.join(map(str, (site, ROOT)))
    return subprocess.run(program, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": paths})


@pytest.fixture
def installed(monkeypatch):
    """Puts folders of packages on the path of this process."""

    def install_at(*sites: Path) -> None:
        for site in sites:
            monkeypatch.syspath_prepend(site)
        registry._offered.cache_clear()

    yield install_at
    monkeypatch.undo()
    registry._offered.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] in ("extra", "careless")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model of the page's family."""
    fields = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1, "attention_out_bias": True}
    folder = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = AutoModelForCausalLM.from_config(AutoConfig.for_model("seed_oss", **fields, bos_token_id=1))
        for parameter in found.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, 1, 0.1)
    found.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_page_s_package_runs_to_verified_artifacts(extra, model, tmp_path, installed):
    out = tmp_path / "out"
    result = qtool(extra, "quantize", model, "-r", extra / "quartet.yaml", "-o", out, "--json")
    assert result.returncode == 0, result.stderr
    report = Report.model_validate(json.loads(result.stdout))
    assert [(a.kind, a.verified) for a in report.artifacts] == [("qtool", True), ("loose", True)]
    assert {(e.format, e.method) for e in report.layers if e.role == "down"} == {("quartet", "descent")}
    assert {(e.format, e.method) for e in report.layers if e.role == "up"} == {("quartet", "rtn")}
    assert {(e.method, e.tokens) for e in report.layers if e.role == "gate"} == {("absolute", 4 * 64)}
    assert {(e.format, e.method) for e in report.layers if e.role == "q"} == {("quartet", "nudge")}
    installed(extra)
    norm = "model.layers.1.input_layernorm.weight"
    before, after = (m.tensor(norm) for m in (open_model(str(model)), open_artifact(str(out / "qtool"))))
    octaves = (before / after).log2()
    assert torch.equal(octaves, octaves.round())
    assert len(octaves.unique()) > 1
    levels = registry.load("formats", "quartet")().levels()
    with safe_open(out / "loose" / "model.layers.1.mlp.down_proj.weight.safetensors", "pt") as leaf:
        codes, scale = leaf.get_tensor("codes"), leaf.get_tensor("scale").float().repeat_interleave(32, dim=1)
    wanted = torch.stack([levels[row.long()] for row in codes]) * scale
    for kind in ("qtool", "loose"):
        assert torch.equal(open_artifact(str(out / kind)).matrix("model.layers.1.mlp.down_proj").decode(), wanted)
    (tmp_path / "text").write_text("Four unevenly spaced levels are good for bell-shaped weights. " * 9)
    arguments = ("--baseline", model, "--text", tmp_path / "text", "--context", "64", "--json")
    measured = json.loads(qtool(extra, "eval", out / "loose", *arguments).stdout)
    assert 0.001 < measured["kld_mean"] < 2
    again = qtool(extra, "export", out / "loose", "--to", "qtool", "-o", tmp_path / "again")
    assert again.returncode == 0, again.stderr


@pytest.mark.proven
@pytest.mark.parametrize("to", ["gguf", "compressed-tensors"])
def test_the_page_s_stage_lowers_errors_of_unseen_outputs(extra, tiny_checkpoint, tmp_path, installed, to):
    installed(extra)
    source = tiny_checkpoint("llama-biased")
    weights = "q4_0" if to == "gguf" else {"type": "int", "bits": 3, "group": 32, "scales": "minmax"}
    told = {"recipe": 1, "name": "gains", "calibration": {"samples": 16, "length": 64}, "export": [{"to": to}]}
    told["layers"] = [{"match": "model.layers.*", "weights": weights}, {"match": "*", "keep": True}]
    paths = {}
    for name in ("plain", "gains"):
        recipe = tmp_path / f"{name}.json"
        recipe.write_text(json.dumps(told | ({"finish": ["gains"]} if name == "gains" else {})))
        out = paths[name] = tmp_path / name
        result = here("quantize", source, "-r", recipe, "-o", out, "--json", "--dtype", "fp32")
        assert result.exit_code == 0, result.output
        report = Report.model_validate(json.loads(result.stdout))
        assert [a.verified for a in report.artifacts] == [True]
    (entry,) = report.finish
    assert (entry.name, entry.changed) == ("gains", 14)
    assert 0.01 < entry.about["largest change"] < 1
    assert "gains" in (out / "report.md").read_text().split("## Stages behind the last block")[1].split("##")[0]
    plain, finished, original = (open_model(str(p)) for p in (paths["plain"], paths["gains"], source))
    walker = Walker(plain, torch.device("cpu"), torch.float32)
    hidden = walker.embed(torch.randint(3, 500, (8, 64), generator=torch.Generator().manual_seed(1)))
    before = after = 0.0
    for i in range(2):
        stats = walker.collect(walker.load_block(i), i, hidden, frozenset({Gram}))
        for module in walker.modules[i]:
            gram = stats[module.reads][Gram].matrix
            w = original.tensor(f"{module.name}.weight")
            assert torch.equal(plain.matrix(module.name).quantized.codes, finished.matrix(module.name).quantized.codes)
            before += energy(w - plain.tensor(f"{module.name}.weight"), gram) / energy(w, gram)
            after += energy(w - finished.tensor(f"{module.name}.weight"), gram) / energy(w, gram)
    assert after < (0.995 if to == "gguf" else 0.985) * before


@pytest.mark.slow
def test_the_page_s_residual_runs_to_a_verified_artifact(extra, model, tmp_path, installed):
    installed(extra)
    out = tmp_path / "out"
    result = here("quantize", model, "-r", extra / "columns.yaml", "-o", out, "--json")
    assert result.exit_code == 0, result.output
    report = Report.model_validate(json.loads(result.stdout))
    assert [(a.kind, a.verified) for a in report.artifacts] == [("qtool", True)]
    up = next(e for e in report.layers if e.role == "up")
    assert (up.format, up.method, up.shape) == ("quartet + columns count 3 + low_rank rank 2", "rtn", (128, 64))
    assert up.nbytes == (128 * 64 * 5 // 2 // 8) + (3 * 4 + 128 * 3 * 2) + 2 * (128 + 64) * 2
    with safe_open(out / "block-1.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    arguments = ("-r", extra / "columns.yaml", "-o", tmp_path / "plain", "--json", "--set", "layers.0.residuals=[]")
    plain = Report.model_validate(json.loads(here("quantize", model, *arguments).stdout))
    name = "model.layers.1.mlp.up_proj"
    assert tensors[f"{name}.residual.0.index"].shape == (3,)
    assert tensors[f"{name}.residual.1.left"].shape == (128, 2)
    pairs = [(a, b) for a, b in zip(report.layers, plain.layers, strict=True) if a.format]
    assert len(pairs) == 14
    assert all(a.weight_error_db > b.weight_error_db + 0.3 and a.nbytes > b.nbytes for a, b in pairs)
    (tmp_path / "text").write_text("Four unevenly spaced levels are good for bell-shaped weights. " * 9)
    arguments = ("--baseline", model, "--text", tmp_path / "text", "--context", "64", "--json")
    kld = [json.loads(here("eval", path, *arguments).stdout)["kld_mean"] for path in (out, tmp_path / "plain")]
    assert 0.0005 < kld[0] < 0.8 * kld[1]


def test_the_page_s_family_computes_what_transformers_computes(extra, model, installed):
    installed(extra)
    ids = torch.arange(3, 35)[None]
    checkpoint = open_model(str(model))
    with torch.inference_mode():
        wanted = AutoModelForCausalLM.from_pretrained(model)(ids).logits
    walker = Walker(checkpoint, torch.device("cpu"), torch.float32)
    hidden = walker.embed(ids)
    for i in range(len(walker.blocks)):
        walker.advance(walker.load_block(i), i, hidden)
    assert_close(walker.logits(hidden, 0), wanted[0], rtol=1e-4, atol=1e-4 * float(wanted.std()))


def test_no_code_of_the_page_s_method_can_be_bettered(extra, installed):
    installed(extra)
    method, fmt = registry.load("methods", "descent")(sweeps=30), Int(bits=3, group=32)
    generator = torch.Generator().manual_seed(0)
    w, mix = torch.randn(6, 32, generator=generator), torch.randn(32, 32, generator=generator)
    x = torch.randn(100, 32, generator=generator) @ mix
    stats = InputStats(32, method.needs)
    stats.add(x)
    found = method.solve(w, stats, fmt).quantized
    rounded = RTN().solve(w, None, fmt).quantized

    def error(codes: torch.Tensor) -> torch.Tensor:
        return ((w - fmt.decode(codes, found.params)) @ x.T).square().sum(1)

    assert (error(found.codes) < 0.5 * error(rounded.codes)).all()
    for column in range(32):
        for step in (-1, 1):
            other = found.codes.clone()
            other[:, column] = (other[:, column].int() + step).clamp(0, 7).to(torch.uint8)
            assert (error(other) >= error(found.codes) * (1 - 1e-5)).all()


def test_the_page_s_statistic_and_the_method_that_asks_for_it(extra, installed):
    installed(extra)
    magnitudes, method = registry.load("stats", "magnitudes"), registry.load("methods", "absolute")()
    x = torch.randn(50, 64) * torch.arange(64)
    parts = [InputStats(64, method.needs) for _ in range(2)]
    for part, rows in zip(parts, (x[:20], x[20:]), strict=True):
        part.add(rows)
    parts[0].merge(parts[1])
    assert_close(parts[0][magnitudes].mean, x.abs().mean(0))
    again = InputStats(64, method.needs)
    again[magnitudes].load(parts[0][magnitudes].state())
    assert torch.equal(again[magnitudes].sums, parts[0][magnitudes].sums)
    w, fmt = torch.randn(4, 64), Int(bits=3, group=32)
    found = method.solve(w, parts[0], fmt).quantized
    assert torch.equal(found.params["scale"], fmt.fit(w, parts[0][magnitudes].mean)["scale"])
    assert not torch.equal(found.params["scale"], fmt.fit(w)["scale"])


@pytest.mark.slow
def test_the_page_s_statistic_weighs_tokens_where_a_recipe_does(extra, tiny_checkpoint, installed, tmp_path):
    installed(extra)
    method = registry.load("methods", "absolute")()
    (magnitudes,) = method.needs
    x, weights = torch.randn(7, 64), torch.rand(7)
    stats = InputStats(64, method.needs, groups={"m": 1})
    stats.add(x, weights={"m": weights[:, None]})
    wanted = [sum(float(weights[t]) * abs(float(x[t, k])) for t in range(7)) for k in range(64)]
    assert_close(stats.of("m")[0][magnitudes].sums, torch.tensor(wanted))
    assert magnitudes not in stats
    told = {"recipe": 1, "name": "weighted", "method": "absolute", "export": [{"to": "qtool"}]}
    told["layers"] = [{"match": "*.gate_proj", "weights": "int3-g32"}, {"match": "*", "keep": True}]
    found = {}
    for name, asked in {"plain": {}, "even": {"power": 0.0}, "weighted": {"power": 1.0}}.items():
        calibration = {"samples": 3, "length": 32} | ({"token_weights": asked} if asked else {})
        (tmp_path / "recipe.json").write_text(json.dumps(told | {"calibration": calibration}))
        options = QuantizeOptions(str(tiny_checkpoint("llama")), str(tmp_path / "recipe.json"), tmp_path / name)
        report = run(replace(options, device="cpu", dtype="fp32"))
        assert report.artifacts[0].verified
        found[name] = open_artifact(str(tmp_path / name)).tensor("model.layers.1.mlp.gate_proj.weight")
    assert torch.equal(found["plain"], found["even"])
    assert not torch.equal(found["plain"], found["weighted"])


def test_the_page_s_operation_on_inputs(extra, installed):
    installed(extra)
    kind = registry.load("ops", "signs")
    op = kind(torch.tensor([1.0, -1.0, -1.0, 1.0]))
    x, w = torch.randn(5, 4).double(), torch.randn(3, 4).double()
    assert torch.equal(op.apply(x) @ op.fold(w).T, x @ w.T)
    assert torch.equal(op.apply(x)[:, 1], -x[:, 1])
    assert kind.load(*op.data()) == op
    assert op.name() == "signs"
    assert torch.equal(op.spread(2, 2).signs, torch.tensor([1.0, -1, 1, -1, -1, 1, -1, 1]))


def test_the_page_s_package_is_in_help_and_schema(extra):
    text = " ".join(qtool(extra, "quantize", "--help").stdout.replace("│", " ").split())
    assert "quartet" in text.split("Formats:")[1].split("Methods:")[0]
    assert "descent" in text.split("Methods:")[1].split("Artifacts:")[0]
    schema = json.loads(qtool(extra, "recipes", "schema").stdout)
    assert "quartet" in json.dumps(schema["$defs"]["Format"])
    assert schema["$defs"]["Method"]["anyOf"][0]["enum"] == sorted(
        ["absolute", "descent", "nudge", *registry.names("methods")]
    )


def test_listing_imports_nothing(tmp_path, installed):
    site = install(tmp_path, "careless", {"careless.py": "raise SystemError"}, "[qtool.formats]\nodd = careless:Odd\n")
    installed(site)
    assert "odd" in registry.names("formats")
    assert "careless" not in sys.modules


CARELESS = {
    "cannot be imported": (
        "import nothing_of_this_name",
        r"odd.*careless 1\.0 cannot be imported: found ModuleNotFound",
    ),
    "no such class": ("x = 1", r"cannot be imported: found AttributeError"),
    "no format": (
        "class Odd: pass",
        r"is wrong: wanted a subclass of the one in qtool\.formats\._base, found careless:Odd",
    ),
    "no class": ("Odd = 3", r"is wrong: wanted a subclass"),
    "another name": (
        "from qtool.formats.int import Int as Odd",
        r"is wrong: wanted a class that is spelled like the name, .*, found Int; mend or uninstall it",
    ),
    "unfinished": (
        "from qtool.formats._base import Format\nclass Odd(Format): pass",
        r"is wrong: wanted definitions of affine, fit, group_columns, label, levels, refit, storage_bits",
    ),
}


@pytest.mark.parametrize("case", CARELESS)
def test_a_broken_package_is_named_in_one_line(case, tmp_path, installed):
    source, message = CARELESS[case]
    installed(install(tmp_path, "careless", {"careless.py": source}, "[qtool.formats]\nodd = careless:Odd\n"))
    with pytest.raises(QtoolError, match=message) as caught:
        registry.load("formats", "odd")
    assert "\n" not in str(caught.value)


def test_two_packages_with_one_name_are_named(tmp_path, installed):
    points = "[qtool.formats]\nq4_k = careless:Q4_K\n"
    installed(install(tmp_path / "a", "first", {}, points), install(tmp_path / "b", "second", {}, points))
    with pytest.raises(
        QtoolError, match=r"'q4_k' comes from several packages: found first 1.0 and qtool and second 1.0"
    ):
        registry.load("formats", "q4_k")
    assert registry.load("formats", "q5_k")


def test_a_run_is_another_one_when_a_package_changes(extra, tmp_path, installed):
    before = code_digest()
    installed(install(tmp_path, "careless", {"careless.py": "x = 1"}, "[qtool.formats]\nodd = careless:Odd\n"))
    with_it = code_digest()
    (tmp_path / "careless.py").write_text("x = 2")
    assert len({before, with_it, code_digest()}) == 3
