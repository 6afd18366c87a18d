"""Budgets on the command line."""

from __future__ import annotations

import json

from qtool.errors import HubError
from tests.cli.test_commands import qtool

RECIPE = """\
recipe: 1
name: fit
calibration: {data: builtin, samples: 4, length: 64}
layers:
  - {match: "role:embedding", weights: q8_0}
  - {match: "*", weights: q8_0}
budget: {formats: [q4_0, q8_0], samples: 2, held_out: 2}
export: [{to: gguf}]
"""


def test_plan_and_quantize_say_what_became_of_a_budget(tiny_checkpoint, tmp_path):
    recipe, scores, out = tmp_path / "fit.yaml", tmp_path / "scores", tmp_path / "out"
    recipe.write_text(RECIPE)
    common = [tiny_checkpoint("llama"), "-r", recipe, "--scores", scores]
    shown = qtool("plan", *common, "--fit", "125KB")
    assert shown.exit_code == 0, shown.output
    assert "budget 125.0 kB: " in shown.stdout
    assert " bytes of 125,000 allowed, held-out KL divergence " in shown.stdout
    assert "q4_0 for all layers (" in shown.stdout
    as_json = json.loads(qtool("plan", *common, "--fit", "125000", "--json", "--strict").stdout)
    assert as_json["allocation"]["nbytes"] <= 125_000
    assert {layer["format"] for layer in as_json["layers"]} == {"q4_0", "q8_0"}
    done = qtool("quantize", *common, "--fit", "125KB", "-o", out, "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert f"budget 125.0 kB: {as_json['allocation']['nbytes']:,} bytes of 125,000 allowed" in done.stdout
    (file,) = out.glob("*.gguf")
    assert file.stat().st_size == as_json["allocation"]["nbytes"]


def test_flags_that_do_not_fit(tiny_checkpoint, tmp_path):
    model = tiny_checkpoint("llama")
    refused = qtool("plan", model, "-r", "gguf-q8_0", "--scores", tmp_path / "scores")
    assert (refused.exit_code, refused.stderr) == (
        2,
        "error: --scores: wanted a recipe with a budget: such as gguf-fit, found gguf-q8_0\n",
    )
    refused = qtool("quantize", model, "-r", "gguf-q8_0", "--bits", "4", "-o", tmp_path / "out")
    assert refused.stderr == "error: --bits: wanted a recipe with a budget: such as gguf-fit, found gguf-q8_0\n"
    refused = qtool("plan", model, "-r", "gguf-fit", "--fit", "4XB")
    assert refused.exit_code == 2
    assert "'4XB'" in refused.stderr


def test_what_would_fail_is_said_before_costs_are_found_out(tiny_checkpoint, tmp_path, monkeypatch):
    def refuse(repo):
        raise HubError(f"cannot upload to {repo}")

    (tmp_path / "fit.yaml").write_text(RECIPE.replace("builtin", "gone.txt"))
    monkeypatch.setattr("qtool.pipeline.check.refuse_stranger", refuse)
    monkeypatch.setattr("qtool.pipeline.sensitivity.Pricing.run", None)
    common = [tiny_checkpoint("llama"), "-r", tmp_path / "fit.yaml", "--fit", "125KB", "--check"]
    checked = qtool("plan", *common, "--push-to-hub", "me/tiny")
    assert checked.exit_code == 4
    assert checked.stderr.count("there is no calibration file gone.txt") == 1
    assert "cannot upload to me/tiny" in checked.stderr
    assert "2 problems" in checked.stderr
    misspelt = RECIPE.replace("role:embedding", "role:embeding")
    (tmp_path / "fit.yaml").write_text(misspelt)
    checked = qtool("plan", *common)
    assert checked.exit_code == 4
    assert "did you mean" in checked.stderr and "embedding" in checked.stderr


def test_a_curve_of_sizes(tiny_checkpoint, tmp_path):
    recipe = tmp_path / "fit.yaml"
    recipe.write_text(RECIPE)
    common = ["plan", tiny_checkpoint("llama"), "-r", recipe, "--curve"]
    shown = qtool(*common)
    assert shown.exit_code == 0, shown.output
    lines = shown.stdout.splitlines()
    assert "expected KL divergence, nats" in lines[0]
    assert len(lines) == 11
    assert lines[1].rstrip().endswith("q4_0 100%")
    assert lines[-1].rstrip().endswith("q8_0 100%")
    points = json.loads(qtool(*common, "--json").stdout)
    assert [list(p) for p in points] == [["nbytes", "bits", "kld", "formats"]] * 10
    refused = qtool("plan", tiny_checkpoint("llama"), "-r", "gguf-q8_0", "--curve")
    assert refused.stderr == "error: --curve: wanted a recipe with a budget: such as gguf-fit, found gguf-q8_0\n"
