"""Which of its runtimes cannot read all that compressed-tensors can say; found with transformers 5.23 and vLLM 0.33."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from qtool.artifact._integers import model_dtype
from qtool.artifact.compressed_tensors._config import kind_of
from qtool.artifact.compressed_tensors._floats import FP8, MX4, MX6, MX8, NV4
from qtool.artifact.compressed_tensors._integers import Packed
from qtool.checkpoint._base import Checkpoint, Layer
from qtool.checkpoint.families._base import stacked
from qtool.formats.int import Int


def caveats(model: Checkpoint, layers: Mapping[str, Layer]) -> list[str]:
    """See `Artifact.caveats`."""
    found = set(layers.values())
    experts = {layer for name, layer in layers.items() if stacked(name)[1] is not None}
    loaded = {layer for layer in experts if isinstance(kind_of(layer), Packed | FP8 | MX4) and not _asymmetric(layer)}
    scaled_twice = {layer for layer in experts if isinstance(kind_of(layer), NV4)}
    decoded = {layer for layer in found if isinstance(kind_of(layer), MX8 | NV4)}
    told = {
        "transformers loses the scales of whole matrices of experts in {}; vLLM reads them": scaled_twice,
        "transformers does not load experts in {}": experts - loaded - scaled_twice,
        "transformers does not load {} beside other formats; vLLM does": {
            layer for layer in found if len(found) > 1 and _asymmetric(layer)
        },
        "transformers decodes {} to bfloat16: load the model with dtype=torch.bfloat16": {
            layer for layer in decoded if model_dtype(model) != torch.bfloat16
        },
        "vLLM does not know {}; transformers does, with compressed-tensors 0.20": {
            layer for layer in found if isinstance(kind_of(layer), MX6)
        },
    }
    labels = {text: ", ".join(sorted({layer.format.label for layer in those})) for text, those in told.items()}
    return [text.format(named) for text, named in labels.items() if named]


def _asymmetric(layer: Layer) -> bool:
    return isinstance(layer.format, Int) and not layer.format.symmetric
