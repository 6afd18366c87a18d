"""Writes folders whose matrices are packed into several tensors each; `_packed` reads them.

What such layouts have in common is here: that embeddings and what is not quantized stay as they are, that the writer
streams, and how large files become. A layout says what its tensors are and how codes become words.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from qtool.artifact._base import Artifact, Carry
from qtool.artifact._footprint import Footprint
from qtool.artifact._packed import Infos
from qtool.artifact._shards import Pieces, Read, overhead, write_shards
from qtool.artifact._stacks import Stacks, join
from qtool.checkpoint._base import Checkpoint, Layer, Module, QuantizedCheckpoint, TensorInfo
from qtool.checkpoint.parts import parts_of
from qtool.checkpoint.raw_bytes import Stretch
from qtool.formats._base import Quantized
from qtool.numerics.threads.ranks import ALONE, Ranks
from qtool.store.files import storage_errors
from qtool.store.side_files import write_side_files


@dataclass(frozen=True)
class Layout:
    """How a model is stored.

    Attributes:
        infos: module, layer, N, K -> the tensors of a matrix, by their names below the module.
        encode: module, codes -> these tensors.
        more: small tensors that are written behind all others, by name.
        stacks: modules whose tensors are written as one.
        name: see `Parts.layout`; empty: nothing is taken over as it is stored.
    """

    infos: Callable[[str, Layer, int, int], Infos]
    encode: Callable[[str, Quantized], Mapping[str, Tensor]]
    more: Mapping[str, Tensor] = field(default_factory=dict)
    stacks: Stacks = field(default_factory=dict)
    name: str = ""


class PackedArtifact(Artifact):
    """A layout of packed matrices; a subclass says which layers it refuses.

    Attributes:
        packs_embeddings: True if the token embedding may be one of them.
    """

    packs_embeddings: ClassVar[bool] = False

    @abstractmethod
    def _refusal(self, module: Module, layer: Layer) -> str | None:
        """Why a layer cannot be held; None if it can."""

    def holds(self, module: Module, layer: Layer | None, keep: str) -> Carry:
        """See `Artifact.holds`."""
        if layer is None:
            return Carry(True)
        if module.kind == "embedding" and not self.packs_embeddings:
            tied = " and is the output layer at the same time" if module.aliases else ""
            return Carry(False, f"the token embedding stays unquantized in this layout{tied}: keep it")
        reason = self._refusal(module, layer)
        return Carry(reason is None, reason or "")

    def agree(self, layers: Collection[Layer]) -> Carry:
        """See `Artifact.agree`."""
        return Carry(bool(layers), "nothing of the model is quantized")

    @abstractmethod
    def _layout(self, model: Checkpoint, layers: Mapping[str, Layer]) -> Layout:
        """How a model is stored some of whose modules are quantized."""

    @abstractmethod
    def _config(self, model: QuantizedCheckpoint) -> dict[str, Any]:
        """What config.json says."""

    def _more_files(self, model: QuantizedCheckpoint) -> dict[str, Any]:
        """What further files in JSON say, by name."""
        return {}

    def nbytes(self, model: Checkpoint, module: Module, layer: Layer | None, keep: str = "source") -> int:
        """See `Artifact.nbytes`."""
        if layer is None:
            return super().nbytes(model, module, layer, keep)
        infos = self._layout(model, {module.name: layer}).infos(module.name, layer, *module.shape)
        beside = sum(residual.storage_bits(*module.shape) for residual in layer.residuals)
        return sum(info.nbytes for info in infos.values()) + beside // 8

    def footprint(self, model: QuantizedCheckpoint, card: Mapping[str, Any] | None = None) -> Footprint:
        """See `Artifact.footprint`."""
        layout = self._layout(model, model.layers)
        return self._footprint(model, overhead(_pieces(model, layout)[0]), layout.more)

    def try_matrix(self, model: Checkpoint, module: str, layer: Layer, quantized: Quantized) -> None:
        """See `Artifact.try_matrix`."""
        self._layout(model, {module: layer}).encode(module, quantized)

    def write(self, model: QuantizedCheckpoint, out: Path, card: dict[str, Any]) -> list[Path]:
        """See `Artifact.write`; one matrix is in memory at a time."""
        return [*self.write_together(model, out, card, ALONE)]

    def write_together(
        self, model: QuantizedCheckpoint, out: Path, card: dict[str, Any], ranks: Ranks
    ) -> Sequence[Path]:
        """See `Artifact.write_together`: matrices are shared."""
        self.check(model)
        files = write_shards(out, *_pieces(model, self._layout(model, model.layers)), ranks=ranks)
        if not ranks.first:
            return ()
        files += write_side_files(model, out, self._config(model))
        more = self._more_files(model)
        for name, content in more.items():
            with storage_errors(out):
                (out / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return [*files, *(out / name for name in more)]


def _pieces(model: QuantizedCheckpoint, layout: Layout) -> tuple[Pieces, Read]:
    """What is written, in order, and what reads it, as `write_shards` takes it."""
    pieces: dict[str, Infos] = {}
    for name in model.names():
        module = name.removesuffix(".weight")
        if layer := model.layers.get(module):
            n, k = model.info(name).shape
            parts = layout.infos(module, layer, n, k)
            pieces[name] = {f"{module}.{part}": info for part, info in parts.items()}
        else:
            pieces[name] = {name: model.info(name)}
    pieces |= {name: {name: TensorInfo(tuple(t.shape), t.dtype)} for name, t in layout.more.items()}

    def read(name: str) -> Mapping[str, Tensor | Stretch]:
        if name in layout.more:
            return {name: layout.more[name]}
        module = name.removesuffix(".weight")
        if module not in model.layers:
            return {name: model.tensor(name)}
        stored = parts_of(model, module)
        infos = {tensor.removeprefix(f"{module}."): info for tensor, info in pieces[name].items()}
        if stored and stored.layout == layout.name and stored.infos == infos:
            return {f"{module}.{part}": place for part, place in stored.places.items()}
        matrix = model.matrix(module)
        codes = matrix.quantized if model.layers[module].residuals else matrix.alone  # what is declared has a place
        parts = layout.encode(module, codes)
        return {f"{module}.{part}": tensor for part, tensor in parts.items()}

    return join(pieces, read, layout.stacks)
