"""compressed-tensors: the safetensors layouts that transformers and vLLM load by themselves.

Integer weights of 2 to 8 bits are stored packed (`pack-quantized`), 8-bit weights whose inputs are quantized as well as
int8 (`int-quantized`); FP8 weights per tensor, row or 128 x 128 block with inputs in FP8 (`float-quantized`) or alone
(`naive-quantized`); MXFP4, MXFP6 (E2M3), MXFP8 and NVFP4 in layouts of their own. Weights of 4 bits may have inputs in
INT8 or FP8. Formats whose levels are integers, with whatever scales (MXINT8, NVINT4, block floats), are stored as
integers. Codes and scales are stored as they are, so nothing is lost. Inputs in INT8, FP8 and NVFP4, and KV caches in
FP8, may have calibrated scales. Hadamard matrices that inputs are multiplied with are in `transform_config`. Branches
of low rank beside layers that are no experts are a LoRA adapter in the folder `adapter`, which runtimes are told of.

transformers decodes with compressed-tensors: packed widths of 3, 5, 6 and 7 bits need version 0.18 of it, blocks of FP8
0.19, MXFP4 0.16, MXFP6 0.20, everything else 0.15. What a runtime cannot read, or computes otherwise, is said by the
plan, the report and the model card. transformers leaves inputs of experts unrounded, decodes NVFP4 experts without the
scales of whole matrices, and does not load experts in INT8 with inputs in INT8, in MXFP8, or with zero points, nor zero
points beside a second format; it decodes MXFP4, MXFP6, MXFP8 and NVFP4 to bfloat16 whatever the model's type. vLLM does
not know MXFP6; it has zero points with 4 and 8 bits, and 4-bit weights with FP8 inputs in groups of 128 (on Hopper)
only; experts in packed widths other than 4 and 8, and FP8 experts whose inputs are left alone, it does not load.
Layout: https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qtool.artifact._base import Carry, Reading
from qtool.artifact._footprint import Footprint
from qtool.artifact._integers import model_dtype
from qtool.artifact._packed import Infos
from qtool.artifact._packed_artifact import Layout, PackedArtifact
from qtool.artifact._settings import quantization_config as quantization_config_of
from qtool.artifact.compressed_tensors import _adapter, _cache, _inputs, _transforms
from qtool.artifact.compressed_tensors._caveats import asymmetric, caveats
from qtool.artifact.compressed_tensors._config import METHOD, kind_of, quantization_config, refusal
from qtool.artifact.compressed_tensors._floats import MXQuantized, NVFP4Packed
from qtool.artifact.compressed_tensors._integers import PackQuantized
from qtool.artifact.compressed_tensors._kinds import Compressor
from qtool.artifact.compressed_tensors._reader import CompressedCheckpoint
from qtool.checkpoint._base import Checkpoint, Layer, Module, QuantizedCheckpoint
from qtool.formats._base import Quantized
from qtool.numerics.threads.ranks import Ranks
from qtool.ops._base import InputOp
from qtool.recipe.cache import KVCache
from qtool.residuals._base import Residual

USAGE = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")  # needs: pip install compressed-tensors
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

`vllm serve FOLDER` serves it.
"""


class CompressedTensors(PackedArtifact):
    """See the module."""

    besides: ClassVar[bool] = True
    fuses: ClassVar[bool] = True
    runtimes: ClassVar[tuple[str, ...]] = ("transformers", "vLLM")
    library: ClassVar[str | None] = "transformers"
    usage: ClassVar[str] = USAGE

    def _refusal(self, module: Module, layer: Layer) -> str | None:
        """See `PackedArtifact._refusal`."""
        if module.kind == "router":
            return "routers stay unquantized in compressed-tensors: keep it"
        if len(layer.input_ops) > 1:
            return "inputs behind more than one operation; the qtool artifact has them"
        return _adapter.refusal(layer) if kind_of(layer) else refusal(layer)

    def corrects(self, module: Module, residual: Residual) -> bool:
        """See `Artifact.corrects`: branches of low rank."""
        return _adapter.carries(module, residual)

    def operates(self, module: Module, op: InputOp) -> bool:
        """See `Artifact.operates`: Hadamard matrices without signs, of a power of two."""
        return _transforms.carries(module, op)

    def caches(self, fmt: KVCache | None) -> Carry:
        """See `Artifact.caches`: FP8 with one scale per tensor, or per head."""
        return _cache.carry(fmt)

    def caveats(self, model: Checkpoint, layers: Mapping[str, Layer]) -> list[str]:
        """See `Artifact.caveats`."""
        return [*caveats(model, layers), *_adapter.caveats(layers)]

    def reading(self, model: QuantizedCheckpoint) -> Reading:
        """See `Artifact.reading`."""
        decoded = any(isinstance(kind_of(layer), MXQuantized | NVFP4Packed) for layer in model.layers.values())
        known = [text for text in self.caveats(model, model.layers) if text.startswith("transformers ")]
        differs = [text for text in known if "to bfloat16" not in text]
        if decoded and any(layer.activations for layer in model.layers.values()):
            differs.append("transformers computes inputs in bfloat16, which round to others")
        if model.cache:
            differs.append("not every release of transformers rounds the KV cache")
        zeros = any(isinstance(kind_of(layer), PackQuantized) and asymmetric(layer) for layer in model.layers.values())
        return Reading(
            "transformers",
            torch.bfloat16 if decoded else torch.float32,
            differs="; ".join(differs),
            decodes=model_dtype(model) if zeros else None,  # that of scales, where it decodes while it loads
        )

    def one_format(self, module: Module) -> str | None:
        """See `Artifact.one_format`: vLLM runs all experts of a block as one layer."""
        return super().one_format(module) if module.stack is None else module.stack.rpartition(".")[0]

    def _layout(self, model: Checkpoint, layers: Mapping[str, Layer]) -> Layout:
        """See `PackedArtifact._layout`."""
        dtype = model_dtype(model)

        def kind(layer: Layer) -> Compressor:
            found = kind_of(layer)
            assert found is not None
            return found

        def parts(module: str, layer: Layer, n: int, k: int) -> Infos:
            return kind(layer).infos(layer.format, n, k, dtype) | _inputs.infos(layer, dtype)

        def encoded(module: str, quantized: Quantized) -> Mapping[str, Tensor]:
            layer = layers[module]
            return kind(layer).encode(quantized, module, dtype) | _inputs.encode(layer, module, dtype)

        return Layout(parts, encoded, _cache.tensors(model, dtype), name=METHOD)

    def _config(self, model: QuantizedCheckpoint) -> dict[str, Any]:
        """See `PackedArtifact._config`."""
        return model.config | {"quantization_config": quantization_config(model)}

    def footprint(self, model: QuantizedCheckpoint, card: Mapping[str, Any] | None = None) -> Footprint:
        """See `Artifact.footprint`."""
        found = super().footprint(model, card)
        return replace(found, overhead=found.overhead + _adapter.overhead(model))

    def write_together(
        self, model: QuantizedCheckpoint, out: Path, card: dict[str, Any], ranks: Ranks
    ) -> Sequence[Path]:
        """See `Artifact.write_together`."""
        files = super().write_together(model, out, card, ranks)
        return [*files, *_adapter.write(model, out)] if ranks.first else ()

    def open(self, path: Path) -> CompressedCheckpoint:
        """See `Artifact.open`."""
        return CompressedCheckpoint(path)

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """See `Artifact.recognizes`."""
        return (quantization_config_of(path) or {}).get("quant_method") == METHOD
