"""One quantized matrix as the tensors of a GPTQ checkpoint, and back.

    qweight  int32 [K b / 32, N]     codes, packed along the inputs
    qzeros   int32 [G, N b / 32]     zero points, packed along the outputs, perhaps less 1
    scales   fp16 or bf16 [G, N]
    g_idx    int32 [K]               the group of each input

    w_hat = scales[g_idx] * (code - zero)

Words are filled from their lowest bits on, and fields of 3 bits go on in the next word.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.artifact._packed import Infos
from qtool.checkpoint._base import TensorInfo
from qtool.formats._base import Quantized
from qtool.formats.int import Int
from qtool.numerics.grids.bits import pack_words, unpack_words

BITS = (2, 3, 4, 8)
WORD = 32


def infos(bits: int, groups: int, n: int, k: int, dtype: torch.dtype) -> Infos:
    """Names below the module, shapes and types; `dtype` is that of scales."""
    return {
        "qweight": TensorInfo((k * bits // WORD, n), torch.int32),
        "qzeros": TensorInfo((groups, n * bits // WORD), torch.int32),
        "scales": TensorInfo((groups, n), dtype),
        "g_idx": TensorInfo((k,), torch.int32),
    }


def group_index(k: int, group: int) -> Tensor:
    """int32 [K], groups of neighbours."""
    return torch.arange(k, dtype=torch.int32) // group


def encode(quantized: Quantized, less: int) -> dict[str, Tensor]:
    """The tensors of a matrix; zero points are stored minus `less`."""
    codes, params, fmt = quantized.codes, quantized.params, quantized.format
    assert isinstance(fmt, Int)
    scale, k = params["scale"], codes.shape[1]
    zero = params.get("zero", torch.zeros_like(scale)).to(torch.int16) - fmt.lowest - less
    return {
        "qweight": pack_words(codes, fmt.bits).T.contiguous(),
        "qzeros": pack_words(zero.to(torch.uint8).T, fmt.bits),
        "scales": scale.T.contiguous(),
        "g_idx": group_index(k, fmt.group_columns or k),
    }


def decode_codes(qweight: Tensor, bits: int, k: int) -> Tensor:
    """int32 [K b / 32, rows] -> uint8 [rows, K]."""
    return unpack_words(qweight.T, bits, k)


def decode_zeros(qzeros: Tensor, bits: int, n: int, less: int) -> Tensor:
    """int32 [G, N b / 32] -> uint8 [N, G]. A zero point that was 0 less 1 has wrapped around."""
    return ((unpack_words(qzeros, bits, n) + less) & ((1 << bits) - 1)).T.contiguous()
