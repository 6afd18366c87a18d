"""Every recipe that ships, on the demo model off its grid: what its header says of size and quality."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.mixes import divergence, run
from qtool.recipe.load import list_recipes, load_recipe

QUALITY = re.compile(r"^# Quality: .*\n", re.MULTILINE)


def qualities(
    qtool: Sequence[str], models: Sequence[Path], work: Path, text: Path, chunks: int, names: Sequence[str] = ()
) -> Iterator[tuple[str, float, float]]:
    """(recipe, mean KL divergence, megabytes of the weights' file), of all recipes or of those named.

    Args:
        qtool: how the program is called.
        models: equivalents of one model; the first that a recipe fits is taken.
        work: where files go.
        text: to evaluate on.
        chunks: of it.
        names: recipes; empty: all.
    """
    for name in names or [entry.name for entry in list_recipes() if not wants_limit(entry.name)]:
        out = work / "recipes" / name
        out.parent.mkdir(exist_ok=True)
        model = next(model for model in models if fits(qtool, model, name))
        run([*qtool, "quantize", model, "-r", name, "-o", out, "--overwrite"])
        place = next(out.glob("*.gguf"), out)
        weights = max(file.stat().st_size for file in out.iterdir())
        yield name, divergence(qtool, place, model, text, chunks), weights / 1e6


def wants_limit(recipe: str) -> bool:
    """True if a recipe leaves open how large the file is."""
    budget = load_recipe(recipe).budget
    return budget is not None and budget.like is None


def fits(qtool: Sequence[str], model: Path, recipe: str) -> bool:
    """True if a recipe has nothing to complain about in a model."""
    return subprocess.run([*qtool, "plan", model, "-r", recipe], capture_output=True, check=False).returncode == 0


def with_quality(header: str, kld: float) -> str:
    """A recipe's text with what was measured in its line "# Quality:", behind "# Size:"."""
    where = "SmolLM2-135M off any grid (benchmarks --only recipes)"
    line = f"# Quality: mean KL divergence {kld:.3g} nats per token, {where}.\n"
    bare = QUALITY.sub("", header)
    size = re.search(r"^# Size: (?:.*\n)(?:# .*\n)*?(?=recipe:)", bare, re.MULTILINE)
    place = size.end() if size else bare.index("recipe:")
    return bare[:place] + line + bare[place:]
