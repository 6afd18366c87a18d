"""What artifacts say about themselves in their model card, from what a run knows or from its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qtool.checkpoint._base import Checkpoint
from qtool.checkpoint.config import read_text
from qtool.errors import CheckpointError
from qtool.evaluate.result import Evaluation
from qtool.report.meaning import meaning
from qtool.report.model import LayerEntry, Report
from qtool.report.summary import bits_per_weight, model_bytes
from qtool.store.hub import HUB_ID, LICENSE


@dataclass(frozen=True)
class Provenance:
    """What the card says about the source.

    Attributes:
        base_model: hub id, or the last part of a path.
        license: the fields of the hub's metadata that are known: license, license_name, license_link.
    """

    base_model: str
    license: Mapping[str, str]


def origin(checkpoint: Checkpoint, base_model: str | None = None, license: str | None = None) -> Provenance:
    """What the source's own card says of it.

    Args:
        checkpoint: the source.
        base_model: what the user says instead.
        license: what the user says instead.
    """
    known = source_metadata(checkpoint)
    own = {key: str(known[key]) for key in LICENSE if isinstance(known.get(key), str)}
    name = model_name(checkpoint.source)
    listed = known.get("base_model")
    first = listed[0] if isinstance(listed, list) and listed else listed
    if not HUB_ID.fullmatch(name) and isinstance(first, str) and HUB_ID.fullmatch(first):
        name = first
    return Provenance(base_model or name, {"license": license} if license else own)


def source_metadata(checkpoint: Checkpoint) -> dict[str, Any]:
    """The metadata on top of the README.md beside the source's files; empty if there is none, or none that is YAML."""
    places = {path.parent for path in checkpoint.files.values()}
    for readme in sorted(place / "README.md" for place in places):
        try:
            parts = read_text(readme).split("---\n", 2)
            found = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
        except (CheckpointError, yaml.YAMLError, ValueError, RecursionError):  # dates of no calendar; deep nesting
            continue
        if isinstance(found, dict):
            return found
    return {}


def model_name(source: str) -> str:
    """A hub id as it is, without its revision; of a path its last part."""
    path = Path(source)
    if path.exists():
        return path.resolve().name
    name = source.partition("@")[0]
    return name if HUB_ID.fullmatch(name) else path.name


def card_of(report: Report, repository: str | None = None, importance: dict[str, Any] | None = None) -> dict[str, Any]:
    """The card of what a report describes: no times and no paths, so that the same run writes the same bytes.

    Args:
        report: its artifacts and stages may be missing yet.
        repository: where it will be uploaded.
        importance: what is known of the importance matrix, if there was one.
    """
    return {
        "base_model": report.base_model,
        **report.license,
        "repository": repository or report.repository,
        "recipe_name": report.recipe_name,
        "recipe": without_paths(report.recipe),
        "source_bytes": report.source_bytes,
        "quantized_bytes": model_bytes(report),
        "bits_per_weight": bits_per_weight(report),
        "methods": methods(report.layers),
        "quality": [in_words(e) for e in report.evaluations],
        "importance": importance,
    }


def methods(layers: Sequence[LayerEntry]) -> dict[str, str]:
    """How the codes of each quantized module came about."""
    return {layer.name: layer.method for layer in layers if layer.format and layer.method}


def in_words(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation's fields, and what its divergence means."""
    words = {} if evaluation.kld_mean is None else {"words": meaning(evaluation.kld_mean)}
    return evaluation.model_dump(mode="json") | words


def without_paths(value: Any) -> Any:
    """A recipe's content where files are called by their names, not by where they lie on this machine."""
    if isinstance(value, Mapping):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(inner) for inner in value]
    file = isinstance(value, str) and "/" in value and value.endswith((".txt", ".json", ".jsonl", ".parquet", ".yaml"))
    return Path(value).name if file else value
