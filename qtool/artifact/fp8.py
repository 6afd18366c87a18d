"""FP8 in blocks of 128 x 128, as DeepSeek-V3 and its kin are published, which transformers, vLLM and SGLang load.

    weight             e4m3 [N, K]
    weight_scale_inv   float32 [N / 128, K / 128], rounded up

    w_hat = weight * weight_scale_inv

Inputs are rounded to FP8 at run time, with a scale per token and 128 columns.
Source: https://github.com/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from qtool.artifact._floats import finite_e4m3, from_bits, to_bits
from qtool.artifact._packed import Infos, PackedCheckpoint, Packing
from qtool.artifact._packed_artifact import Layout, PackedArtifact
from qtool.artifact._settings import Settings, quantization_config, read_settings
from qtool.artifact._targets import kept_linears
from qtool.checkpoint._base import Checkpoint, Layer, Module, QuantizedCheckpoint, TensorInfo
from qtool.errors import NumericsError
from qtool.formats._base import Quantized
from qtool.formats.fp import FP
from qtool.formats.int import DTYPES

LAYOUT = "fp8"
"""See `PackedCheckpoint.layout`."""
BLOCK = 128
E4M3, SCALE = torch.float8_e4m3fn, "weight_scale_inv"
WEIGHTS = FP.model_validate({"element": "e4m3", "group": BLOCK, "rows": BLOCK, "scale_dtype": "fp32"})
INPUTS = FP.model_validate({"element": "e4m3", "group": BLOCK})


class FP8(PackedArtifact):
    """See the module."""

    besides: ClassVar[bool] = True
    fuses: ClassVar[bool] = True
    runtimes: ClassVar[tuple[str, ...]] = ("transformers", "vLLM", "SGLang")
    library: ClassVar[str | None] = "transformers"
    usage: ClassVar[str] = "`vllm serve FOLDER` serves it."

    def _refusal(self, module: Module, layer: Layer) -> str | None:
        """See `PackedArtifact._refusal`."""
        inputs = layer.activations.label if layer.activations else "unquantized"
        if WEIGHTS.may_hold(layer.format) or inputs != INPUTS.label:
            wanted = f"{WEIGHTS.label} with {INPUTS.label} inputs"
            return f"FP8 checkpoints hold {wanted}, not {layer.format.label} with {inputs} inputs"
        return None

    def _layout(self, model: Checkpoint, layers: Mapping[str, Layer]) -> Layout:
        """See `PackedArtifact._layout`."""
        return Layout(
            lambda _, layer, n, k: infos(n, k, torch.float32), lambda _, quantized: encode(quantized), name=LAYOUT
        )

    def _config(self, model: QuantizedCheckpoint) -> dict[str, Any]:
        """See `PackedArtifact._config`."""
        return model.config | {"quantization_config": settings(model)}

    def open(self, path: Path) -> QuantizedCheckpoint:
        """See `Artifact.open`."""
        return FP8Checkpoint(path)

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """See `Artifact.recognizes`."""
        return (quantization_config(path) or {}).get("quant_method") == "fp8"


def settings(model: QuantizedCheckpoint) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": kept_linears(model),
    }


def infos(n: int, k: int, dtype: torch.dtype) -> Infos:
    """Names below the module, shapes and types; `dtype` is that of scales."""
    return {"weight": TensorInfo((n, k), E4M3), SCALE: TensorInfo((-(-n // BLOCK), -(-k // BLOCK)), dtype)}


def encode(quantized: Quantized) -> dict[str, Tensor]:
    """The tensors of a matrix. Every row has the scales of its block."""
    codes, params, fmt = quantized.codes, quantized.params, quantized.format
    assert isinstance(fmt, FP)
    return {"weight": to_bits(codes, fmt).view(E4M3), SCALE: params["scale"][::BLOCK].float()}


class _FP8Settings(Settings):
    """`quantization_config`, as far as it says how to read the tensors."""

    weight_block_size: tuple[Literal[128], Literal[128]]
    activation_scheme: Literal["dynamic"] = "dynamic"
    fmt: Literal["e4m3"] = "e4m3"


class FP8Checkpoint(PackedCheckpoint):
    """An FP8 checkpoint; see `PackedCheckpoint`."""

    mark: ClassVar[str] = SCALE
    layout: ClassVar[str] = LAYOUT

    def _understand(self, how: Mapping[str, Any]) -> None:
        """See `PackedCheckpoint._understand`."""
        sizes = how.get("weight_block_size")
        listed = {"weight_block_size": tuple(sizes)} if isinstance(sizes, list) else {}
        read_settings(_FP8Settings, {**how, **listed}, self.source)

    def _check_part(self, module: str, packing: Packing, part: str, data: Tensor) -> None:
        """See `PackedCheckpoint._check_part`."""
        if not finite_e4m3(data, packing.parts[part].dtype):
            raise NumericsError(f"tensor {module}.weight is not finite", found=f"NaN or infinity in {self.source}")

    def _packing(self, module: str, n: int, k: int, found: Infos) -> Packing:
        """See `PackedCheckpoint._packing`."""
        scales = self._scale_dtype(module, SCALE, found)
        dtype = DTYPES[scales]
        fmt = WEIGHTS.model_copy(update={"scale_dtype": scales})
        if k % BLOCK:
            return Packing((n, k), None, infos(n, k, dtype), f"its rows end inside of a block of {BLOCK} columns")
        return Packing((n, k), Layer(fmt, INPUTS), infos(n, k, dtype))

    def _unpack(self, module: str, packing: Packing, start: int, stop: int) -> Quantized | Tensor:
        """See `PackedCheckpoint._unpack`."""
        weight = self._read(module, "weight", start, stop)
        scale = self._read(module, SCALE)[torch.arange(start, stop) // BLOCK]
        if packing.layer is None:
            return weight.float() * scale.float()[:, torch.arange(packing.shape[1]) // BLOCK]
        fmt = packing.layer.format
        assert isinstance(fmt, FP)
        return Quantized(from_bits(weight.view(torch.uint8), fmt), {"scale": scale}, fmt)
