"""One quantized matrix as the tensors of compressed-tensors, and back.

    pack-quantized   weight_packed int32 [N, ceil(K b / 32)], weight_scale [N, G], weight_shape int64 [2], and for
                     asymmetric formats weight_zero_point int32 [ceil(N b / 32), G], packed along N
    int-quantized    weight int8 [N, K], weight_scale [N, 1], or [1] for one scale per tensor

Codes count from the lowest level, so the code itself, q + 2^(b-1), is what is packed. Scales have the model's type.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.checkpoint._base import Layer, TensorInfo
from qtool.formats._base import Quantized
from qtool.formats.int import Int
from qtool.numerics.bits import pack_words, unpack_words

PACKED, PLAIN = "pack-quantized", "int-quantized"


def layout(layer: Layer) -> str:
    """Which of the two holds a layer: packed words are for weights alone, int8 for weights with quantized inputs."""
    return PACKED if layer.activations is None else PLAIN


def infos(kind: str, fmt: Int, n: int, k: int, dtype: torch.dtype) -> dict[str, TensorInfo]:
    """Names below the module, shapes and types; `dtype` is that of scales."""
    groups = k // (fmt.group_columns or k)
    if kind == PLAIN:
        one = fmt.group == "tensor"
        return {"weight": TensorInfo((n, k), torch.int8), "weight_scale": TensorInfo((1,) if one else (n, 1), dtype)}
    stored = {
        "weight_packed": TensorInfo((n, words(k, fmt.bits)), torch.int32),
        "weight_scale": TensorInfo((n, groups), dtype),
        "weight_shape": TensorInfo((2,), torch.int64),
    }
    if not fmt.symmetric:
        stored["weight_zero_point"] = TensorInfo((words(n, fmt.bits), groups), torch.int32)
    return stored


def words(count: int, bits: int) -> int:
    """int32 words of a packed row."""
    return (count * bits + 31) // 32


def encode(kind: str, quantized: Quantized, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a matrix; the caller has made sure that scales are exact in `dtype`."""
    codes, params, fmt = quantized
    assert isinstance(fmt, Int)
    scale = params["scale"].to(dtype)
    if kind == PLAIN:
        weight = (codes.to(torch.int16) + fmt.lowest).to(torch.int8)
        return {"weight": weight, "weight_scale": scale[0] if fmt.group == "tensor" else scale}
    stored = {"weight_packed": pack_words(codes, fmt.bits), "weight_scale": scale}
    stored["weight_shape"] = torch.tensor(codes.shape)
    if not fmt.symmetric:
        zero = (params["zero"].to(torch.int16) - fmt.lowest).to(torch.uint8)
        stored["weight_zero_point"] = pack_words(zero.T, fmt.bits).T.contiguous()
    return stored


def decode(kind: str, stored: dict[str, Tensor], fmt: Int, n: int, k: int) -> Quantized:
    """The inverse of `encode`, for tensors of the shapes and types that `infos` tells."""
    scale = stored["weight_scale"]
    if kind == PLAIN:
        codes = (stored["weight"].to(torch.int16) - fmt.lowest).to(torch.uint8)
        return Quantized(codes, {"scale": scale.expand(n, 1).contiguous()}, fmt)
    params = {"scale": scale}
    if not fmt.symmetric:
        zero = unpack_words(stored["weight_zero_point"].T, fmt.bits, n).T
        params["zero"] = (zero.to(torch.int16) + fmt.lowest).to(torch.int8).contiguous()
    return Quantized(unpack_words(stored["weight_packed"], fmt.bits, k), params, fmt)
