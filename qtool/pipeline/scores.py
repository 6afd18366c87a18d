"""What was found out about a model's layers, in a file, so that another budget takes seconds.

A safetensors file; `<reads>` float32 [K] are mean squares of input channels, tensors named with bars what is
kept beside codes (module, label, index and name), and the metadata holds JSON:

    __metadata__["qtool.scores"]    the version, 1
    __metadata__["identity"]        hash of model, tokens, candidates and program
    __metadata__["costs"]           {module: {label: nats per token}}
    __metadata__["shares"]          {module: {label: factor of rounding errors}}
    __metadata__["statics"]         {module: {label: [scale, zero point]}}
    __metadata__["measured"]        {hash of a plan: [nats per token, one for each held-out sample]}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from qtool.checkpoint._base import Static, TensorInfo
from qtool.checkpoint.safetensors_io import SafetensorsFile, SafetensorsWriter
from qtool.errors import CheckpointError
from qtool.pipeline.sensitivity import Priced
from qtool.residuals._base import Tensors
from qtool.store.files import new_file

VERSION = "1"
BETWEEN = " | "


class ScoreFile:
    """A file, and what it holds.

    Args:
        path: where it is or will be; read if it exists.
        identity: what it has to be about.
        strict: refuse a file that is about something else, instead of beginning anew.

    Attributes:
        found: costs and what goes with them; None: not measured yet.
        measured: divergences per held-out sample, by plan.

    Raises:
        CheckpointError: damaged, of another kind, or about something else.
    """

    def __init__(self, path: Path, identity: str, strict: bool) -> None:
        self.path, self.identity = path, identity
        self.found: Priced | None = None
        self.measured: dict[str, list[float]] = {}
        if not path.exists():
            return
        file = SafetensorsFile(path)
        if file.metadata.get("qtool.scores") != VERSION:
            raise CheckpointError(f"{path} holds no scores of layers", hint="name another file")
        if file.metadata.get("identity") != identity:
            if strict:
                hint = "name another file, or the model, recipe, calibration and version of qtool that it was made with"
                raise CheckpointError(f"the scores in {path} were measured on something else", hint=hint)
            return
        self.found, self.measured = read(file)

    def save(self) -> None:
        """Writes everything, whole or not at all. Raises StorageError."""
        assert self.found is not None
        statics = {m: {label: list(s) for label, s in own.items()} for m, own in self.found.statics.items()}
        metadata = {
            "qtool.scores": VERSION,
            "identity": self.identity,
            "costs": json.dumps(self.found.costs),
            "shares": json.dumps(self.found.shares),
            "statics": json.dumps(statics),
            "measured": json.dumps(self.measured),
        }
        tensors = self.found.importance | spread(self.found.corrections)
        infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
        with new_file(self.path) as partial, SafetensorsWriter(partial, infos, metadata) as writer:
            for name, tensor in tensors.items():
                writer.add(name, tensor)


def scores_at(place: Path, identity: str, strict: bool) -> ScoreFile:
    """Scores in a file, or in a folder, where damaged ones are found anew; see `ScoreFile`."""
    if not place.is_dir():
        return ScoreFile(place, identity, strict)
    file = place / f"{identity}.safetensors"
    try:
        return ScoreFile(file, identity, strict)
    except CheckpointError:
        file.unlink(missing_ok=True)
        return ScoreFile(file, identity, strict)


def read(file: SafetensorsFile) -> tuple[Priced, dict[str, list[float]]]:
    """What a file holds. Raises CheckpointError: damaged."""
    costs, shares, statics, measured = (parsed(file, key) for key in ("costs", "shares", "statics", "measured"))
    try:
        found = Priced(
            numbers(costs),
            {name: file.read(name) for name in file.entries if BETWEEN not in name},
            {m: {label: Static(number(s), int(z)) for label, (s, z) in own.items()} for m, own in statics.items()},
            gathered({name: file.read(name) for name in file.entries if BETWEEN in name}),
            numbers(shares),
        )
        return found, {plan: [number(x) for x in samples] for plan, samples in measured.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file.path} holds damaged scores", found=error, hint="remove it") from None


def spread(corrections: Mapping[str, Mapping[str, Sequence[Tensors]]]) -> dict[str, Tensor]:
    """Tensors of corrections by the names that they have in a file."""
    return {
        BETWEEN.join((module, label, str(i), name)): tensor
        for module, own in corrections.items()
        for label, several in own.items()
        for i, tensors in enumerate(several)
        for name, tensor in tensors.items()
    }


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, list[Tensors]]]:
    """What `spread` took apart. Raises ValueError: a name is none of its."""
    found: dict[str, dict[str, dict[int, dict[str, Tensor]]]] = {}
    for key, tensor in tensors.items():
        module, label, i, name = key.split(BETWEEN)
        found.setdefault(module, {}).setdefault(label, {}).setdefault(int(i), {})[name] = tensor
    return {m: {label: [own[i] for i in sorted(own)] for label, own in of.items()} for m, of in found.items()}


def parsed(file: SafetensorsFile, key: str) -> dict[str, Any]:
    """An entry of the metadata, a mapping. Raises CheckpointError: it is none."""
    try:
        value = json.loads(file.metadata.get(key, ""))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file.path} holds damaged scores", wanted=f"a mapping of {key}", hint="remove it")
    return value


def numbers(found: Mapping[str, Mapping[str, object]]) -> dict[str, dict[str, float]]:
    """Finite numbers by module and label. Raises AttributeError, ValueError: something else."""
    return {module: {label: number(value) for label, value in own.items()} for module, own in found.items()}


def number(value: object) -> float:
    """A finite number that is not negative. Raises ValueError: something else."""
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{value!r}")
    return float(value)
