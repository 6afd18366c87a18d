"""Statistics of a model's inputs as an importance matrix of llama.cpp, and back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from qtool.checkpoint._base import Checkpoint, Module
from qtool.checkpoint.modules import modules
from qtool.errors import CheckpointError
from qtool.recipe.load import load_recipe
from qtool.recipe.schema import Calibration, Recipe, Rule
from qtool.stats._base import InputStats
from qtool.stats.channels import Channels
from qtool.store.imatrix import ImportanceEntry, ImportanceMatrix, read_imatrix, write_imatrix

CHANNELS = frozenset({Channels})
BY_IMPORTANCE = "method={rtn: {importance: true}}"
"""What `--imatrix` sets; a `--set method=...` of the user's own comes later and wins."""


def by_importance(recipe: str | Recipe, overrides: Sequence[str]) -> Recipe:
    """A recipe for a run with an importance matrix.

    Rules' methods that measure more go back to the recipe's own, unless the user sets them.
    """
    source = recipe.model_dump(mode="json", exclude_none=True) if isinstance(recipe, Recipe) else recipe
    parsed, rules = load_recipe(source, (BY_IMPORTANCE, *overrides)), list[Rule]()
    for i, rule in enumerate(parsed.layers):
        more = rule.method and rule.method.needs - CHANNELS
        asked = any(o.startswith(("layers=", f"layers.{i}.method", f"layers.{i}=")) for o in overrides)
        rules.append(rule.model_copy(update={"method": None}) if more and not asked else rule)
    return parsed.model_copy(update={"layers": tuple(rules)})


def write_importance(
    path: Path, stats: Mapping[str, InputStats], checkpoint: Checkpoint, calibration: Calibration
) -> None:
    """Writes what `llama-imatrix` would: an entry for every tensor whose input was measured, for one expert at least.

    Args:
        path: of the new file.
        stats: by `Module.reads`.
        checkpoint: what they were measured on.
        calibration: with which tokens.

    Raises:
        CheckpointError: GGUF has no names for this architecture's tensors.
        OSError: the disk is full or not writable.
    """
    entries = {}
    for name, members in _readers(checkpoint).items():
        inputs = [stats.get(module.reads) or InputStats(module.shape[1], CHANNELS) for module in members]
        found = [s.of(module.name)[0] for s, module in zip(inputs, members, strict=True)]
        if any(s.tokens for s in found):
            sums = torch.stack([s[Channels].sum_squares.float().cpu() for s in found])
            entries[name] = ImportanceEntry(sums, torch.tensor([float(s.tokens) for s in found]))
    data = calibration.data
    datasets = (data,) if isinstance(data, str) else tuple(source.data for source in data)
    write_imatrix(path, ImportanceMatrix(entries, datasets, calibration.samples, calibration.length))


def read_importance(path: Path, checkpoint: Checkpoint) -> tuple[dict[str, InputStats], dict[str, object]]:
    """Reads an importance matrix, ours or llama.cpp's, for a model.

    Matrices that read the same input have what the file says about each of them, which is the same unless it weighs
    tokens; others have what it says about the first. An input that the file does not mention, or experts that no token
    reached, are left out.

    Returns:
        (statistics by `Module.reads`, sums of squares only; what the report says about them).

    Raises:
        CheckpointError: damaged, or of another model.
    """
    matrix = read_imatrix(path)
    readers = _readers(checkpoint)
    if not readers.keys() & matrix.entries.keys():
        found = next(iter(matrix.entries))
        raise CheckpointError(
            f"the importance matrix {path} is of another model", wanted=next(iter(readers)), found=found
        )
    stats: dict[str, InputStats] = {}
    for name, members in readers.items():
        if name in matrix.entries:
            for module, s in _split(matrix.entries[name], members, f"{path}: {name}"):
                first = stats.setdefault(module.reads, s)
                if first is not s:
                    first.weighted[module.name] = (s,)
    about: dict[str, object] = {"data": path.name, "datasets": list(matrix.datasets), "entries": len(matrix.entries)}
    return stats, about | {"samples": matrix.chunks, "length": matrix.chunk_size}


def _readers(checkpoint: Checkpoint) -> dict[str, list[Module]]:
    """All matrices by the name of their tensor in GGUF; of a stack in the order of experts."""
    names = checkpoint.family.gguf_names(checkpoint.config)
    readers: dict[str, list[Module]] = defaultdict(list)
    for module in modules(checkpoint):
        readers[names[f"{module.name}.weight"]].append(module)
    return readers


def _split(entry: ImportanceEntry, members: list[Module], what: str) -> Iterator[tuple[Module, InputStats]]:
    """The statistics of each matrix of a stack, or of the only one."""
    k, count = members[0].shape[1], len(members)
    if entry.sums.numel() != k * count or len(entry.counts) not in (1, count):
        raise CheckpointError(f"{what} does not fit the model", wanted=f"{k * count} values", found=entry.sums.numel())
    for module, sums, tokens in zip(members, entry.sums.view(count, k), entry.counts.expand(count), strict=True):
        if tokens > 0:
            stats = InputStats(k, CHANNELS)
            stats[Channels].sums = sums
            stats.tokens = max(1, round(float(tokens)))
            yield module, stats
