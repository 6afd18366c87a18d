"""How large a GGUF file becomes."""

from __future__ import annotations

from qtool.artifact._footprint import Footprint
from qtool.artifact.gguf._writer import ModelWriter, block_bytes, cut, split_metadata
from qtool.store.gguf_writer import ALIGNMENT, header


def footprint(writer: ModelWriter, modules: dict[str, int]) -> Footprint:
    """Bytes of all parts of a model.

    Args:
        writer: of the model.
        modules: bytes of each matrix.
    """
    sizes = {there: writer.most(there) for there in writer.shapes}
    parts = cut(sizes, writer.options.split_max_size)
    total = sum(size + -size % ALIGNMENT for size in sizes.values())
    for i, names in enumerate(parts):
        split = split_metadata(i, len(parts), len(writer.shapes))
        shapes = {name: writer.shapes[name] for name in names}
        total += len(header((writer.metadata if i == 0 else {}) | split, shapes, dict.fromkeys(names, (0, 0))))
    matrices = {f"{module}.weight" for module in modules}
    rest = sum(sizes[there] for there, names in writer.members.items() if matrices.isdisjoint(names))
    rest += sum(size for there, size in sizes.items() if there not in writer.members)
    exact = all(
        len(block_bytes(layer.format, *writer.model.info(f"{module}.weight").shape)) == 1
        for module, layer in writer.model.layers.items()
    )
    return Footprint(modules, rest, total - rest - sum(modules.values()), exact)
