"""Learned rounding as users run it: closer to the original than its start, and the same bytes each time."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch

from qtool.methods import _repeated
from qtool.methods.learned import Learned
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.report.render import read_report
from tests.methods.test_repeated import Recorder

RECIPE = """
recipe: 1
name: learned
calibration: {data: CALIBRATION, samples: 48, length: 32}
layers:
  - {match: lm_head, keep: true}
  - {match: "*", weights: WEIGHTS, method: METHOD}
export: [{to: qtool}]
eval: {text: TEXT, context: 32, chunks: 12}
"""
LEARNED = "{learned: {steps: 60, batch: 16}}"


def quantized(model, texts, out, weights, method, name):
    text = RECIPE.replace("WEIGHTS", weights).replace("METHOD", method)
    text = text.replace("CALIBRATION", str(texts / "calibration.txt")).replace("TEXT", str(texts / "other.txt"))
    (texts / f"{name}.yaml").write_text(text)
    report = run(QuantizeOptions(str(model), str(texts / f"{name}.yaml"), out, device="cpu", dtype="fp32"))
    return report, (out / "block-1.safetensors").read_bytes()


@pytest.mark.parametrize(("weights", "left"), [("int2-g32", 0.95), ("q4_0", 0.98)])
def test_divergence_falls_and_bytes_repeat(tiny_checkpoint, texts, tmp_path, weights, left, monkeypatch):
    model = tiny_checkpoint("llama")
    start, before = quantized(model, texts, tmp_path / "start", weights, "gptq", f"start-{weights}")
    found, after = quantized(model, texts, tmp_path / "found", weights, LEARNED, f"found-{weights}")
    device = Recorder()
    monkeypatch.setattr(_repeated, "recorded", device)
    again, same = quantized(model, texts, tmp_path / "again", weights, LEARNED, f"found-{weights}")
    assert found.evaluations[0].kld_mean < left * start.evaluations[0].kld_mean
    assert before != after
    assert same == after
    assert device.replayed == 2 * 60
    assert again.evaluations == found.evaluations
    assert {entry.method for entry in found.layers if entry.format} == {"learned"}
    assert [(entry.block, entry.method) for entry in found.blocks] == [(0, "learned"), (1, "learned")]
    assert again.blocks == found.blocks
    assert any(entry.losses["held out after"] < entry.losses["held out before"] for entry in found.blocks)
    for entry in found.blocks:
        assert 0 < entry.losses["held out after"] <= entry.losses["held out before"] < 1
        assert 0 < entry.losses["training after"] <= entry.losses["training before"] < 1
        assert [at.step for at in entry.course] == [0, 7, 14, 21, 28, 35, 42, 49, 56, 60]
        assert entry.course[0].training == pytest.approx(entry.losses["training before"], rel=1e-5)
        assert entry.course[0].held_out == pytest.approx(entry.losses["held out before"], rel=1e-5)
        best = min(entry.course, key=lambda at: at.held_out)
        assert best.training == pytest.approx(entry.losses["training after"], rel=1e-5)
        assert best.held_out == pytest.approx(entry.losses["held out after"], rel=1e-5)
    assert start.blocks == ()
    assert read_report(tmp_path / "found" / "report.json").blocks == found.blocks
    for page in ("report.md", "report.html"):
        assert "held out after" in (tmp_path / "found" / page).read_text()
    lines = (tmp_path / "found" / "report.md").read_text().split("## Blocks")[1].splitlines()
    rows = [line for line in lines if line.startswith("| 1 | learned |")]
    assert len(rows) == 1
    assert rows[0].split("|")[3].strip() == str(best.step)
    assert float(rows[0].split("|")[-2]) == pytest.approx(found.blocks[1].losses["held out after"], rel=0.01)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from qtool.methods.learned import Gradients
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.stages._student import Student

model, recipe, out, name, fatal, threads = sys.argv[1:]
torch.set_num_threads(int(threads))  # what was solved with others does not count
owner = Gradients if name == "__call__" else Student
own, left = getattr(owner, name), [int(fatal)]

def killed(self, *arguments, **more):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return own(self, *arguments, **more)

setattr(owner, name, killed)
run(QuantizeOptions(model, recipe, Path(out), device="cpu", dtype="fp32", verify=False))
"""
STEPS = 12


@pytest.mark.parametrize("where", ["block", "stage"])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(where, tiny_checkpoint, texts, tmp_path, monkeypatch):
    """By SIGKILL, amid the second block's training, or in the second epoch behind all blocks."""
    model, learned = tiny_checkpoint("llama"), Learned.solve_block
    recipe = RECIPE.replace("WEIGHTS", "int2-g32").replace("METHOD", LEARNED.replace("60", str(STEPS)))
    recipe = recipe.split("eval:")[0].replace("CALIBRATION", str(texts / "calibration.txt"))
    path = texts / "killed.yaml"
    path.write_text(recipe + "finish: [{distill: {epochs: 2, rounding: gumbel}}]\n")

    def quantize(out):
        run(QuantizeOptions(str(model), str(path), out, device="cpu", dtype="fp32", verify=False))
        return {file.name: file.read_bytes() for file in out.glob("*.safetensors")}

    wanted, out = quantize(tmp_path / "whole"), tmp_path / "killed"
    at = ("__call__", STEPS + STEPS // 2) if where == "block" else ("divergence", 9)
    command = [sys.executable, "-c", KILLED, *map(str, (model, path, out, *at, torch.get_num_threads()))]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not out.exists()
    solved = []
    monkeypatch.setattr(Learned, "solve_block", lambda self, task: solved.append(task.block) or learned(self, task))
    assert quantize(out) == wanted
    assert solved == ([1] if where == "block" else [])
