"""The commands on a tiny model, as a user runs them: what comes out on stdout, and how failures end."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from qtool import __version__
from qtool.cli.app import app
from qtool.evaluate.result import Evaluation
from qtool.report.model import Report
from qtool.report.render import read_report
from qtool.store.files import damaged_file, read_sums, sha256

pytestmark = pytest.mark.proven

RECIPE = """\
recipe: 1
name: tiny
layers:
  - {match: lm_head, keep: true}
  - {match: "*", weights: q8_0}
export: [{to: gguf}]
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def model(tiny_checkpoint):
    return tiny_checkpoint("llama")


def qtool(*arguments):
    """Runs a command in this process."""
    return CliRunner().invoke(app, list(map(str, arguments)), prog_name="qtool")


def test_plan_shows_formats_and_sizes(model, recipe):
    result = qtool("plan", model, "--recipe", recipe)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == (
        "role       layers  format  method    bits     size\n"
        "embedding       1  kept    -       16.000  65.5 kB\n"
        "q               2  q8_0    rtn      8.500   8.7 kB\n"
        "k               2  q8_0    rtn      8.500   4.4 kB\n"
        "v               2  q8_0    rtn      8.500   4.4 kB\n"
        "o               2  q8_0    rtn      8.500   8.7 kB\n"
        "gate            2  q8_0    rtn      8.500  17.4 kB\n"
        "up              2  q8_0    rtn      8.500  17.4 kB\n"
        "down            2  q8_0    rtn      8.500  17.4 kB\n"
        "head            1  kept    -       16.000  65.5 kB\n"
        "other tensors: 640 B\n"
        "predicted size: 210.0 kB\n"
        "bits per weight: 8.500 of quantized matrices, 12.029 of all matrices\n"
        "artifacts: gguf\n"
    )


def test_plan_as_json_lists_every_layer(model, recipe):
    plan = json.loads(qtool("plan", model, "--recipe", recipe, "--json").stdout)
    assert len(plan["layers"]) == 16
    assert plan["layers"][1] == {
        "name": "model.layers.0.self_attn.q_proj",
        "role": "q",
        "block": 0,
        "shape": [64, 64],
        "format": "q8_0",
        "method": "rtn",
        "activations": None,
        "keep": None,
        "fallback": None,
        "rule": 1,
        "bits": 64 * 64 * 17 // 2,
    }


def test_plan_tries_what_would_fail_later(model, tmp_path, monkeypatch):
    text = RECIPE.replace(
        "layers:", "calibration: {data: gone.txt}\nkv_cache: fp8-token\neval: {text: prose.txt}\nlayers:", 1
    )
    text = text.replace("weights: q8_0}", "weights: q8_0, method: gptq}").replace("gguf", "qtool")
    (tmp_path / "r.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    plain = qtool("plan", model, "-r", "r.yaml")
    assert plain.exit_code == 0, plain.stderr
    assert "KV cache: fp8-token" in plain.stdout
    monkeypatch.setattr("qtool.pipeline.check.shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    checked = qtool("plan", model, "-r", "r.yaml", "--check")
    assert checked.exit_code == 4
    assert "3 problems" in checked.stderr
    for wanted in ("no file prose.txt", "there is no calibration file gone.txt", "found 1.0 kB free"):
        assert wanted in checked.stderr
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    for name in ("gone.txt", "prose.txt"):
        (tmp_path / name).write_text("It is there now.")
    assert qtool("plan", model, "-r", "r.yaml", "--check").exit_code == 0


def test_weights_that_are_taken_over_are_called_exact(model, recipe, tmp_path):
    from qtool.cli.quantize import summary

    assert qtool("quantize", model, "--recipe", recipe, "-o", tmp_path / "out").exit_code == 0
    report = read_report(tmp_path / "out" / "report.json")
    exact = [e.model_copy(update={"weight_error_db": math.inf}) if e.format else e for e in report.layers]
    lines = summary(report.model_copy(update={"layers": exact}), tmp_path).splitlines()
    assert "weights are exact" in lines
    assert not any("weight error" in line for line in lines)


def test_quantize_prints_its_result_on_stdout_and_progress_on_stderr(model, recipe, tmp_path):
    out = tmp_path / "out"
    result = qtool("quantize", model, "--recipe", recipe, "-o", out)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    nbytes = sum(p.stat().st_size for p in out.iterdir() if p.suffix == ".gguf" or p.name == "README.md")
    assert lines[0].split() == ["artifact", "size", "of", "source", "folder"]
    assert lines[1].split() == ["gguf", f"{nbytes / 1e3:.1f}", "kB", f"{nbytes / 279168:.0%}", "verified", str(out)]
    assert lines[2] == "14 of 16 matrices quantized"
    assert lines[3] == "bits per weight: 8.50 of quantized matrices, 12.04 of the whole model"
    assert re.fullmatch(r"largest weight error 4\d\.\d dB in model\.layers\.\d\.\S+", lines[4])
    assert lines[5].endswith(f"report: {out / 'report.html'}")
    assert lines[6].startswith("gguf runs in llama.cpp 20") and "largest logit difference" in lines[6]
    assert "quantize 2/2 block-1" in result.stderr
    assert result.stderr.count("quantize") == 2


def test_quantize_as_json_prints_the_report_and_nothing_else(model, recipe, tmp_path):
    result = qtool("quantize", model, "--recipe", recipe, "-o", tmp_path / "out", "--json", "--quiet")
    assert result.stderr == ""
    report = Report.model_validate(json.loads(result.stdout))
    assert report == Report.model_validate_json((tmp_path / "out" / "report.json").read_text())


def test_exact_layers_have_a_word_in_json(model, recipe, tmp_path):
    assert qtool("quantize", model, "--recipe", recipe, "-o", tmp_path / "a", "-q").exit_code == 0
    again = qtool("quantize", tmp_path / "a", "--recipe", recipe, "-o", tmp_path / "b", "-q", "--json")
    assert again.exit_code == 0, again.stderr
    layers = json.loads(again.stdout)["layers"]
    assert {layer["weight_error_db"] for layer in layers if layer["format"]} == {"Infinity"}


def test_from_quantized_model_to_gate(model, recipe, tmp_path):
    assert qtool("quantize", model, "--recipe", recipe, "-o", tmp_path / "out", "-q").exit_code == 0
    text = tmp_path / "prose.txt"
    text.write_text("What is written without effort is in general read without pleasure. " * 30)
    command = ["eval", tmp_path / "out", "--baseline", model, "--text", text, "--context", 64, "--chunks", 2, "-q"]
    good = qtool(*command, "--gate", "kld=0.5", "--gate", "top1=0.5", "--json")
    assert good.exit_code == 0, good.stderr
    measured = json.loads(good.stdout)
    assert 0 < measured["kld_mean"] < 0.1
    missed = qtool(*command, "--gate", "kld=0")
    assert missed.exit_code == 9
    assert re.search(rf"^kld_mean +{measured['kld_mean']:.6g}$", missed.stdout, re.MULTILINE)
    assert missed.stderr.startswith("error: quality misses 1 of 1 gates: kld wanted at most 0, found ")


def test_an_evaluation_is_added_to_report_card_and_checksums(model, recipe, tmp_path):
    out, text = tmp_path / "out", tmp_path / "prose.txt"
    both = ["--set", "export=[{to: gguf}, {to: qtool}]"]
    assert qtool("quantize", model, "--recipe", recipe, "-o", out, "-q", *both).exit_code == 0
    text.write_text("What is written without effort is in general read without pleasure. " * 30)
    command = ["eval", out / "gguf", "--baseline", model, "--text", text, "--context", 64, "--chunks", 2, "-q"]
    before = read_sums(out)
    missed = qtool(*command, "--update", "--gate", "kld=0", "--json")
    assert missed.exit_code == 9
    measured = Evaluation.model_validate(json.loads(missed.stdout))
    assert (measured.text_sha256, measured.qtool) == (sha256(text), __version__)
    assert qtool(*command, "--update", "--gate", "kld=5").exit_code == 0  # takes the place of the one before
    report = read_report(out / "report.json")
    assert [e.model_copy(update={"gates": ()}) for e in report.evaluations] == [
        measured.model_copy(update={"gates": ()})
    ]
    assert "PASS" in (out / "report.html").read_text()
    for kind in ("gguf", "qtool"):
        assert f"| prose.txt | qtool | 62 | {measured.ppl:.4f} ±" in (out / kind / "README.md").read_text()
    changed = {name for name, digest in read_sums(out).items() if before[name] != digest}
    pages = {"report.json", "report.md", "report.html"}
    assert changed == pages | {f"{kind}/{name}" for kind in ("gguf", "qtool") for name in ("README.md", "SHA256SUMS")}
    assert [damaged_file(place) for place in (out, out / "gguf", out / "qtool")] == [None, None, None]
    files = {f"{a.path}/{f.name}": f.sha256 for a in report.artifacts for f in a.files}
    assert files.items() <= read_sums(out).items()


def test_an_evaluation_that_belongs_to_no_report(model, recipe, tmp_path, tiny_checkpoint):
    text = tmp_path / "prose.txt"
    text.write_text("What is written without effort is in general read without pleasure. " * 30)
    command = ["--text", text, "--context", 64, "--chunks", 2, "-q", "--update"]
    alone = qtool("eval", model, *command)
    assert (alone.exit_code, alone.stdout) == (2, "")
    assert "--update: wanted an artifact of `qtool quantize` with its report.json" in alone.stderr
    assert qtool("quantize", model, "--recipe", recipe, "-o", tmp_path / "out", "-q").exit_code == 0
    before = (tmp_path / "out" / "report.json").read_bytes()
    other = qtool("eval", tmp_path / "out", "--baseline", tiny_checkpoint("mistral"), *command)
    assert other.exit_code == 2
    assert "the baseline is not the model that the artifact was made from" in other.stderr
    assert (tmp_path / "out" / "report.json").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["plan", "{model}", "-r", "nowhere"], 3, "no file and no shipped recipe is called 'nowhere'"),
        (["plan", "{model}", "-r", "{recipe}", "--set", "layers.1.weights=int4-g128"], 4, "not divisible by 128"),
        (["plan", "{tmp}", "-r", "{recipe}"], 5, "holds no config.json"),
        (["quantize", "{model}", "-r", "{recipe}", "-o", "{model}"], 7, "holds what the result is made from"),
        (["export", "{model}", "--to", "ggfu", "-o", "{tmp}/out"], 2, "did you mean 'gguf'?"),
        (["quantize", "{model}", "-r", "{recipe}", "-o", "{tmp}/o", "--limit-layers", "9"], 2, "1 to 2 decoder blocks"),
    ],
    ids=["recipe", "plan", "checkpoint", "storage", "name", "usage"],
)
def test_real_mistakes_end_in_one_line_and_their_code(arguments, code, message, model, recipe, tmp_path):
    names = {"model": model, "recipe": recipe, "tmp": tmp_path}
    result = qtool(*(a.format(**names) for a in arguments))
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "forbidden", "code"),
    [
        (["inspect", "{model}"], "model.safetensors", 5),
        (["quantize", "{model}", "-r", "{recipe}", "-o", "o", "--set", "export=[{{to: qtool}}]"], "tokenizer.json", 5),
        (["quantize", "{model}", "-r", "{recipe}", "-o", "{tmp}/out"], "SHA256SUMS", 7),
        (["recipes", "show", "{recipe}"], "tiny.yaml", 3),
    ],
    ids=["weights", "tokenizer", "output", "recipe"],
)
def test_what_the_system_forbids_is_one_line_as_well(arguments, forbidden, code, model, recipe, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "SHA256SUMS").touch()
    opened = Path.open

    def refuse(self, *args, **options):
        if self.name == forbidden:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", refuse)
    result = qtool(*(a.format(model=model, recipe=recipe, tmp=tmp_path) for a in arguments))
    assert (result.exit_code, result.stdout) == (code, "")
    (line,) = result.stderr.splitlines()
    assert "Permission denied" in line and "unexpected" not in line
