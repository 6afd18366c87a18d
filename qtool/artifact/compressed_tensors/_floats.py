"""Floats.

float-quantized        weight float8_e4m3 [N, K] for inputs in FP8; weight_scale in the model's type, one [1], per
                       row [N, 1], or per block of 128 x 128 [ceil(N / 128), K / 128]
naive-quantized        the same for inputs that are left alone
mxfp8-quantized        weight float8_e4m3 [N, K], weight_scale uint8 [N, K / 32], exponents
mxfp4-pack-quantized   weight_packed uint8 [N, K / 2], even columns in the low nibble, weight_scale as above
mxfp6-pack-quantized   weight_packed uint8 [N, 3 K / 4], four columns in three bytes, the first in the lowest bits
nvfp4-pack-quantized   weight_packed as above, weight_scale float8_e4m3 [N, K / 16], and weight_global_scale float32
                       [1], the number that scales were multiplied with
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from qtool.artifact._floats import from_bits, to_bits
from qtool.artifact._integers import exact
from qtool.artifact._packed import Infos
from qtool.artifact.compressed_tensors._kinds import (
    FP8_BLOCK_INPUTS,
    FP8_INPUTS,
    SCALE,
    STATIC_FP8,
    Arguments,
    Compressor,
    Read,
    multiplier,
    spelled,
)
from qtool.checkpoint._base import TensorInfo
from qtool.errors import NumericsError
from qtool.formats._base import Format, Quantized, alike
from qtool.formats._scaled import Scaled
from qtool.formats.fp import FP
from qtool.formats.mxfp4 import MXFP4
from qtool.formats.mxfp6 import MXFP6
from qtool.formats.mxfp8 import MXFP8
from qtool.formats.nvfp4 import NVFP4
from qtool.numerics.grids.bits import pack, unpack

E4M3 = torch.float8_e4m3fn
BLOCK = 128
GLOBAL = "weight_global_scale"
EXPONENT, LOCAL = "torch.uint8", "torch.float8_e4m3fn"
"""`scale_dtype` of powers of two, and of scales inside of another one."""


def is_block(fmt: FP) -> bool:
    """Whether scales are those of blocks of 128 x 128."""
    return (fmt.rows, fmt.group) == (BLOCK, BLOCK)


class FloatQuantized(Compressor):
    """E4M3 weights for inputs in FP8."""

    name: ClassVar[str] = "float-quantized"

    def inputs(self, fmt: Format) -> tuple[Format | None, ...] | None:
        """See `Compressor.inputs`."""
        if (
            not isinstance(fmt, FP)
            or fmt.element != "e4m3"
            or not (fmt.group in ("channel", "tensor") or is_block(fmt))
        ):
            return None
        return (FP8_BLOCK_INPUTS,) if is_block(fmt) else (FP8_INPUTS, STATIC_FP8)

    def since(self, fmt: Format) -> str:
        """See `Compressor.since`. vLLM, which does not decode, reads blocks with an older one."""
        return "0.19.0" if isinstance(fmt, FP) and is_block(fmt) else super().since(fmt)

    def arguments(self, fmt: Format) -> dict[str, Any]:
        """See `Compressor.arguments`."""
        assert isinstance(fmt, FP)
        if is_block(fmt):
            return spelled(8, "float", "block", block_structure=[BLOCK, BLOCK])
        return spelled(8, "float", str(fmt.group))

    def format(self, scheme: Arguments, scale_dtype: str) -> Format | None:
        """See `Compressor.format`."""
        if (scheme.type, scheme.num_bits, scheme.symmetric) != ("float", 8, True) or scheme.scale_dtype:
            return None
        fields: dict[str, Any] = {"element": "e4m3", "group": scheme.grouping, "scale_dtype": scale_dtype}
        if scheme.grouping == "block" and scheme.block_structure == [BLOCK, BLOCK]:
            fields |= {"group": BLOCK, "rows": BLOCK}
        elif scheme.grouping not in ("channel", "tensor"):
            return None
        return FP.model_validate(fields)

    def infos(self, fmt: Format, n: int, k: int, dtype: torch.dtype) -> Infos:
        """See `Compressor.infos`."""
        assert isinstance(fmt, FP)
        shapes = {"tensor": (1,), "channel": (n, 1)}
        shape = (-(-n // BLOCK), k // BLOCK) if is_block(fmt) else shapes[str(fmt.group)]
        return {"weight": TensorInfo((n, k), E4M3), SCALE: TensorInfo(shape, dtype)}

    def encode(self, quantized: Quantized, module: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `Compressor.encode`."""
        codes, params, fmt = quantized.codes, quantized.params, quantized.format
        assert isinstance(fmt, FP)
        scale = exact(params["scale"], module, dtype, blocks=is_block(fmt))
        scale = scale[0] if fmt.group == "tensor" else scale[:: fmt.rows].contiguous()
        return {"weight": to_bits(codes, fmt).view(E4M3), SCALE: scale}

    def decode(self, fmt: Format, k: int, read: Read, start: int, stop: int) -> Quantized:
        """See `Compressor.decode`."""
        assert isinstance(fmt, FP)
        if fmt.group == "tensor":
            scale = read(SCALE).view(1, 1).repeat(stop - start, 1)
        else:
            first = start // fmt.rows
            blocks = read(SCALE, first, -(-stop // fmt.rows)).repeat_interleave(fmt.rows, dim=0)
            scale = blocks[start - first * fmt.rows : stop - first * fmt.rows]
        return Quantized(from_bits(read("weight", start, stop).view(torch.uint8), fmt), {"scale": scale}, fmt)


class NaiveQuantized(FloatQuantized):
    """E4M3 weights alone."""

    name: ClassVar[str] = "naive-quantized"

    def inputs(self, fmt: Format) -> tuple[Format | None, ...] | None:
        """See `Compressor.inputs`. vLLM runs weights in blocks with quantized inputs only."""
        return (None,) if super().inputs(fmt) == (FP8_INPUTS, STATIC_FP8) else None


class MXQuantized(Compressor):
    """Microscaling weights, alone or with rounded inputs.

    Attributes:
        fmt: format of the weights.
        activations: format of inputs that are rounded.
        part: name of the codes.
        stored: type that they are stored as.
        oldest: see `Compressor.since`.
    """

    fmt: ClassVar[Scaled]
    activations: ClassVar[Scaled]
    part: ClassVar[str] = "weight_packed"
    stored: ClassVar[torch.dtype] = torch.uint8
    oldest: ClassVar[str]

    def inputs(self, fmt: Format) -> tuple[Format | None, ...] | None:
        """See `Compressor.inputs`."""
        return (None, self.activations) if alike(fmt, self.fmt) else None

    def since(self, fmt: Format) -> str:
        """See `Compressor.since`."""
        return self.oldest

    def arguments(self, fmt: Format) -> dict[str, Any]:
        """See `Compressor.arguments`."""
        return spelled(self.fmt.code_bits, "float", "group", 32, scale_dtype=EXPONENT)

    def format(self, scheme: Arguments, scale_dtype: str) -> Format | None:
        """See `Compressor.format`. Whoever wrote the file may have left the scale's type out."""
        found = (scheme.type, scheme.num_bits, scheme.grouping, scheme.group_size, scheme.symmetric)
        return self.fmt if found == ("float", self.fmt.code_bits, "group", 32, True) else None

    def infos(self, fmt: Format, n: int, k: int, dtype: torch.dtype) -> Infos:
        """See `Compressor.infos`."""
        packed = TensorInfo((n, k * self.fmt.code_bits // 8), self.stored)
        return {self.part: packed, SCALE: TensorInfo((n, k // 32), torch.uint8)}

    def encode(self, quantized: Quantized, module: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `Compressor.encode`."""
        packed = pack(to_bits(quantized.codes, self.fmt), self.fmt.code_bits).view(self.stored)
        return {self.part: packed, SCALE: quantized.params["exponent"]}

    def decode(self, fmt: Format, k: int, read: Read, start: int, stop: int) -> Quantized:
        """See `Compressor.decode`."""
        packed = read(self.part, start, stop).view(torch.uint8)
        codes = from_bits(unpack(packed, self.fmt.code_bits, k), self.fmt)
        return Quantized(codes, {"exponent": read(SCALE, start, stop)}, fmt)


class MXFP8Quantized(MXQuantized):
    """MXFP8."""

    name: ClassVar[str] = "mxfp8-quantized"
    fmt: ClassVar[Scaled] = MXFP8()
    activations: ClassVar[Scaled] = MXFP8()
    part: ClassVar[str] = "weight"
    stored: ClassVar[torch.dtype] = E4M3
    oldest: ClassVar[str] = "0.15.0"


class MXFP6Packed(MXQuantized):
    """MXFP6 of E2M3, inputs in MXFP8."""

    name: ClassVar[str] = "mxfp6-pack-quantized"
    fmt: ClassVar[Scaled] = MXFP6()
    activations: ClassVar[Scaled] = MXFP8()
    oldest: ClassVar[str] = "0.20.0"


class MXFP4Packed(MXQuantized):
    """MXFP4."""

    name: ClassVar[str] = "mxfp4-pack-quantized"
    fmt: ClassVar[Scaled] = MXFP4()
    activations: ClassVar[Scaled] = MXFP4()
    oldest: ClassVar[str] = "0.16.0"


class NVFP4Packed(Compressor):
    """NVFP4 weights, alone or with inputs in NVFP4, one scale of which calibration found."""

    name: ClassVar[str] = "nvfp4-pack-quantized"

    def inputs(self, fmt: Format) -> tuple[Format | None, ...] | None:
        """See `Compressor.inputs`."""
        return (None, NVFP4()) if isinstance(fmt, NVFP4) else None

    def arguments(self, fmt: Format) -> dict[str, Any]:
        """See `Compressor.arguments`."""
        return spelled(4, "float", "tensor_group", 16, scale_dtype=LOCAL)

    def format(self, scheme: Arguments, scale_dtype: str) -> Format | None:
        """See `Compressor.format`."""
        found = (scheme.type, scheme.num_bits, scheme.grouping, scheme.group_size, scheme.symmetric)
        return NVFP4() if found == ("float", 4, "tensor_group", 16, True) else None

    def infos(self, fmt: Format, n: int, k: int, dtype: torch.dtype) -> Infos:
        """See `Compressor.infos`."""
        scales = {SCALE: TensorInfo((n, k // 16), E4M3), GLOBAL: TensorInfo((1,), torch.float32)}
        return {"weight_packed": TensorInfo((n, k // 2), torch.uint8), **scales}

    def encode(self, quantized: Quantized, module: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `Compressor.encode`."""
        codes, params, fmt = quantized.codes, quantized.params, quantized.format
        assert isinstance(fmt, NVFP4)
        scales = {SCALE: params["scale"].view(E4M3), GLOBAL: multiplier(params["tensor"][0], module)}
        return {"weight_packed": pack(to_bits(codes, fmt), 4), **scales}

    def decode(self, fmt: Format, k: int, read: Read, start: int, stop: int) -> Quantized:
        """See `Compressor.decode`."""
        assert isinstance(fmt, NVFP4)
        codes = from_bits(unpack(read("weight_packed", start, stop), 4, k), fmt)
        factor = read(GLOBAL)
        if not 0 < float(factor) < math.inf:
            raise NumericsError(GLOBAL, wanted="a positive number", found=float(factor))
        whole = (1.0 / factor.double()).view(1, 1).repeat(stop - start, 1)
        return Quantized(codes, {"scale": read(SCALE, start, stop).view(torch.uint8), "tensor": whole}, fmt)
