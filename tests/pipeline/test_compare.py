"""Runs, artifacts and a stranger's GGUF file in one comparison, through the command."""

from __future__ import annotations

import hashlib
import json
import re
import shutil

import pytest
from typer.testing import CliRunner

from qtool.cli.app import app
from qtool.evaluate.result import Evaluation
from qtool.pipeline.compare import measured, unique
from qtool.pipeline.evaluate import EvaluateOptions
from qtool.pipeline.events import silent
from qtool.report.comparison import Compared, Comparison


def qtool(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)), prog_name="qtool")


RECIPE = """\
recipe: 1
name: NAME
layers: [{match: "*_proj", weights: FORMAT}, {match: "*", keep: true}]
export: [{to: gguf}]
"""


def test_from_files_to_page(tiny_checkpoint, tmp_path):
    model, text = tiny_checkpoint("llama"), tmp_path / "prose.txt"
    text.write_text("Which of several models no other beats is what a release engineer wants to know. " * 20)
    for name in ("q8_0", "q4_0"):
        (tmp_path / f"{name}.yaml").write_text(RECIPE.replace("NAME", name).replace("FORMAT", name))
        asked = ["quantize", model, "-r", tmp_path / f"{name}.yaml", "-o", tmp_path / name, "-q"]
        if name == "q8_0":
            asked += ["--set", f"eval={{text: {text}, context: 64, chunks: 2}}"]
        assert qtool(*asked).exit_code == 0
    stranger = tmp_path / "stranger.gguf"  # a file without a report, as anybody may have made it
    shutil.copy(next((tmp_path / "q4_0").glob("*.gguf")), stranger)
    sources, page = (tmp_path / "q8_0", tmp_path / "q4_0", stranger), tmp_path / "page.html"
    measuring = ["--text", text, "--baseline", model, "--context", 64, "--chunks", 2]
    result = qtool("compare", *sources, "-o", page, *measuring, "-q")
    assert result.exit_code == 0, result.stderr
    found = Comparison.model_validate_json(page.with_suffix(".json").read_text())
    by_name = {e.name: e for e in found.entries}
    assert [e.kind for e in found.entries] == ["q4_0", "gguf", "q8_0"]
    assert by_name["q4_0"].nbytes == by_name["stranger.gguf"].nbytes < by_name["q8_0"].nbytes
    assert by_name["q4_0"].bits_per_weight == by_name["stranger.gguf"].bits_per_weight
    assert by_name["q4_0"].evaluation.kld_mean == by_name["stranger.gguf"].evaluation.kld_mean
    assert by_name["q4_0"].evaluation.kld_mean > 3 * by_name["q8_0"].evaluation.kld_mean > 0
    assert found.best == ("q4_0", "stranger.gguf", "q8_0")  # equals do not beat each other
    assert set(by_name["q8_0"].errors) >= {"q", "down"}
    assert "<svg" in page.read_text()
    assert all(rate > 1 for e in found.entries for rate in e.speed)
    assert by_name["q8_0"].layers["model.layers.0.mlp.up_proj"][0] == "q8_0"
    types = {name: label for name, (label, db) in by_name["stranger.gguf"].layers.items() if db is None}
    assert types["model.layers.1.mlp.up_proj"] == "q4_0" and types["lm_head"] == "bf16"
    rows = re.findall(r"<tr><td><code>(.*?)</code></td>" + "<td>(.*?)</td>" * 3 + "</tr>", page.read_text())
    assert {row[0] for row in rows} == set(by_name["q4_0"].layers) == set(types)
    assert ("lm_head", "kept", "bf16", "kept") in rows
    assert "tokens per second" in result.stdout
    assert len([line for line in result.stdout.splitlines() if line.endswith("*")]) == 3
    unmeasured = json.loads(qtool("compare", *sources, "--json", "-q").stdout)
    assert unmeasured["comparable"] == ["q8_0"]


@pytest.mark.parametrize(
    ("known", "chunks", "anew"),
    [
        ({"a": 4, "b": 4}, 4, []),
        ({"a": 4, "b": 2}, 4, ["b"]),
        ({"a": 4, "b": None}, None, ["b", "a"]),  # all of the text turn out to be five
        ({"a": 5, "b": None}, None, ["b"]),
        ({"a": 4, "b": 2}, None, ["a", "b"]),
        ({"a": 2, "b": 2}, None, []),
    ],
)
def test_divergences_that_do_not_compare_are_measured_again(known, chunks, anew, tmp_path, monkeypatch):
    (tmp_path / "text").write_text("text")
    asked = []

    def evaluation(count):
        digest = hashlib.sha256(b"text").hexdigest()
        own = {"text": "text", "text_sha256": digest, "context": 64, "chunks": count, "tokens": 32 * count, "ppl": 2.0}
        return Evaluation(runtime="qtool", ppl_error=0.1, kld_mean=0.1, baseline="base", **own)

    def measure(options, _):
        asked.append(options.artifact)
        return evaluation(chunks or 5)

    def entry(name, count):
        found = count and evaluation(count)
        own = {"name": name, "source": name, "kind": "gguf", "nbytes": 1, "bits_per_weight": 4.0}
        return Compared(evaluation=found, errors={}, **own)

    monkeypatch.setattr("qtool.pipeline.compare.evaluate.run", measure)
    options = EvaluateOptions("", "base", tmp_path / "text", 64, chunks)
    found = measured([entry(*pair) for pair in known.items()], options, silent)
    assert asked == anew
    assert len({e.evaluation.chunks for e in found}) == 1


def test_what_cannot_be_compared(tmp_path):
    assert qtool("compare", tmp_path).exit_code == 2
    assert "--text and --baseline go together" in qtool("compare", "a", "b", "--text", "t").stderr
    assert "beside which its JSON lies, found a.json" in qtool("compare", "a", "b", "-o", tmp_path / "a.json").stderr
    refused = qtool("compare", "a", "b", "-o", "/proc/a/page.html")  # before anything is read
    assert (refused.exit_code, "cannot write /proc/a/page.html" in refused.stderr) == (7, True)


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (("/m/a", "/m/b"), ["a", "b"]),
        (("/m/x/gguf", "/m/y/gguf"), ["x/gguf", "y/gguf"]),
        (("a", "a"), ["a (1)", "a (2)"]),
    ],
)
def test_names_tell_apart(sources, names):
    assert unique(sources) == names
