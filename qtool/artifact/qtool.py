"""The neutral checkpoint: any format's codes and parameters, without what a runtime wants of them.

One safetensors file (https://github.com/huggingface/safetensors#format) per decoder block, one for what is outside of
the blocks, and a manifest; docs/neutral-checkpoint.md is the specification. qtool itself is the only runtime: `eval`
reads it, and `export` turns it into artifacts that others read, as soon as they can hold the formats.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from qtool.artifact._base import Artifact, Carry
from qtool.artifact._footprint import Footprint
from qtool.checkpoint._base import Checkpoint, Layer, Module, QuantizedCheckpoint
from qtool.checkpoint.safetensors_io import header
from qtool.ops._base import InputOp
from qtool.recipe.cache import KVCache
from qtool.residuals._base import Residual
from qtool.store.manifest import BLOCK, MANIFEST
from qtool.store.neutral import METADATA, NeutralCheckpoint, NeutralWriter
from qtool.store.side_files import write_side_files
from qtool.store.sizes import block_infos, matrix_infos, op_infos

OUTSIDE = "outside"


class Qtool(Artifact):
    """See the module."""

    besides: ClassVar[bool] = True
    fuses: ClassVar[bool] = False
    runtimes: ClassVar[tuple[str, ...]] = ("qtool",)
    usage: ClassVar[str] = "`qtool export FOLDER --to NAME -o OUT` turns it into what other runtimes read."

    def holds(self, module: Module, layer: Layer | None, keep: str) -> Carry:
        """See `Artifact.holds`: everything."""
        return Carry(True)

    def corrects(self, module: Module, residual: Residual) -> bool:
        """See `Artifact.corrects`: every residual."""
        return True

    def operates(self, module: Module, op: InputOp) -> bool:
        """See `Artifact.operates`: every operation."""
        return True

    def supports(self, model: Checkpoint) -> Carry:
        """See `Artifact.supports`: every family."""
        return Carry(True)

    def caches(self, fmt: KVCache | None) -> Carry:
        """See `Artifact.caches`: every format."""
        return Carry(True)

    def write(self, model: QuantizedCheckpoint, out: Path, card: dict[str, Any]) -> list[Path]:
        """See `Artifact.write`."""
        groups = _groups(model)
        cache = model.cache
        writer = NeutralWriter(out, {"recipe": card.get("recipe_name")}, cache=cache.format if cache else None)
        scales = {f"{BLOCK}{i}": pair for i, pair in cache.statics.items()} if cache else {}
        for key, names in groups.items():
            modules = [name.removesuffix(".weight") for name in names]
            matrices = {module: model.matrix(module) for module in modules if module in model.layers}
            kept = [name for name in names if name.removesuffix(".weight") not in model.layers]
            block = writer.write_block(key, matrices, None, kept, model, model.layers, scales.get(key))
            writer.enter(key, block)
        files = [out / MANIFEST, *(out / f"{key}.safetensors" for key in groups)]
        return [*files, *write_side_files(model, out, model.config)]

    def nbytes(self, model: Checkpoint, module: Module, layer: Layer | None, keep: str = "source") -> int:
        """See `Artifact.nbytes`."""
        if layer is None:
            return super().nbytes(model, module, layer, keep)
        infos = matrix_infos(layer, *module.shape) | op_infos(layer)
        return sum(info.nbytes for info in infos.values())

    def footprint(self, model: QuantizedCheckpoint, card: Mapping[str, Any] | None = None) -> Footprint:
        """See `Artifact.footprint`."""
        files = (block_infos(model, model.layers, names) for names in _groups(model).values())
        return self._footprint(model, sum(len(header(infos, METADATA)[0]) for infos in files))

    def open(self, path: Path) -> NeutralCheckpoint:
        """See `Artifact.open`."""
        return NeutralCheckpoint(path)

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """See `Artifact.recognizes`."""
        return (path / MANIFEST).is_file()


def _groups(model: QuantizedCheckpoint) -> dict[str, list[str]]:
    """Tensor names by file: decoder blocks in order, then what is outside of them."""
    groups: dict[str, list[str]] = defaultdict(list)
    prefixes = {model.family.block_prefix.format(i=i): i for i in range(model.family.blocks(model.config))}
    for name in model.names():
        inside = (f"{BLOCK}{i}" for prefix, i in prefixes.items() if name.startswith(prefix))
        groups[next(inside, OUTSIDE)].append(name)
    groups[OUTSIDE] = groups.pop(OUTSIDE)
    return dict(groups)
