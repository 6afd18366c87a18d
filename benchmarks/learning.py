"""Measures what learns, keeps the numbers in a file, and makes the table of docs/learning.md of that."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import yaml

from benchmarks import learned, models
from qtool.recipe.load import find_recipe, load_recipe
from qtool.stages.distill import Distill

KEPT = Path(__file__).with_name("learning.json")
HEADER = ("trial", "what it is", "like what it learned from", "other prose", "training", "held out", "seconds")
LEFT = ("training left", "held out left")
MEASURED = re.compile(r"^# (?:Quality|Time): .*\n", re.MULTILINE)
PAGE = "docs/learning.md"


def measured(options: argparse.Namespace, model: Path) -> dict[str, float]:
    """KL divergences of all trials, by trial and text.

    Args:
        options: of the command line.
        model: the demo model off any grid.
    """
    options.topics = options.work / "topics.txt"
    options.topics.write_text("\n\n".join(topics.values()), encoding="utf-8")
    if options.with_peer:
        place = options.work / "tokens.safetensors"
        models.write_tokens(model, options.calibration, place, options.samples, learned.LENGTH)
    found = learned.all_together(options)
    if options.write_page:
        keep(found, {name: learned.described(name) for name in found})
        write_headers()
    (options.work / "learned.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return {f"{n}_{text}": kld for n, one in found.items() for text, kld in one.get("kld", {}).items()}


def keep(found: Mapping[str, Mapping[str, Any]], what: Mapping[str, str]) -> None:
    """Adds what trials found to the file; a trial that is there already is replaced.

    Args:
        found: by trial; see `benchmarks.learned.attempt`.
        what: each trial is, in the words of a recipe.
    """
    known = kept()
    for name, one in found.items():
        if "kld" in one:
            behind = {key: short(value) for key, value in one.items() if isinstance(value, dict) and "kld" in value}
            known[name] = {"what": what[name], **short(one), "behind": behind}
    KEPT.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def kept() -> dict[str, Any]:
    """The file's content: what is known, by trial."""
    found: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    return found


def short(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the table shows of a trial, or of a distillation behind one."""
    losses = {key: round(found.get("losses", {})[key], 3) for key in LEFT if key in found.get("losses", {})}
    if "held out before" in found:
        after, before = found["held out"], found["held out before"]
        losses = {LEFT[0]: round(found["learned last"] / found["learned first"], 3), LEFT[1]: round(after / before, 3)}
    klds = {text: round(kld, 4) for text, kld in found["kld"].items()}
    return {"kld": klds, "seconds": round(found["seconds"]), **losses}


def write_headers() -> None:
    """Writes what is known of recipes that end in `-best` into their headers."""
    for name in sorted(kept()):
        if name.endswith("-best"):
            recipe = find_recipe(name)
            recipe.write_text(with_measured(recipe.read_text(encoding="utf-8"), name), encoding="utf-8")


def with_measured(text: str, name: str) -> str:
    """A recipe's text with its lines "# Quality:" and "# Time:" as they were measured, behind "# Size:".

    Args:
        text: of the recipe.
        name: of the recipe, and of its trial; what is distilled there as the recipe says is looked up.
    """
    known, stem = kept(), name.removesuffix("-best")
    start = known.get(f"{stem}-base") or known[f"{stem.removesuffix('a16')}-gptq"]
    (stage,) = load_recipe(name).finish
    behind = next(found for way, found in known[name]["behind"].items() if setting(way) == stage)
    like, other = (f"{kld:.3f}" for kld in behind["kld"].values())
    before = ", ".join(f"{kld:.3f}" for kld in start["kld"].values())
    seconds = f"{known[name]['seconds']} s for the blocks of SmolLM2-135M and {behind['seconds']} s for distillation"
    quality = f"KL divergence {like} on text like what it learned from, {other} on others; GPTQ {before}"
    lines = f"# Quality: {quality} ({PAGE}).\n# Time: {seconds}, on an H200 beside other runs ({PAGE}).\n"
    bare = MEASURED.sub("", text)
    return re.sub(r"^# Size: .*\n", lambda size: size[0] + lines, bare, count=1, flags=re.MULTILINE)


def setting(way: str) -> Distill:
    """A distillation as the file names it, "epochs=8 rate=0.001"."""
    return Distill(**{key: yaml.safe_load(value) for key, value in (pair.split("=") for pair in way.split())})


def rows() -> Iterator[tuple[str, ...]]:
    """Lines of the table, what is distilled behind a trial below it."""
    for name, one in sorted(kept().items()):
        yield (name, f"`{one['what']}`", *numbers(one))
        for way, found in one["behind"].items():
            yield (f"{name}, distilled", f"`{way}`", *numbers(found))


def numbers(found: Mapping[str, Any]) -> tuple[str, ...]:
    """What a line says of a trial or a distillation."""
    shares = (f"{found[key]:.3f}" if key in found else "" for key in LEFT)
    return (*(f"{kld:.4f}" for kld in found["kld"].values()), *shares, str(found["seconds"]))
