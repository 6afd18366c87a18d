"""The quantizations that ModelOpt knows by name (`quant_algo`), each as tensors and back.

W4A16_AWQ    weight uint8 [N / 2, K]: signed nibbles, the even output low; weight_scale [N, G]; where runtimes do not
merge the matrix, pre_quant_scale [K], a factor of inputs
W8A16        weight int8 [N, K]; weight_scale [N]
FP8_PER_CHANNEL_PER_TOKEN    weight e4m3 [N, K]; weight_scale float32 [N]; inputs scaled at run time
MXFP8        weight e4m3 [N, K]; weight_scale uint8 [N, K / 32], exponents; inputs alike, at run time
FP8          weight e4m3 [N, K]; weight_scale float32; inputs alike, with input_scale float32 from calibration
W4A16_NVFP4  weight uint8 [N, K / 2], the even column low; weight_scale e4m3 [N, K / 16]; weight_scale_2 float32
NVFP4        as W4A16_NVFP4; inputs alike, where input_scale float32, from calibration, is what weight_scale_2 is
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from qtool.artifact._floats import from_bits, to_bits
from qtool.artifact._integers import integers
from qtool.artifact._packed import SCALE_DTYPES, Infos
from qtool.checkpoint._base import Layer, TensorInfo
from qtool.errors import PlanError
from qtool.formats._base import Quantized
from qtool.formats.fp import FP
from qtool.formats.int import DTYPES, Int
from qtool.formats.mxfp8 import MXFP8
from qtool.formats.nvfp4 import NVFP4
from qtool.numerics.grids.bits import pack, unpack

E4M3, SCALE = torch.float8_e4m3fn, "weight_scale"
Read = Callable[..., Tensor]
"""Part, first row, row after the last one -> a stored tensor or some of its rows."""


class Algo(ABC):
    """One quantization.

    Attributes:
        name: its `quant_algo`.
    """

    name: ClassVar[str]

    @abstractmethod
    def layer(self, keys: Mapping[str, Any], found: Infos) -> Layer:
        """The formats of a matrix, from what the configuration says and the tensors that there are."""

    def holds(self, layer: Layer) -> bool:
        """Whether a layer can be written so: without loss, and with the same treatment of inputs."""
        fmt, inputs = layer.format, layer.activations
        mine = self.layer(self.keys(layer), {})
        same = mine.format.may_hold(fmt) is None and mine.format.group_columns == fmt.group_columns
        return same and (inputs.label if inputs else "") == (mine.activations.label if mine.activations else "")

    def keys(self, layer: Layer) -> dict[str, Any]:
        """What the configuration says beside the name."""
        return {}

    @abstractmethod
    def infos(self, layer: Layer, n: int, k: int) -> Infos:
        """Names below the module, shapes and types; scales of integers have the format's type."""

    @abstractmethod
    def encode(self, quantized: Quantized) -> dict[str, Tensor]:
        """The tensors of a matrix."""

    @abstractmethod
    def decode(self, layer: Layer, k: int, read: Read, start: int, stop: int) -> Quantized:
        """Some rows of a matrix."""


class Int4Algo(Algo):
    """Weights of 4 bits in groups."""

    name = "W4A16_AWQ"

    def layer(self, keys: Mapping[str, Any], found: Infos) -> Layer:
        """See `Algo.layer`."""
        fields = {"bits": 4, "group": keys.get("group_size", 128), "scale_dtype": _scale_name(found)}
        return Layer(Int.model_validate(fields))

    def holds(self, layer: Layer) -> bool:
        """See `Algo.holds`."""
        fmt = integers(layer.format)
        return bool(fmt and fmt.symmetric and fmt.bits == 4 and fmt.group_columns) and layer.activations is None

    def keys(self, layer: Layer) -> dict[str, Any]:
        """See `Algo.keys`."""
        return {"group_size": layer.format.group_columns, "has_zero_point": False, "pre_quant_scale": True}

    def infos(self, layer: Layer, n: int, k: int) -> Infos:
        """See `Algo.infos`."""
        groups = k // (layer.format.group_columns or k)
        return {"weight": TensorInfo((n // 2, k), torch.uint8), SCALE: TensorInfo((n, groups), _scale_dtype(layer))}

    def encode(self, quantized: Quantized) -> dict[str, Tensor]:
        """See `Algo.encode`. Counted from -8, a code is the nibble with its highest bit turned over."""
        return {"weight": pack((quantized.codes ^ 8).T, 4).T.contiguous(), SCALE: quantized.params["scale"]}

    def decode(self, layer: Layer, k: int, read: Read, start: int, stop: int) -> Quantized:
        """See `Algo.decode`."""
        first, last = start // 2, -(-stop // 2)
        pairs = unpack(read("weight", first, last).T, 4, 2 * (last - first)).T ^ 8
        codes = pairs[start - 2 * first : stop - 2 * first].contiguous()
        return Quantized(codes, {"scale": read(SCALE, start, stop)}, layer.format)


class Int8Algo(Algo):
    """Weights of 8 bits with a scale per row."""

    name = "W8A16"

    def layer(self, keys: Mapping[str, Any], found: Infos) -> Layer:
        """See `Algo.layer`."""
        return Layer(Int.model_validate({"bits": 8, "group": "channel", "scale_dtype": _scale_name(found)}))

    def infos(self, layer: Layer, n: int, k: int) -> Infos:
        """See `Algo.infos`."""
        return {"weight": TensorInfo((n, k), torch.int8), SCALE: TensorInfo((n,), _scale_dtype(layer))}

    def encode(self, quantized: Quantized) -> dict[str, Tensor]:
        """See `Algo.encode`."""
        return {"weight": (quantized.codes ^ 128).view(torch.int8), SCALE: quantized.params["scale"].flatten()}

    def decode(self, layer: Layer, k: int, read: Read, start: int, stop: int) -> Quantized:
        """See `Algo.decode`."""
        codes = read("weight", start, stop).view(torch.uint8) ^ 128
        return Quantized(codes, {"scale": read(SCALE, start, stop).unsqueeze(1)}, layer.format)


class FP8ChannelAlgo(Algo):
    """Weights in FP8 with a scale per row, inputs in FP8 with a scale per token."""

    name = "FP8_PER_CHANNEL_PER_TOKEN"

    def layer(self, keys: Mapping[str, Any], found: Infos) -> Layer:
        """See `Algo.layer`."""
        return Layer(fp8("channel"), fp8("token"))

    def infos(self, layer: Layer, n: int, k: int) -> Infos:
        """See `Algo.infos`."""
        return {"weight": TensorInfo((n, k), E4M3), SCALE: TensorInfo((n,), torch.float32)}

    def encode(self, quantized: Quantized) -> dict[str, Tensor]:
        """See `Algo.encode`."""
        return {"weight": _e4m3(quantized), SCALE: quantized.params["scale"].float().flatten()}

    def decode(self, layer: Layer, k: int, read: Read, start: int, stop: int) -> Quantized:
        """See `Algo.decode`."""
        scale = read(SCALE, start, stop).unsqueeze(1)
        return Quantized(_codes(layer, read("weight", start, stop)), {"scale": scale}, layer.format)


class FP8Algo(Algo):
    """Weights in FP8 with one scale, inputs in FP8 with one scale that calibration found."""

    name = "FP8"

    def layer(self, keys: Mapping[str, Any], found: Infos) -> Layer:
        """See `Algo.layer`."""
        return Layer(fp8("tensor"), fp8("tensor"))

    def infos(self, layer: Layer, n: int, k: int) -> Infos:
        """See `Algo.infos`."""
        return {"weight": TensorInfo((n, k), E4M3), SCALE: TensorInfo((), torch.float32)}

    def encode(self, quantized: Quantized) -> dict[str, Tensor]:
        """See `Algo.encode`."""
        return {"weight": _e4m3(quantized), SCALE: quantized.params["scale"][0, 0].float()}

    def decode(self, layer: Layer, k: int, read: Read, start: int, stop: int) -> Quantized:
        """See `Algo.decode`."""
        scale = read(SCALE).reshape(1, 1).repeat(stop - start, 1)
        return Quantized(_codes(layer, read("weight", start, stop)), {"scale": scale}, layer.format)


class MXFP8Algo(Algo):
    """Weights and inputs in MXFP8."""

    name = "MXFP8"

    def layer(self, keys: Mapping[str, Any], found: Infos) -> Layer:
        """See `Algo.layer`."""
        return Layer(MXFP8(), MXFP8())

    def keys(self, layer: Layer) -> dict[str, Any]:
        """See `Algo.keys`."""
        return {"group_size": 32}

    def infos(self, layer: Layer, n: int, k: int) -> Infos:
        """See `Algo.infos`."""
        return {"weight": TensorInfo((n, k), E4M3), SCALE: TensorInfo((n, k // 32), torch.uint8)}

    def encode(self, quantized: Quantized) -> dict[str, Tensor]:
        """See `Algo.encode`."""
        return {"weight": _e4m3(quantized), SCALE: quantized.params["exponent"]}

    def decode(self, layer: Layer, k: int, read: Read, start: int, stop: int) -> Quantized:
        """See `Algo.decode`."""
        params = {"exponent": read(SCALE, start, stop)}
        return Quantized(_codes(layer, read("weight", start, stop)), params, layer.format)


class NVFP4WeightsAlgo(Algo):
    """Weights in NVFP4."""

    name = "W4A16_NVFP4"

    def layer(self, keys: Mapping[str, Any], found: Infos) -> Layer:
        """See `Algo.layer`."""
        return Layer(NVFP4())

    def keys(self, layer: Layer) -> dict[str, Any]:
        """See `Algo.keys`."""
        return {"group_size": 16}

    def infos(self, layer: Layer, n: int, k: int) -> Infos:
        """See `Algo.infos`."""
        scales = {SCALE: TensorInfo((n, k // 16), E4M3), f"{SCALE}_2": TensorInfo((), torch.float32)}
        return {"weight": TensorInfo((n, k // 2), torch.uint8), **scales}

    def encode(self, quantized: Quantized) -> dict[str, Tensor]:
        """See `Algo.encode`. Raises PlanError: the scale of the matrix is not exact in float32."""
        codes, params, fmt = quantized.codes, quantized.params, quantized.format
        assert isinstance(fmt, NVFP4)
        whole = params["tensor"][0, 0]
        if whole.float().double() != whole:
            line = "the scale of the whole matrix is the inverse of a number that fp32 holds; use nvfp4 without -minmax"
            raise PlanError([line], "ModelOpt stores that scale itself, in fp32")
        scales = {SCALE: params["scale"].view(E4M3), f"{SCALE}_2": whole.float()}
        return {"weight": pack(to_bits(codes, fmt), 4), **scales}

    def decode(self, layer: Layer, k: int, read: Read, start: int, stop: int) -> Quantized:
        """See `Algo.decode`."""
        assert isinstance(layer.format, NVFP4)
        codes = from_bits(unpack(read("weight", start, stop), 4, k), layer.format)
        whole = read(f"{SCALE}_2").double().reshape(1, 1).repeat(stop - start, 1)
        return Quantized(codes, {"scale": read(SCALE, start, stop).view(torch.uint8), "tensor": whole}, layer.format)


class NVFP4Algo(NVFP4WeightsAlgo):
    """Weights in NVFP4, inputs in NVFP4 with one scale of all tokens that calibration found."""

    name = "NVFP4"

    def layer(self, keys: Mapping[str, Any], found: Infos) -> Layer:
        """See `Algo.layer`."""
        return Layer(NVFP4(), NVFP4())


ALGOS: dict[str, Algo] = {
    algo.name: algo
    for algo in (Int4Algo(), Int8Algo(), FP8ChannelAlgo(), MXFP8Algo(), NVFP4WeightsAlgo(), FP8Algo(), NVFP4Algo())
}


def algo_of(layer: Layer) -> Algo | None:
    """How a layer is written; None if it cannot be."""
    return next((algo for algo in ALGOS.values() if algo.holds(layer)), None)


def fp8(group: str) -> FP:
    """E4M3 with scales in fp32."""
    return FP.model_validate({"element": "e4m3", "group": group, "scale_dtype": "fp32"})


def _e4m3(quantized: Quantized) -> Tensor:
    assert isinstance(quantized.format, FP | MXFP8)
    return to_bits(quantized.codes, quantized.format).view(E4M3)


def _codes(layer: Layer, weight: Tensor) -> Tensor:
    assert isinstance(layer.format, FP | MXFP8)
    return from_bits(weight.view(torch.uint8), layer.format)


def _scale_name(found: Infos) -> str:
    """Type of the stored scales, as formats spell it; float32 where there are none, or some other."""
    return SCALE_DTYPES.get(found[SCALE].dtype, "fp32") if SCALE in found else "fp32"


def _scale_dtype(layer: Layer) -> torch.dtype:
    fmt = layer.format
    assert isinstance(fmt, Int)
    return DTYPES[fmt.scale_dtype]
