"""What the benchmarks of CUDA devices run is a recipe, and a model that it fits."""

from __future__ import annotations

import json
import os

import pytest
import torch

from benchmarks import gpu, scale
from qtool.recipe.load import load_recipe


@pytest.mark.parametrize("name", gpu.ROWS)
def test_recipes_of_rows(name, tmp_path, monkeypatch):
    """What is written down for a row is what a run would load."""
    seen = []

    def noted(options, listen):
        seen.append(load_recipe(options.recipe))
        raise InterruptedError

    monkeypatch.setattr(gpu, "quantize", noted)
    for function in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, function, lambda: None)
    with pytest.raises(InterruptedError):
        gpu.measured(name, tmp_path / "model", tmp_path)
    (recipe,) = seen
    assert recipe.calibration.length == 2048
    assert recipe.calibration.samples == gpu.ROWS[name].samples
    assert recipe.layers[0].keep


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_recipes_of_several_processes(method, tmp_path):
    words = gpu.text(tmp_path / "text.txt")
    recipe = load_recipe(str(scale.recipe(method, words, tmp_path)))
    assert recipe.method.name() == method
    assert (recipe.calibration.samples, recipe.calibration.length) == (256, 2048)
    assert len(words.read_text(encoding="utf-8").split()) >= 256 * 2048


def test_stages_are_compared(tmp_path, monkeypatch):
    """Gains are of one process over several; a stage below a second says nothing, nor does the first block."""

    def ran(work, processes, *arguments):
        assert work == tmp_path
        out = tmp_path / arguments[5]
        out.mkdir()
        stages = [{"name": "quantize", "seconds": 30.0 / processes}, {"name": "write", "seconds": 0.5}]
        (out / "report.json").write_text(json.dumps({"stages": stages}))
        assert "--keep" in arguments
        kept = out.with_name(f"{out.name}.work")
        kept.mkdir()
        for i, second in enumerate((0, 3, 6.6)):
            (kept / f"block-{i}.safetensors").touch()
            os.utime(kept / f"block-{i}.safetensors", (0, 100 + second / processes))
        return 40.0 / processes, {}, ""

    monkeypatch.setattr(scale, "run", ran)
    monkeypatch.setattr(scale, "compared", lambda one, two: {"same bytes": one != two})
    found = scale.quantized("dense", tmp_path, tmp_path / "r.yaml", tmp_path, 2)
    gains = {"gain": 2.0, "gain by stage": {"quantize": 2.0}, "gain of a block": 2.0}
    assert found == {"same bytes": True, "wall": {1: 40.0, 2: 20.0}, "block": {1: 3.3, 2: 1.65}} | gains
    assert not [*tmp_path.glob("*.work")]
