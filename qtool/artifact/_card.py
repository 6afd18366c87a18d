"""What lies beside the weights: configuration, tokenizer, and the model card with the metadata that the hub indexes.

Metadata: https://huggingface.co/docs/hub/model-cards#model-card-metadata
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

import qtool
from qtool.artifact._base import Artifact
from qtool.checkpoint._base import QuantizedCheckpoint
from qtool.errors import reading
from qtool.store.files import storage_errors
from qtool.store.markdown import code_span, escape_markdown, fence

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
QUALITY = (
    ("text", "text", "{}"),
    ("runtime", "runtime", "{}"),
    ("tokens", "tokens", "{:,}"),
    ("perplexity", "ppl", "{:.4f}"),
    ("baseline", "base_ppl", "{:.4f}"),
    ("mean KL divergence, nats", "kld_mean", "{:.5f}"),
    ("same top token", "top1", "{:.2%}"),
)
"""Columns of the quality table: heading, field of an evaluation, how it is shown."""


def write_side_files(model: QuantizedCheckpoint, out: Path, config: dict[str, Any]) -> list[Path]:
    """Writes config.json and copies tokenizer files, generation_config.json and licenses.

    Raises:
        StorageError: the disk is full or not writable.
    """
    with storage_errors(out):
        (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for name, path in sorted(model.files.items()):
        with reading(path):
            content = path.read_bytes()
        with storage_errors(out):
            (out / name).write_bytes(content)
    return [out / "config.json", *(out / name for name in sorted(model.files))]


def write_card(artifact: Artifact, model: QuantizedCheckpoint, out: Path, card: dict[str, Any]) -> Path:
    """Writes README.md; called again when more is known, it replaces it.

    Args:
        artifact: what the folder holds.
        model: its formats are listed.
        out: the folder.
        card: every key may be missing: `base_model` (hub id or folder), `recipe_name`, `recipe` (its content),
            `source_bytes`, `bits_per_weight`, `quality` (a list of mappings with the fields of an evaluation).

    Raises:
        StorageError: the disk is full or not writable.
    """
    with storage_errors(out):
        (out / "README.md").write_text(card_text(artifact, model, card), encoding="utf-8")
    return out / "README.md"


def card_text(artifact: Artifact, model: QuantizedCheckpoint, card: dict[str, Any]) -> str:
    """README.md: metadata, what it is, how to load it, what it cost, the recipe."""
    kind = type(artifact).__module__.rpartition(".")[2].replace("_", "-")
    base = str(card.get("base_model", model.source))
    title = base.rstrip("/").rpartition("/")[2] or base
    paragraphs = [
        "---\n" + yaml.safe_dump(_metadata(kind, artifact, model, base)) + "---",
        f"# {escape_markdown(title)}, quantized",
        f"{code_span(base)} in {kind}, made by qtool {qtool.__version__}. Read by: {', '.join(artifact.runtimes)}.",
        artifact.usage.strip(),
        "\n".join(f"- Note: {caveat}." for caveat in artifact.caveats(model, model.layers)),
        _formats(model, card),
        _quality(card.get("quality") or []),
        _recipe(card),
        "`sha256sum --check SHA256SUMS` checks the files.",
    ]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def _metadata(kind: str, artifact: Artifact, model: QuantizedCheckpoint, base: str) -> dict[str, Any]:
    labels = sorted({layer.format.label for layer in model.layers.values()})
    metadata: dict[str, Any] = {"pipeline_tag": "text-generation", "tags": ["qtool", kind, *labels]}
    if artifact.library:
        metadata["library_name"] = artifact.library
    if HUB_ID.fullmatch(base):  # the hub refuses anything else here
        metadata |= {"base_model": base, "base_model_relation": "quantized"}
    return metadata


def _formats(model: QuantizedCheckpoint, card: dict[str, Any]) -> str:
    counts = Counter(
        (layer.format.label, layer.activations.label if layer.activations else "as they are")
        for layer in model.layers.values()
    )
    rows = [f"| {weights} | {inputs} | {count} |" for (weights, inputs), count in sorted(counts.items())]
    table = "\n".join(["## Formats\n", "| weights | activations | matrices |", "|---|---|---|", *rows])
    sizes = []
    if "bits_per_weight" in card:
        sizes.append(f"{card['bits_per_weight']:.3f} bits per weight of the whole model, parameters included.")
    if "source_bytes" in card:
        sizes.append(f"The original takes {card['source_bytes'] / 1e6:,.1f} MB.")
    return table + ("\n\n" + " ".join(sizes) if sizes else "")


def _quality(evaluations: list[dict[str, Any]]) -> str:
    columns = [c for c in QUALITY if any(e.get(c[1]) is not None for e in evaluations)]
    if not columns:
        return ""
    lines = [[heading for heading, _, _ in columns], ["---"] * len(columns)]
    for evaluation in evaluations:
        values = [(evaluation.get(field), shown) for _, field, shown in columns]
        # Infinity arrives as a word, for JSON has no number for it.
        lines.append(
            [
                escape_markdown(value or "" if value in (None, "Infinity") else shown.format(value))
                for value, shown in values
            ]
        )
    return "## Quality\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _recipe(card: dict[str, Any]) -> str:
    if "recipe" not in card:
        return ""
    text = yaml.safe_dump(card["recipe"], sort_keys=False).strip()
    return f"## Recipe {escape_markdown(card.get('recipe_name', ''))}".rstrip() + f"\n\n{fence(text, 'yaml')}"
