"""A run that is killed at any moment continues, and ends in the same bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.test_finish import POINTS, STAGES
from tests.test_extending import install

RECIPES = {
    "data-free": """
recipe: 1
name: data-free
layers:
  - {match: lm_head, weights: q8_0}
  - {match: "*", weights: q4_0}
export: [{to: gguf}, {to: qtool}]
""",
    "calibrated": """
recipe: 1
name: calibrated
calibration: {samples: 4, length: 32}
layers:
  - {match: lm_head, keep: true}
  - {match: "*.mlp.*", weights: int8-channel, activations: int8-tensor}
  - {match: "*", weights: int4-g32, method: gptq}
export: [{to: qtool}]
""",
    "finished": """
recipe: 1
name: finished
calibration: {samples: 4, length: 32}
layers:
  - {match: "*.down_proj", weights: q8_0}
  - {match: "*", keep: true}
finish: [louder, {louder: {factor: 0.5}}, counting]
export: [{to: qtool}]
""",
}


PARTS = 4
"""Processes that share the moments of a recipe, so that tests run side by side."""


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("name", RECIPES)
def test_killed_before_and_after_every_name_it_ends_in_the_same_bytes(name, part, tiny_checkpoint, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPES[name])
    place = tmp_path / "place"
    place.mkdir()
    script = Path(__file__).with_name("interrupted.py")
    command = [sys.executable, script, tiny_checkpoint("qwen3"), recipe, place, str(part), str(PARTS)]
    site = install(tmp_path / "site", "careless", {"careless.py": STAGES.replace("== 5", "== 0")}, POINTS)
    paths = os.pathsep.join(map(str, (site, Path(__file__).parents[2])))
    env = {**os.environ, "PYTHONPATH": paths}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found["wanted"]) > 3
    assert len(found["runs"]) > 5
    assert found["kinds"].count("os.rename") > 10
    for run in found["runs"]:
        assert run["found"] == found["wanted"], run
        assert {name for name in run["left"] if not name.startswith(".")} == {"older", "out"}, run
        assert run["codes"][0] in (-9, 143), run
        assert run["codes"][-1] in (0, -9, 143), run
