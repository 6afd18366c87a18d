"""Numbers that replace some of a quantized model's: one sealed file, and the model that reads them in their place.

Parameters of matrices are tensors named as in the neutral checkpoint ("<module>.weight.scale"), all others go by their
own names. The header's metadata say which run it belongs to, what there is to report, and a checksum over all of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from qtool.checkpoint._base import QuantizedCheckpoint, TensorInfo
from qtool.checkpoint.safetensors_io import SafetensorsFile, SafetensorsWriter
from qtool.errors import CheckpointError
from qtool.methods._base import Course
from qtool.numerics.checks import finite
from qtool.numerics.checksum import Checksum
from qtool.residuals._base import Matrix
from qtool.store.files import new_file
from qtool.store.manifest import WEIGHT, checked

Params = Mapping[str, Mapping[str, Tensor]]
"""Parameters by module and name, and codes by `CODES`."""

CODES = "codes"
"""What codes are called among parameters."""


class Overlaid(QuantizedCheckpoint):
    """A quantized model with other numbers in some places.

    Args:
        model: the model.
        params: parameters of matrices to replace, and codes (uint8 [N, K]) under the name `CODES`.
        tensors: tensors that are stored as they are, to replace.
        what: whose numbers they are, for messages.

    Raises:
        CheckpointError: the model has nothing of that name, shape and type.
        NumericsError: they are not finite.
    """

    def __init__(self, model: QuantizedCheckpoint, params: Params, tensors: Mapping[str, Tensor], what: str) -> None:
        self.source, self.config, self.family, self.files = model.source, model.config, model.family, model.files
        self.notes, self.layers, self.cache = model.notes, model.layers, model.cache
        self._model, self._params, self._tensors, self._what = model, params, tensors, what
        for module in params:
            if module not in self.layers:
                raise CheckpointError(f"{what}: {module}", wanted="a quantized matrix", found="none of that name")
            checked(self.matrix(module).quantized, module, Path(what))
        for name, tensor in tensors.items():
            if name.removesuffix(".weight") in self.layers or name not in model:
                raise CheckpointError(f"{what}: {name}", wanted="a tensor that is not quantized", found="none such")
            _same_kind(f"{what}: {name}", tensor, model.info(name))
            finite(tensor, name)

    def names(self) -> list[str]:
        """See `Checkpoint.names`."""
        return self._model.names()

    def info(self, name: str) -> TensorInfo:
        """See `Checkpoint.info`."""
        return self._model.info(name)

    def tensor(self, name: str) -> Tensor:
        """See `Checkpoint.tensor`."""
        if name in self._tensors:
            return self._tensors[name].clone()
        module = name.removesuffix(".weight")
        return self.matrix(module).decode() if module in self._params else self._model.tensor(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `Checkpoint.rows`."""
        if name in self._tensors:
            return self._tensors[name][start:stop].clone()
        module = name.removesuffix(".weight")
        if module in self._params:
            return self.matrix(module).rows(start, stop).decode()
        return self._model.rows(name, start, stop)

    def matrix(self, module: str) -> Matrix:
        """See `QuantizedCheckpoint.matrix`."""
        matrix = self._model.matrix(module)
        own = self._params.get(module, {})
        found = {**matrix.quantized.params, CODES: matrix.quantized.codes}
        for name, tensor in own.items():
            if (present := found.get(name)) is None:
                wanted = ", ".join(sorted(matrix.quantized.params))
                raise CheckpointError(f"{self._what}: parameter of {module}", wanted=wanted, found=name)
            info = TensorInfo(tuple(present.shape), present.dtype)
            _same_kind(f"{self._what}: {name} of {module}", tensor, info)
        params = found | dict(own)
        codes = params.pop(CODES)
        return replace(matrix, quantized=replace(matrix.quantized, codes=codes, params=params))

    @property
    def decoded(self) -> Mapping[str, str]:
        """See `QuantizedCheckpoint.decoded`."""
        return self._model.decoded

    def fingerprint(self) -> str:
        """See `Checkpoint.fingerprint`: of the model, and of what replaces its numbers."""
        text = self._model.fingerprint() + _digest(flat(self._params, self._tensors), "")
        return hashlib.sha256(text.encode()).hexdigest()


def _same_kind(what: str, tensor: Tensor, wanted: TensorInfo) -> None:
    """Raises CheckpointError: another shape or type."""
    if (found := TensorInfo(tuple(tensor.shape), tensor.dtype)) != wanted:
        raise CheckpointError(what, wanted=wanted, found=found)


def flat(params: Params, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of it by the names in a file, in alphabetical order."""
    found = {f"{module}.{WEIGHT}{name}": t for module, own in params.items() for name, t in own.items()}
    found |= tensors
    return {name: found[name].detach().cpu().contiguous() for name in sorted(found)}


def write_overlay(
    path: Path,
    params: Params,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, float | str],
    run: str,
    course: Course = (),
) -> None:
    """Writes the file, whole or not at all.

    Args:
        path: where.
        params: see `Overlaid`.
        tensors: see `Overlaid`.
        about: what there is to report.
        run: what identifies the run that found them, all before it included.
        course: of the training that found them.

    Raises:
        StorageError: the disk is full or not writable.
    """
    header, content = json.dumps([run, dict(about), list(course)]), flat(params, tensors)
    infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in content.items()}
    metadata = {"content": header, "seal": _digest(content, header)}
    with new_file(path) as partial, SafetensorsWriter(partial, infos, metadata) as writer:
        for name, tensor in content.items():
            writer.add(name, tensor)


def read_overlay(
    path: Path, run: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], dict[str, float | str], Course] | None:
    """(params, tensors, about, course) of a file that this very run wrote; None: there is none, or it is another run's.

    Raises:
        CheckpointError: damaged.
    """
    if not path.is_file():
        return None
    file = SafetensorsFile(path)
    try:
        header, seal = file.metadata["content"], file.metadata["seal"]
        found, *rest = json.loads(header)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    content = {name: file.read(name) for name in file.entries}
    if _digest(content, header) != seal:
        raise CheckpointError(f"{path} is damaged: its seal is another one")
    if found != run or len(rest) != 2:  # an earlier release wrote no course
        return None
    about, course = rest
    params: dict[str, dict[str, Tensor]] = {}
    for name in [name for name in content if f".{WEIGHT}" in name]:
        module, _, own = name.rpartition(f".{WEIGHT}")
        params.setdefault(module, {})[own] = content.pop(name)
    return params, content, about, course


def _digest(content: Mapping[str, Tensor], header: str) -> str:
    """Hex digest of tensors, whatever their order, and of a text."""
    found = Checksum()
    for name in sorted(content):
        found.add(name, content[name])
    return hashlib.sha256((found.hexdigest() + header).encode()).hexdigest()
