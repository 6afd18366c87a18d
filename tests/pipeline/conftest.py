"""Recipes for tiny models, and a quantized one that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest

from qtool.pipeline.quantize import QuantizeOptions, run

GGUF = """
recipe: 1
name: tiny-gguf
layers:
  - {match: "*.mlp.*", weights: q4_0}
  - {match: "*", weights: q8_0}
export: [{to: gguf}]
"""
COMPRESSED = """
recipe: 1
name: tiny-ct
layers:
  - {match: lm_head, keep: true}
  - {match: "*", weights: int4-g32}
export: [{to: compressed-tensors}, {to: qtool}]
"""


@pytest.fixture(scope="session")
def recipes(tmp_path_factory):
    """Paths of recipe files by name."""
    folder = tmp_path_factory.mktemp("recipes")
    texts = {"gguf": GGUF, "compressed": COMPRESSED}
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    return {name: str(folder / f"{name}.yaml") for name in texts}


@pytest.fixture(scope="session")
def gguf_run(tiny_checkpoint, recipes, tmp_path_factory) -> tuple[Path, Path, object, list]:
    """(source, output, report, events) of a data-free run to GGUF. Read only."""
    source, out, events = tiny_checkpoint("qwen3"), tmp_path_factory.mktemp("gguf") / "out", []
    report = run(QuantizeOptions(str(source), recipes["gguf"], out), events.append)
    return source, out, report, events
