"""ModelOpt checkpoints, which TensorRT-LLM, vLLM and SGLang load.

4-bit integers in groups (W4A16_AWQ), 8-bit ones per row (W8A16), FP8 per tensor with calibrated inputs or per row with
inputs per token, MXFP8, NVFP4 alone (W4A16_NVFP4) or with inputs in NVFP4 that have a calibrated scale, mixtures of
them, and FP8 KV caches. W4A16_AWQ scales inputs before it multiplies: by 1 where qtool writes it; a file with other
factors is decoded.
Layout: https://github.com/NVIDIA/Model-Optimizer
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from qtool.artifact._base import Carry, naming
from qtool.artifact._packed_artifact import Layout, PackedArtifact
from qtool.artifact.modelopt._algos import ALGOS, algo_of, fp8
from qtool.artifact.modelopt._reader import CONFIG, ModelOptCheckpoint, read_quantization
from qtool.artifact.modelopt._writer import ModelOptTensors, cache_scales, flat, settings
from qtool.checkpoint._base import Checkpoint, Layer, Module, QuantizedCheckpoint
from qtool.formats._base import alike
from qtool.recipe.cache import KVCache


class ModelOpt(PackedArtifact):
    """See the module."""

    fuses: ClassVar[bool] = True
    runtimes: ClassVar[tuple[str, ...]] = ("TensorRT-LLM", "vLLM", "SGLang")
    usage: ClassVar[str] = "`trtllm-serve FOLDER` serves it."

    def _refusal(self, module: Module, layer: Layer) -> str | None:
        """See `PackedArtifact._refusal`."""
        algo = algo_of(layer)
        if algo is None:
            wanted = "int4 in groups, int8-channel, nvfp4, and nvfp4, fp8-tensor, fp8-channel, mxfp8 with inputs alike"
            return f"ModelOpt holds {wanted}, not {layer.label}"
        odd = algo is ALGOS["W4A16_AWQ"] and module.shape[0] % 2
        return f"ModelOpt packs 2 rows together, which {module.shape[0]} are not" if odd else None

    def caches(self, fmt: KVCache | None) -> Carry:
        """See `Artifact.caches`: FP8 with one scale per block for keys and one for values."""
        own = fp8("tensor")
        possible = fmt is None or (fmt.hadamard is None and alike(fmt.keys, own) and alike(fmt.values, own))
        return Carry(possible, "" if fmt is None or possible else f"its KV caches are fp8-tensor, not {fmt.label}")

    def caveats(self, model: Checkpoint, layers: Mapping[str, Layer]) -> list[str]:
        """See `Artifact.caveats`; from vllm/model_executor/layers/quantization/modelopt.py."""
        integers = [layer for layer in layers.values() if algo_of(layer) in (ALGOS["W4A16_AWQ"], ALGOS["W8A16"])]
        return naming({"vLLM does not load {} from ModelOpt checkpoints; TensorRT-LLM does": integers})

    def _layout(self, model: Checkpoint, layers: Mapping[str, Layer]) -> Layout:
        """See `PackedArtifact._layout`."""
        writer = ModelOptTensors(model, layers)
        return Layout(writer.infos, writer.encode, cache_scales(model))

    def _config(self, model: QuantizedCheckpoint) -> dict[str, Any]:
        """See `PackedArtifact._config`."""
        return model.config | {"quantization_config": flat(settings(model))}

    def _more_files(self, model: QuantizedCheckpoint) -> dict[str, Any]:
        """See `PackedArtifact._more_files`."""
        return {CONFIG: settings(model)}

    def open(self, path: Path) -> QuantizedCheckpoint:
        """See `Artifact.open`."""
        return ModelOptCheckpoint(path)

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """See `Artifact.recognizes`."""
        return bool(read_quantization(path))
