"""GPTQ checkpoints, which vLLM, SGLang and GPTQModel (and through it transformers) load: integers of 2, 3, 4 or 8 bits.

Zero points come in two ways: files that call themselves `gptq` store them less 1, files that call themselves `gptq_v2`
as they are. A model with asymmetric layers is written as the latter, because 0 less 1 has no code. Layers that differ
from the most frequent format, and those that stay as they are, get entries of `dynamic`, which transformers does not
look at. Codes whose groups are in activation order are read, but their groups have no place in other layouts.
Layout: https://github.com/ModelCloud/GPTQModel
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from qtool.artifact._base import Reading, naming
from qtool.artifact._integers import as_integers, half_dtype, integers
from qtool.artifact._packed import Infos
from qtool.artifact._packed_artifact import Layout, PackedArtifact
from qtool.artifact._settings import quantization_config
from qtool.artifact.gptq._config import checkpoint_format, settings
from qtool.artifact.gptq._layout import BITS, encode, infos
from qtool.artifact.gptq._reader import GPTQCheckpoint
from qtool.checkpoint._base import Checkpoint, Layer, Module, QuantizedCheckpoint


class GPTQ(PackedArtifact):
    """See the module."""

    fuses: ClassVar[bool] = True
    runtimes: ClassVar[tuple[str, ...]] = ("vLLM", "SGLang", "GPTQModel")
    library: ClassVar[str | None] = "transformers"
    usage: ClassVar[str] = "`vllm serve FOLDER` serves it."

    def _refusal(self, module: Module, layer: Layer) -> str | None:
        """See `PackedArtifact._refusal`."""
        fmt = integers(layer.format)
        if fmt is None or fmt.bits not in BITS or fmt.group == "token":
            wanted = "integers of 2, 3, 4 or 8 bits per group or channel, such as int4-g128"
            return f"GPTQ holds {wanted}, not {layer.format.label}"
        if layer.activations is not None:
            return "GPTQ cannot say how activations are quantized"
        n, k = module.shape
        return f"GPTQ packs 32 rows and columns together, which {n} x {k} weights are not" if n % 32 or k % 32 else None

    def reading(self, model: QuantizedCheckpoint) -> Reading:
        """See `Artifact.reading`."""
        return Reading("vLLM", torch.float16, other="GPTQModel")

    def caveats(self, model: Checkpoint, layers: Mapping[str, Layer]) -> list[str]:
        """See `Artifact.caveats`; from vllm/model_executor/layers/quantization/auto_gptq.py."""
        others = [layer for layer in layers.values() if not _marlin(layer)]
        text = "vLLM loads symmetric integers of 4 and 8 bits only, whole rows or groups of 32, 64 or 128, not {}"
        return naming({f"{text}; GPTQModel does": others})

    def _layout(self, model: Checkpoint, layers: Mapping[str, Layer]) -> Layout:
        """See `PackedArtifact._layout`."""
        dtype, less = half_dtype(model), 1 if checkpoint_format(layers.values()) == "gptq" else 0

        def parts(module: str, layer: Layer, n: int, k: int) -> Infos:
            ints = integers(layer.format)
            assert ints is not None
            return infos(ints.bits, k // (ints.group_columns or k), n, k, dtype)

        return Layout(parts, lambda module, quantized: encode(as_integers(quantized, module, dtype), less))

    def _config(self, model: QuantizedCheckpoint) -> dict[str, Any]:
        """See `PackedArtifact._config`."""
        return model.config | {"quantization_config": settings(model)}

    def _more_files(self, model: QuantizedCheckpoint) -> dict[str, Any]:
        """See `PackedArtifact._more_files`."""
        return {"quantize_config.json": settings(model)}

    def open(self, path: Path) -> QuantizedCheckpoint:
        """See `Artifact.open`."""
        return GPTQCheckpoint(path)

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """See `Artifact.recognizes`."""
        return (quantization_config(path) or {}).get("quant_method") == "gptq"


def _marlin(layer: Layer) -> bool:
    """Whether the kernels that vLLM runs GPTQ checkpoints with have its format."""
    fmt = integers(layer.format)
    assert fmt is not None
    return fmt.symmetric and fmt.bits in (4, 8) and fmt.group_columns in (None, 32, 64, 128)
