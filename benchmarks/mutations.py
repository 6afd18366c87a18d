"""Changes GGUF files as mistakes of a conversion would, each in one place, and counts which of them their proof sees.

    python -m benchmarks.mutations [MODEL_TYPE ...]

A tiny random model of each kind is written in float32. Then, one after the other: every bias becomes zero, every norm
is off by one, rows of every matrix of queries and keys are in the order that a permutation left out would leave, tables
of rotary factors become ones, and every number of the metadata that is no count is half as large again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gguf_biases import content, save, tiny_models
from qtool.artifact.gguf import GGUF
from qtool.checkpoint._base import QuantizedCheckpoint
from qtool.errors import QtoolError
from qtool.evaluate.llamacpp import try_file
from qtool.evaluate.proof import prove
from qtool.store.gguf_writer import Value

TOKENS = [(7 * i * i + 3 * i) % 500 for i in range(24)]
WITHOUT_EFFECT = 1e-6
"""Share of llama.cpp's own logits below which a change has none: float32 has as much noise."""


class Mutant(NamedTuple):
    """A file with one change.

    Attributes:
        what: was changed.
        kind: of change.
        metadata: of the file.
        tensors: of the file.
    """

    what: str
    kind: str
    metadata: dict[str, Value]
    tensors: dict[str, Tensor]


class Count(NamedTuple):
    """What became of the mutants of one model.

    Attributes:
        seen: were not proven.
        same: compute the same in llama.cpp.
        missed: (what, distance, limit, how far llama.cpp's own logits moved) of others.
        distance: of the file itself from our own evaluation.
    """

    seen: int
    same: int
    missed: list[tuple[str, float, float, float]]
    distance: float


def unpermuted(rows: Tensor) -> Tensor:
    """Rows of a matrix or vector, the first half of them and the second taking turns."""
    return rows.view(2, len(rows) // 2, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape).contiguous()


def tensor_changes(name: str, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(kind, changed tensor) of one tensor."""
    if name.endswith(".bias"):
        yield "bias", torch.zeros_like(x)
    elif "norm" in name and x.ndim == 1:
        yield "norm offset", x + 1
    elif "rope_f" in name:
        yield "rope factors", torch.ones_like(x)
    elif any(part in name for part in ("attn_q.", "attn_k.", "attn_qkv.", "attn_q_b.")) and len(x) % 2 == 0:
        yield "permutation", unpermuted(x)


def mutants(arch: str, metadata: dict[str, Value], tensors: dict[str, Tensor]) -> Iterator[Mutant]:
    """Every change of a file, one by one."""
    for name, x in tensors.items():
        for kind, changed in tensor_changes(name, x):
            if not torch.equal(x, changed):
                yield Mutant(name, kind, metadata, tensors | {name: changed})
    for key, value in metadata.items():
        if key.startswith(f"{arch}.") and isinstance(value, float) and value:
            yield Mutant(f"{key} {value:.3g}", "metadata", metadata | {key: value * 1.5}, tensors)


def moved(path: Path, original: Tensor) -> float:
    """How far llama.cpp's logits of a changed file are from those of the file, as a share of these."""
    found = try_file(path, TOKENS)
    return float((found - original).norm() / original.norm())


def counted(model: QuantizedCheckpoint, folder: Path) -> Count:
    """Has all mutants of a model's file proven."""
    artifact = GGUF()
    arch, metadata, tensors = content(model, folder)
    (path,) = folder.glob("*.gguf")
    exact = prove(artifact, artifact.open(folder), model)
    assert exact is not None and exact.tokens
    original = try_file(path, TOKENS)
    seen = same = 0
    missed = []
    for mutant in mutants(arch, metadata, tensors):
        save(path, mutant.metadata, mutant.tensors)
        try:
            found = prove(artifact, artifact.open(folder), model)
        except QtoolError:
            seen += 1
            continue
        assert found is not None
        if (far := moved(path, original)) < WITHOUT_EFFECT:
            same += 1
        else:
            missed.append((f"{mutant.kind}: {mutant.what}", found.distance or 0.0, found.limit or 0.0, far))
    return Count(seen, same, missed, exact.distance or 0.0)


def main() -> None:
    """Prints a line for each kind, and one for each mutant that is not seen."""
    total = [0, 0, 0, 0]
    for kind, model, folder in tiny_models(sys.argv[1:]):
        (out := folder / "out").mkdir()
        found = counted(model, out)
        total = [a + b for a, b in zip(total, (1, found.seen, found.same, len(found.missed)), strict=True)]
        print(f"{kind}: {found.seen} seen, {found.same} without effect, {len(found.missed)} missed", end="")
        print(f"; the file itself {found.distance:.1e}", flush=True)
        for what, distance, limit, far in found.missed:
            print(f"  missed {what}: {distance:.2e} of {limit:.2e} allowed; moved {far:.2e}", flush=True)
    print("{} kinds, {} mutants seen, {} without effect, {} missed".format(*total))


if __name__ == "__main__":
    main()
