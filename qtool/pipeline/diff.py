"""What differs between two models of one architecture: types, sizes, values, metadata."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict

from qtool.checkpoint._base import Checkpoint
from qtool.errors import UsageError
from qtool.models import open_model
from qtool.numerics.metrics import energy, ratio_db
from qtool.pipeline.events import Event, Listener, silent
from qtool.pipeline.inspect import Contents, StoredTensor
from qtool.pipeline.inspect import run as inspect
from qtool.pipeline.rows import row_parts


class TensorDiff(BaseModel):
    """A tensor of both models.

    Attributes:
        name: of the tensor.
        types, bits: how each stores it.
        error_db: 10 log10(|A|^2 / |A - B|^2) of decoded values, dB; infinite where they are equal.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    name: str
    types: tuple[str, str]
    bits: tuple[int, int]
    error_db: float


class Diff(BaseModel):
    """Two models side by side.

    Attributes:
        sources, kinds, nbytes: of each model; bytes of tensors.
        tensors: those of both.
        only: names of tensors that just one has.
        metadata: key -> what each says, where that differs; None where one says nothing.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    sources: tuple[str, str]
    kinds: tuple[str, str]
    nbytes: tuple[int, int]
    tensors: tuple[TensorDiff, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]
    metadata: dict[str, tuple[object, object]]


def run(first: str, second: str, listener: Listener = silent) -> Diff:
    """Reads both models, a few rows at a time.

    Args:
        first: A; errors are relative to it.
        second: B.
        listener: is told about each tensor.

    Raises:
        UsageError: they are models of different shapes.
        CheckpointError, HubError: one cannot be opened or read.
    """
    contents = inspect(first), inspect(second)
    models = open_model(first), open_model(second)
    found = [{t.name: t for t in each.tensors} for each in contents]
    both = [name for name in found[0] if name in found[1]]
    tensors = []
    for done, name in enumerate(both):
        listener(Event("compare", done, len(both), name))
        tensors.append(tensor_diff(name, found[0][name], found[1][name], models))
    listener(Event("compare", len(both), len(both)))
    return Diff(
        sources=(first, second),
        kinds=(contents[0].kind, contents[1].kind),
        nbytes=(contents[0].bits // 8, contents[1].bits // 8),
        tensors=tuple(tensors),
        only=(tuple(n for n in found[0] if n not in found[1]), tuple(n for n in found[1] if n not in found[0])),
        metadata=metadata_diff(*contents),
    )


def tensor_diff(name: str, a: StoredTensor, b: StoredTensor, models: tuple[Checkpoint, Checkpoint]) -> TensorDiff:
    """Compares the values of one tensor. Raises UsageError: the shapes differ."""
    if a.shape != b.shape:
        raise UsageError(f"{name} has other shapes in the two models", wanted=list(a.shape), found=list(b.shape))
    signal = error = 0.0
    for start, stop in row_parts(a.shape):
        x, y = (model.rows(name, start, stop).float().view(-1, a.shape[-1]) for model in models)
        signal, error = signal + energy(x), error + energy(x - y)
    return TensorDiff(name=name, types=(a.type, b.type), bits=(a.bits, b.bits), error_db=ratio_db(signal, error))


def metadata_diff(a: Contents, b: Contents) -> dict[str, tuple[object, object]]:
    """Keys of config.json, and of files' headers, that differ."""
    headers = [each.metadata | {f"{each.kind}: {key}": value for key, value in each.header.items()} for each in (a, b)]
    if not (a.header and b.header):  # a layout without a header has nothing that could differ from one
        headers = [a.metadata, b.metadata]
    keys = dict.fromkeys([*headers[0], *headers[1]])
    return {
        key: (headers[0].get(key), headers[1].get(key)) for key in keys if headers[0].get(key) != headers[1].get(key)
    }


def groups(diff: Diff) -> dict[tuple[str, str], list[TensorDiff]]:
    """Tensors that differ in type or value, by the pair of types."""
    found: dict[tuple[str, str], list[TensorDiff]] = {}
    for tensor in diff.tensors:
        if tensor.types[0] != tensor.types[1] or math.isfinite(tensor.error_db):
            found.setdefault(tensor.types, []).append(tensor)
    return found
