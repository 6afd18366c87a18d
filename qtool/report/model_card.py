"""The model card of an artifact, with the metadata that the hub indexes.

https://huggingface.co/docs/hub/model-cards#model-card-metadata
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

import qtool
from qtool import registry
from qtool.artifact._base import Artifact
from qtool.checkpoint._base import QuantizedCheckpoint
from qtool.store.files import storage_errors
from qtool.store.hub import HUB_ID, LICENSE
from qtool.store.markdown import code_span, escape_markdown, fence

QUALITY = (
    ("text", "text", "{}"),
    ("runtime", "runtime", "{}"),
    ("tokens", "tokens", "{:,}"),
    ("perplexity", "ppl", "{:.4f}", "ppl_error"),
    ("baseline", "base_ppl", "{:.4f}"),
    ("mean KL divergence, nats", "kld_mean", "{:.5f}", "kld_error"),
    ("same top token", "top1", "{:.2%}", "top1_error"),
)
"""Columns of the quality table: heading, field of an evaluation, how it is shown, field with its standard error."""


def write_card(artifact: Artifact, model: QuantizedCheckpoint, out: Path, card: dict[str, Any]) -> Path:
    """Writes README.md; called again when more is known, it replaces it.

    Args:
        artifact: what the folder holds.
        model: its formats are listed.
        out: the folder.
        card: every key may be missing: `base_model` (hub id or folder), `license` and its like, `repository` (where it
            will be), `recipe_name`, `recipe` (its content), `source_bytes`, `quantized_bytes`, `bits_per_weight`,
            `caveats` (those of the model that was written), `methods` (by module), `proof` (what another program made
            of it, in words), `quality` (a list of mappings with the fields of an evaluation, and `words` on it).

    Raises:
        StorageError: the disk is full or not writable.
    """
    with storage_errors(out):
        (out / "README.md").write_text(card_text(artifact, model, card), encoding="utf-8")
    return out / "README.md"


def card_text(artifact: Artifact, model: QuantizedCheckpoint, card: dict[str, Any]) -> str:
    """README.md: metadata, what it is, how to load it, what it cost, the recipe."""
    kind = registry.name_of("artifact", type(artifact))
    base = str(card.get("base_model", model.source))
    title = base.rstrip("/").rpartition("/")[2] or base
    paragraphs = [
        f"---\n{_metadata(kind, artifact, model, card)}\n---",
        f"# {escape_markdown(title)}, quantized",
        f"{code_span(base)} in {kind}, made by qtool {qtool.__version__}. Read by: {', '.join(artifact.runtimes)}.",
        _usage(artifact, card),
        f"Proven: it {escape_markdown(card['proof'])}." if card.get("proof") else "",
        "\n".join(f"- Note: {caveat}." for caveat in card.get("caveats", artifact.caveats(model, model.layers))),
        _formats(model, card),
        _quality(card.get("quality") or []),
        _recipe(card),
        "`sha256sum --check SHA256SUMS` checks the files.",
    ]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def _metadata(kind: str, artifact: Artifact, model: QuantizedCheckpoint, card: dict[str, Any]) -> str:
    """The metadata as YAML; a base model that is no repository of the hub is left out, as the hub refuses it."""
    from huggingface_hub import ModelCardData

    labels = sorted({layer.format.label for layer in model.layers.values()})
    base = str(card.get("base_model", model.source))
    known: dict[str, Any] = {key: card[key] for key in LICENSE if card.get(key)}
    if HUB_ID.fullmatch(base):
        known |= {"base_model": base, "base_model_relation": "quantized"}
    data = ModelCardData(
        library_name=artifact.library, pipeline_tag="text-generation", tags=["qtool", kind, *labels], **known
    )
    return str(data.to_yaml()).strip()


def _usage(artifact: Artifact, card: dict[str, Any]) -> str:
    """How to load it, by the name of its repository if it has one."""
    repository = card.get("repository")
    return artifact.usage.strip().replace("FOLDER", str(repository) if repository else "FOLDER")


def _formats(model: QuantizedCheckpoint, card: dict[str, Any]) -> str:
    methods = card.get("methods", {})
    counts = Counter(
        (layer.format.label, layer.activations.label if layer.activations else "as they are", methods.get(module, ""))
        for module, layer in model.layers.items()
    )
    header = ["weights", "activations", *(["chosen by"] if methods else []), "matrices"]
    lines = [header, ["---"] * len(header)]
    lines += [[*label[: len(header) - 1], str(count)] for label, count in sorted(counts.items())]
    table = "## Formats\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
    sizes = []
    if "bits_per_weight" in card:
        sizes.append(f"{card['bits_per_weight']:.3f} bits per weight of the whole model, parameters included.")
    if "source_bytes" in card and "quantized_bytes" in card:
        after, before = card["quantized_bytes"], card["source_bytes"]
        sizes.append(f"{after / 1e6:,.1f} MB instead of the original's {before / 1e6:,.1f} MB ({after / before:.1%}).")
    return table + ("\n\n" + " ".join(sizes) if sizes else "")


def _quality(evaluations: list[dict[str, Any]]) -> str:
    """Outcome of the gates, and a table of what was measured."""
    columns = [c for c in QUALITY if any(e.get(c[1]) is not None for e in evaluations)]
    if not columns:
        return ""
    lines = [[heading for heading, *_ in columns], ["---"] * len(columns)]
    lines += [[_cell(e, *column[1:]) for column in columns] for e in evaluations]
    gates = [gate for e in evaluations for gate in e.get("gates", ())]
    outcome = "FAIL" if any(not gate["passed"] for gate in gates) else "PASS"
    sentences = [f"**{outcome}**: " + "; ".join(map(_gate, gates)) + "."] if gates else []
    sentences += [f"{escape_markdown(e['text'])}: {e['words']}." for e in evaluations if e.get("words")]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join(["## Quality", *sentences, table])


def _cell(evaluation: dict[str, Any], field: str, shown: str, error: str | None = None) -> str:
    value, spread = evaluation.get(field), evaluation.get(error) if error else None
    if value is None or isinstance(value, str):  # infinity may arrive as a word, for JSON has no number for it
        return str(escape_markdown(value or ""))
    if not math.isfinite(value):
        return "Infinity"
    several = isinstance(spread, float) and math.isfinite(spread)
    return shown.format(value) + (f" ± {shown.format(spread)}" if several else "")


def _gate(gate: dict[str, Any]) -> str:
    bound = "at least" if gate["at_least"] else "at most"
    return f"{gate['name']} {gate['value']:.4g}, {bound} {gate['limit']:g}"


def _recipe(card: dict[str, Any]) -> str:
    if "recipe" not in card:
        return ""
    text = yaml.safe_dump(card["recipe"], sort_keys=False).strip()
    return f"## Recipe {escape_markdown(card.get('recipe_name', ''))}".rstrip() + f"\n\n{fence(text, 'yaml')}"
