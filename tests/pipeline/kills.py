"""Kills runs at every moment at which they change files: `python -m tests.pipeline.kills --turns 2 --processes 8`.

Each goes on and has to end in the same bytes as one that nobody disturbs. Prints JSON: how many runs were killed, and
what was wrong with which; exits with 1 if something was. `interrupted.py` has the moments.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from pathlib import Path
from typing import Any

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
  - {match: "*.down_proj", weights: int8-channel, activations: int8-tensor}
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
    "learned": """
recipe: 1
name: learned
calibration: {samples: 16, length: 16}
layers:
  - {match: lm_head, keep: true}
  - match: "*"
    weights: int2-g32
    method: {learned: {steps: 8, batch: 8, rate: 0.03, rounding: gumbel, scales: true, holdout: 0.25, start: rtn}}
finish: [{distill: {epochs: 1, batch: 6, rate: 0.002, rounding: gumbel, rounding_rate: 0.003, holdout: 0.25}}]
export: [{to: qtool}]
""",
}


def interrupted(model: Path, name: str, folder: Path, *arguments: int) -> dict[str, Any]:
    """What interrupted.py finds for a recipe: see there, also for the arguments."""
    recipe, place = folder / "recipe.yaml", folder / "place"
    recipe.write_text(RECIPES[name])
    place.mkdir()
    script = Path(__file__).with_name("interrupted.py")
    command = [sys.executable, script, model, recipe, place, *map(str, arguments)]
    site = install(folder / "site", "careless", {"careless.py": STAGES.replace("== 5", "== 0")}, POINTS)
    paths = os.pathsep.join(map(str, (site, Path(__file__).parents[2])))
    env = {**os.environ, "PYTHONPATH": paths}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if result.returncode:
        raise AssertionError(result.stderr)
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def wrong(run: Mapping[str, Any], wanted: Mapping[str, str]) -> str | None:
    """What is wrong with a run that was ended and went on; None if nothing is."""
    names = sorted(run["found"].keys() | wanted.keys())
    if other := [name for name in names if run["found"].get(name) != wanted.get(name)]:
        return f"other bytes in {', '.join(other)}"
    if left := [name for name in run["left"] if not name.startswith(".") and name not in ("older", "out")]:
        return f"{', '.join(left)} is left"
    if run["codes"][0] not in (-9, 143):
        return "it was not ended"
    return None if run["codes"][-1] in (0, -9, 143) else f"it ended with code {run['codes'][-1]}"


def main() -> None:
    """See the module."""
    from tests.conftest import make_checkpoint, make_tokenizer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--processes", type=int, default=1)
    asked, begin, kills, failures = parser.parse_args(), time.monotonic(), 0, []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(asked.processes) as pool:
        model = make_checkpoint("qwen3", Path(folder) / "model", make_tokenizer())
        parts = ceil(asked.processes / (asked.turns * len(RECIPES)))
        tasks = list(itertools.product(range(asked.turns), RECIPES, range(parts)))

        def work(task: tuple[int, str, int]) -> dict[str, Any]:
            turn, name, part = task
            place = Path(folder) / f"{name}-{turn}-{part}"
            place.mkdir()
            return interrupted(model, name, place, part, parts, turn)

        for (_, name, _), found in zip(tasks, pool.map(work, tasks), strict=True):
            kills += len(found["runs"])
            failures += [(name, r["moments"], why) for r in found["runs"] if (why := wrong(r, found["wanted"]))]
    seconds = round(time.monotonic() - begin, 1)
    sys.stdout.write(json.dumps({"kills": kills, "seconds": seconds, "failures": failures}, indent=1) + "\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
