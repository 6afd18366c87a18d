"""A model that computes the same as another one, with tensors as GGUF can hold them, changed while they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.checkpoint._base import Checkpoint, QuantizedCheckpoint, TensorInfo
from qtool.checkpoint.config import complete
from qtool.checkpoint.conversions._base import conversion_of, filled
from qtool.checkpoint.conversions._equal import Equal
from qtool.checkpoint.derived.skeleton import OWN
from qtool.checkpoint.language import KINDS
from qtool.residuals._base import Matrix


class EqualModel(Checkpoint):
    """See the module; for the methods see `Checkpoint`.

    Args:
        model: as it is.
        equal: what becomes of it.
    """

    def __init__(self, model: Checkpoint, equal: Equal) -> None:
        self.origin, self.equal = model, equal
        self.source, self.files, self.notes = model.source, model.files, model.notes
        self.config, self.family = complete(config_of(model, equal), Path(model.source))
        self._head = f"{self.family.head}.weight"
        self._names = [*model.names(), *([self._head] if equal.untied and model.tied else [])]

    def names(self) -> list[str]:
        """See `Checkpoint.names`."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """See `Checkpoint.info`."""
        info, change = self.origin.info(self._stored(name)), self.equal.change(name)
        return TensorInfo(change.shape(info.shape), change.dtype(info.dtype)) if change else info

    def tensor(self, name: str) -> Tensor:
        """See `Checkpoint.tensor`."""
        if self.equal.change(name):
            return self.rows(name, 0, self.info(name).shape[0])
        return self.origin.tensor(self._stored(name))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `Checkpoint.rows`."""
        stored, change = self._stored(name), self.equal.change(name)
        if change is None:
            return self.origin.rows(stored, start, stop)
        there = self.origin.info(stored).shape[0]
        rows = self.origin.rows(stored, min(start, there), min(stop, there))
        if missing := stop - max(start, min(stop, there)):
            first = self.origin.rows(stored, 0, 1)
            rows = torch.cat([rows, first.expand(missing, *first.shape[1:])])
        return change.apply(rows, start)

    def _stored(self, name: str) -> str:
        """The tensor of the original that one is made from."""
        untied = name == self._head and self.origin.tied
        return f"{self.family.embedding}.weight" if untied else name

    def rounds(self, name: str) -> bool:
        """See `Checkpoint.rounds`."""
        return self.origin.rounds(self._stored(name))

    def fingerprint(self) -> str:
        """See `Checkpoint.fingerprint`: of the model as it is, and of what becomes of it."""
        changes = {end: change.digest for end, change in self.equal.changes.items()}
        told = json.dumps([self.origin.fingerprint(), dict(self.equal.fields), changes], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()


class EqualQuantized(EqualModel, QuantizedCheckpoint):
    """The same of a model that is quantized, whose codes stay those of matrices that do not change."""

    def __init__(self, model: QuantizedCheckpoint, equal: Equal) -> None:
        super().__init__(model, equal)
        self.quantized, self.cache, changed = model, model.cache, self.changed()
        self.layers = {module: layer for module, layer in model.layers.items() if module not in changed}

    def changed(self) -> set[str]:
        """Modules whose matrix changes."""
        return {name.removesuffix(".weight") for name in self.names() if self.equal.change(name)}

    def matrix(self, module: str) -> Matrix:
        """See `QuantizedCheckpoint.matrix`."""
        return self.quantized.matrix(module)

    @property
    def decoded(self) -> Mapping[str, str]:
        """See `QuantizedCheckpoint.decoded`."""
        why = f"decoded, because GGUF wants {self.equal.what}"
        return {**self.quantized.decoded, **dict.fromkeys(sorted(self.changed() & self.quantized.layers.keys()), why)}


def equal_model(model: Checkpoint, forth: bool = True) -> Checkpoint:
    """What has to become of a model before GGUF, or another layout, can hold it: itself, unless something has."""
    if (equal := equal_of(model, forth)) is None:
        return model
    return EqualQuantized(model, equal) if isinstance(model, QuantizedCheckpoint) else EqualModel(model, equal)


def config_of(model: Checkpoint, equal: Equal) -> dict[str, Any]:
    """config.json of what becomes of a model."""
    outer = {field: value for field, value in equal.fields.items() if field in OWN}
    inner = {field: value for field, value in equal.fields.items() if field not in OWN}
    text = model.config.get("text_config")
    return {**model.config, **outer, **({"text_config": {**text, **inner}} if isinstance(text, dict) else inner)}


def equal_of(model: Checkpoint, forth: bool = True) -> Equal | None:
    """What has to become of a model before GGUF can hold it; None: nothing, or nobody knows.

    Args:
        model: which one.
        forth: False: what has to become of one from GGUF before another layout can hold it.
    """
    if not model.family.derived or model.family.model_free:
        return None
    kind = KINDS.get(str(model.config.get("model_type")))
    naming = conversion_of(kind.text if kind else str(model.config.get("model_type")))
    if naming is None:
        return None
    full = filled(model.config)
    own = {field: value for field, value in model.config.items() if field in OWN}
    text = {**(full["text_config"] if kind else full), **own}
    return naming.equal(text, model.tied) if forth else naming.straight(text)
