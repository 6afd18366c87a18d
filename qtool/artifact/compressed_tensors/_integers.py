"""Integers.

    pack-quantized   weight_packed int32 [N, ceil(K b / 32)], weight_scale [N, G], weight_shape int64 [2], and for
                     asymmetric formats weight_zero_point int32 [ceil(N b / 32), G], packed along N
    int-quantized    weight int8 [N, K], weight_scale [N, 1], or [1] for one scale per tensor

Codes count from the lowest level, so the code itself, q + 2^(b-1), is what is packed. Scales have the model's type.
Formats with other scales whose levels are integers are stored as the integers of the same values.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from qtool.artifact._integers import as_integers, integers
from qtool.artifact._packed import Infos
from qtool.artifact.compressed_tensors._kinds import (
    FP8_INPUTS,
    INT8_INPUTS,
    SCALE,
    STATIC_INT8,
    Arguments,
    Compressor,
    Read,
    spelled,
)
from qtool.checkpoint._base import TensorInfo
from qtool.formats._base import Format, Quantized
from qtool.formats.int import Int
from qtool.numerics.grids.bits import pack_words, unpack_words


def as_int(fmt: Format) -> Int | None:
    """The integers that hold every matrix of a format; None: there are none, or none that this layout has."""
    ints = integers(fmt)
    return ints if ints and ints.rows == 1 and ints.group != "token" else None


class PackQuantized(Compressor):
    """Packed words: for weights alone, or of less than 8 bits."""

    name: ClassVar[str] = "pack-quantized"

    def inputs(self, fmt: Format) -> tuple[Format | None, ...] | None:
        """See `Compressor.inputs`."""
        ints = as_int(fmt)
        if ints is None:
            return None
        if ints.bits != 4 or not ints.symmetric or ints.group == "tensor":
            return (None,)
        return (None, *INT8_INPUTS[:1], FP8_INPUTS)

    def since(self, fmt: Format) -> str:
        """See `Compressor.since`. Before, odd widths were packed with gaps."""
        ints = as_int(fmt)
        return "0.18.0" if ints and ints.bits in (3, 5, 6, 7) else super().since(fmt)

    def arguments(self, fmt: Format) -> dict[str, Any]:
        """See `Compressor.arguments`."""
        ints = as_int(fmt)
        assert ints is not None
        if ints.group_columns:
            return spelled(ints.bits, "int", "group", ints.group_columns, symmetric=ints.symmetric)
        # packed weights have one scale a row at least; they may all be equal
        return spelled(ints.bits, "int", "channel", symmetric=ints.symmetric)

    def format(self, scheme: Arguments, scale_dtype: str) -> Format | None:
        """See `Compressor.format`."""
        if scheme.type != "int" or scheme.grouping not in ("group", "channel", "tensor") or scheme.num_bits > 8:
            return None
        group = scheme.group_size if scheme.grouping == "group" else scheme.grouping
        fields = {"bits": scheme.num_bits, "group": group, "symmetric": scheme.symmetric, "scale_dtype": scale_dtype}
        return Int.model_validate(fields)

    def infos(self, fmt: Format, n: int, k: int, dtype: torch.dtype) -> Infos:
        """See `Compressor.infos`."""
        ints = as_int(fmt)
        assert ints is not None
        groups = k // (ints.group_columns or k)
        stored = {
            "weight_packed": TensorInfo((n, words(k, ints.bits)), torch.int32),
            SCALE: TensorInfo((n, groups), dtype),
            "weight_shape": TensorInfo((2,), torch.int64),
        }
        if not ints.symmetric:
            stored["weight_zero_point"] = TensorInfo((words(n, ints.bits), groups), torch.int32)
        return stored

    def encode(self, quantized: Quantized, module: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `Compressor.encode`."""
        whole = as_integers(quantized, module, dtype)
        codes, params, fmt = whole.codes, whole.params, whole.format
        assert isinstance(fmt, Int)
        stored = {"weight_packed": pack_words(codes, fmt.bits), SCALE: params["scale"]}
        stored["weight_shape"] = torch.tensor(codes.shape)
        if not fmt.symmetric:
            zero = (params["zero"].to(torch.int16) - fmt.lowest).to(torch.uint8)
            stored["weight_zero_point"] = pack_words(zero.T, fmt.bits).T.contiguous()
        return stored

    def decode(self, fmt: Format, k: int, read: Read, start: int, stop: int) -> Quantized:
        """See `Compressor.decode`."""
        assert isinstance(fmt, Int)
        packed = read("weight_packed", start, stop)
        dense = packed.shape[1] == words(k, fmt.bits)
        params = {"scale": read(SCALE, start, stop)}
        if not fmt.symmetric:
            zero = _unpack(read("weight_zero_point").T, fmt.bits, stop, dense).T[start:]
            params["zero"] = (zero.to(torch.int16) + fmt.lowest).to(torch.int8).contiguous()
        return Quantized(_unpack(packed, fmt.bits, k, dense), params, fmt)


class IntQuantized(Compressor):
    """int8, for weights whose inputs are quantized as well."""

    name: ClassVar[str] = "int-quantized"

    def inputs(self, fmt: Format) -> tuple[Format | None, ...] | None:
        """See `Compressor.inputs`."""
        if not isinstance(fmt, Int) or fmt.bits != 8 or not fmt.symmetric or fmt.group not in ("channel", "tensor"):
            return None
        return (*INT8_INPUTS, *STATIC_INT8)

    def arguments(self, fmt: Format) -> dict[str, Any]:
        """See `Compressor.arguments`."""
        assert isinstance(fmt, Int)
        return spelled(8, "int", str(fmt.group))

    def format(self, scheme: Arguments, scale_dtype: str) -> Format | None:
        """See `Compressor.format`."""
        if (
            scheme.type != "int"
            or scheme.grouping not in ("channel", "tensor")
            or scheme.num_bits > 8
            or not scheme.symmetric
        ):
            return None
        return Int.model_validate({"bits": scheme.num_bits, "group": scheme.grouping, "scale_dtype": scale_dtype})

    def infos(self, fmt: Format, n: int, k: int, dtype: torch.dtype) -> Infos:
        """See `Compressor.infos`."""
        assert isinstance(fmt, Int)
        shape = (1,) if fmt.group == "tensor" else (n, 1)
        return {"weight": TensorInfo((n, k), torch.int8), SCALE: TensorInfo(shape, dtype)}

    def encode(self, quantized: Quantized, module: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `Compressor.encode`."""
        whole = as_integers(quantized, module, dtype)
        codes, params, fmt = whole.codes, whole.params, whole.format
        assert isinstance(fmt, Int)
        weight = (codes.to(torch.int16) + fmt.lowest).to(torch.int8)
        return {"weight": weight, SCALE: params["scale"][0] if fmt.group == "tensor" else params["scale"]}

    def decode(self, fmt: Format, k: int, read: Read, start: int, stop: int) -> Quantized:
        """See `Compressor.decode`."""
        assert isinstance(fmt, Int)
        codes = (read("weight", start, stop).to(torch.int16) - fmt.lowest).to(torch.uint8)
        if fmt.group == "tensor":
            return Quantized(codes, {"scale": read(SCALE).view(1, 1).repeat(stop - start, 1)}, fmt)
        return Quantized(codes, {"scale": read(SCALE, start, stop)}, fmt)


def words(count: int, bits: int) -> int:
    """int32 words of a packed row."""
    return (count * bits + 31) // 32


def with_gaps(fmt: Format, n: int, k: int) -> Infos:
    """Packed tensors as versions before 0.18 wrote them: no field goes on in the next word. Empty if there are none."""
    ints = as_int(fmt)
    if ints is None:
        return {}
    per_word, groups = 32 // ints.bits, k // (ints.group_columns or k)
    return {
        "weight_packed": TensorInfo((n, -(-k // per_word)), torch.int32),
        "weight_zero_point": TensorInfo((-(-n // per_word), groups), torch.int32),
    }


def _unpack(packed: Tensor, bits: int, count: int, dense: bool) -> Tensor:
    """int32 [N, words] -> uint8 [N, count]; words are filled up, or hold whole fields only."""
    if dense:
        return unpack_words(packed, bits, count)
    shifts = torch.arange(0, 33 - bits, bits, dtype=torch.int32)
    fields = (packed.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return fields.flatten(1)[:, :count].to(torch.uint8)
