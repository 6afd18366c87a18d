"""An artifact that was just written is read back by its own reader and compared with what was meant."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod

import torch
from torch import Tensor

from qtool.checkpoint._base import QuantizedCheckpoint
from qtool.checkpoint.parts import parts_of
from qtool.checkpoint.raw_bytes import same_stretches
from qtool.errors import VerifyError
from qtool.formats._base import alike
from qtool.numerics.threads.parallel import one_by_one, small_together
from qtool.numerics.threads.ranks import ALONE, Ranks
from qtool.pipeline.events import Event, Listener
from qtool.pipeline.requantize import stored_matrix
from qtool.pipeline.rows import row_parts
from qtool.residuals._base import Matrix

SMALL = 1 << 22
"""Numbers of a tensor that one thread compares, beside others; larger ones would take much memory at a time."""


def verify(
    stage: str, written: QuantizedCheckpoint, model: QuantizedCheckpoint, listener: Listener, ranks: Ranks = ALONE
) -> None:
    """Compares every tensor, weights as a runtime decodes them.

    Args:
        stage: name for the listener.
        written: the artifact, read back.
        model: what it was written from.
        listener: told about each tensor.
        ranks: who compares others.

    Raises:
        VerifyError: a tensor is missing or differs.
    """
    names = model.names()[ranks.share(len(model.names()))]
    present = set(written.names())
    if cached(written) != cached(model):
        raise VerifyError(f"{written.source}: KV cache", wanted=cached(model), found=cached(written))
    listener(Event(stage, 0, len(names)))
    modules = [name.removesuffix(".weight") for name in names]
    copies = one_by_one(partial(same_parts, model, written), modules)

    def check(what: tuple[str, bool]) -> str:
        name, copied = what
        if name not in present:
            raise VerifyError(f"{written.source}: {name}", wanted="a tensor", found="missing")
        compare(name, written, model, copied)
        return name

    def small(what: tuple[str, bool]) -> bool:
        return prod(model.info(what[0]).shape) <= SMALL

    checked = small_together(check, zip(names, copies, strict=True), small)
    for done, name in enumerate(checked, 1):
        listener(Event(stage, done, len(names), name))


def compare(name: str, written: QuantizedCheckpoint, model: QuantizedCheckpoint, copied: bool) -> None:
    """Compares one tensor; see `verify`. `copied`: whether it was taken over as it was stored, see `same_parts`."""
    module = name.removesuffix(".weight")
    if (module in model.layers) != (module in written.layers):
        quantized = module in model.layers
        raise VerifyError(
            f"{written.source}: {name}",
            wanted="quantized" if quantized else "kept",
            found="kept" if quantized else "quantized",
        )
    if module in model.layers and inputs(model, module) != inputs(written, module):
        raise VerifyError(
            f"{written.source}: activations of {module}",
            wanted=inputs(model, module),
            found=inputs(written, module),
        )
    if copied:
        return
    stored = stored_matrix(written, module)  # first, since unpacking codes takes twice their memory for a moment
    source = stored_matrix(model, module)
    if stored and source and same(stored, source):
        return
    for start, stop in row_parts(model.info(name).shape):
        wanted = source.rows(start, stop).decode() if source else model.rows(name, start, stop).float()
        found = stored.rows(start, stop).decode() if stored else written.rows(name, start, stop).float()
        same_numbers = torch.allclose(wanted, found, 1e-6, 1e-6) if written.rounds(name) else torch.equal(wanted, found)
        if not same_numbers:
            raise VerifyError(f"{written.source}: {name} read back differs", found=difference(wanted, found))


def same_parts(model: QuantizedCheckpoint, written: QuantizedCheckpoint, module: str) -> bool:
    """Whether a matrix was taken over as it was stored, which is seen without decoding it."""
    if module not in model.layers or module not in written.layers:
        return False
    wanted, found = parts_of(model, module), parts_of(written, module)
    if not wanted or not found or not wanted.are(found):
        return False
    if not alike(model.layers[module].format, written.layers[module].format):
        return False
    return all(same_stretches(place, found.places[part]) for part, place in wanted.places.items())


def same(a: Matrix, b: Matrix) -> bool:
    """True if all that decoding reads is equal, which is quicker to see than that its results are."""
    return (
        alike(a.quantized.format, b.quantized.format)
        and torch.equal(a.quantized.codes, b.quantized.codes)
        and same_tensors(a.quantized.params, b.quantized.params)
        and [c.residual for c in a.residuals] == [c.residual for c in b.residuals]
        and all(same_tensors(c.tensors, d.tensors) for c, d in zip(a.residuals, b.residuals, strict=True))
    )


def same_tensors(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """True if names, types and numbers are equal."""
    return a.keys() == b.keys() and all(t.dtype == b[name].dtype and torch.equal(t, b[name]) for name, t in a.items())


def inputs(model: QuantizedCheckpoint, module: str) -> str:
    """How a module's inputs are rounded; how their scales are found is the runtime's business and stored nowhere."""
    activations, static = model.layers[module].activations, model.layers[module].static
    label = activations.at_run_time().label if activations else "as they are"
    return f"{label}, scale {static.scale!r}, zero point {static.zero}" if static else label


def cached(model: QuantizedCheckpoint) -> str:
    """How the KV cache is rounded."""
    return f"{model.cache.format.label}, scales {model.cache.statics}" if model.cache else "left alone"


def difference(wanted: torch.Tensor, found: torch.Tensor) -> str:
    """How much two tensors differ, for a message."""
    if wanted.shape != found.shape:
        return f"shape {list(found.shape)} instead of {list(wanted.shape)}"
    apart = wanted != found
    return f"{int(apart.sum())} of {apart.numel()} numbers, by up to {float((wanted - found).abs().max()):.3g}"
