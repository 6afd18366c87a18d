"""What becomes of matrices beside the model that its file has quantized and no rule names."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from qtool.checkpoint._base import Checkpoint, Module, QuantizedCheckpoint
from qtool.checkpoint.modules import BESIDE
from qtool.checkpoint.parts import parts_of
from qtool.methods._base import Method
from qtool.plan.decide import kept_bits
from qtool.plan.layers import LayerPlan


def with_stored(
    layers: Sequence[LayerPlan],
    found: Sequence[Module],
    checkpoint: Checkpoint,
    layouts: Collection[str],
    outside: Collection[str] = (),
) -> tuple[LayerPlan, ...]:
    """The plan with these matrices: as their file has them, if all artifacts store them alike, and decoded if not.

    Args:
        layers: what rules decided.
        found: all matrices, of the model and beside it.
        checkpoint: the model.
        layouts: names of the artifacts.
        outside: tensors that none of them holds.
    """
    if not isinstance(checkpoint, QuantizedCheckpoint):
        return tuple(layers)
    decided = {p.module.name for p in layers} | {name.removesuffix(".weight") for name in outside}
    others = [m for m in found if m.kind == BESIDE and m.name in checkpoint.layers and m.name not in decided]
    stored = [_stored(module, checkpoint, layouts) for module in others]
    order = {module.name: i for i, module in enumerate(found)}
    return tuple(sorted([*layers, *stored], key=lambda p: order[p.module.name]))


def _stored(module: Module, checkpoint: QuantizedCheckpoint, layouts: Collection[str]) -> LayerPlan:
    layer, parts = checkpoint.layers[module.name], parts_of(checkpoint, module.name)
    if parts is None or {*layouts} - {parts.layout}:
        bits = kept_bits(module, "source", checkpoint)
        return LayerPlan(module, None, None, None, "source", None, -1, bits)
    bits = layer.storage_bits(*module.shape)
    return LayerPlan(module, layer.format, Method.of("rtn"), layer.activations, "source", None, -1, bits)
