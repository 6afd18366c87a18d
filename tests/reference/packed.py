"""Decoders of packed checkpoints, one number at a time, from the layouts' own descriptions."""

from __future__ import annotations

import torch


def bits_of(words: list[int], first: int, count: int) -> int:
    """Some bits of a stream of 32-bit words, lowest first; words may be negative."""
    stream = 0
    for i, word in enumerate(words):
        stream |= (word & 0xFFFFFFFF) << (32 * i)
    return (stream >> first) & ((1 << count) - 1)


def field(words: list[int], i: int, bits: int) -> int:
    """Field i of a stream."""
    start = i * bits // 32
    return bits_of(words[start : start + 2], i * bits - 32 * start, bits)


def gptq(tensors: dict[str, torch.Tensor], bits: int, plus: int) -> torch.Tensor:
    """float64 [N, K]: scales[g] * (code - (zero + plus)), https://github.com/ModelCloud/GPTQModel."""
    qweight, qzeros = tensors["qweight"].T.tolist(), tensors["qzeros"].tolist()
    scales, index = tensors["scales"].double(), tensors["g_idx"].tolist()
    w = torch.empty(len(qweight), len(index), dtype=torch.float64)
    for n, words in enumerate(qweight):
        for k, g in enumerate(index):
            zero = (field(qzeros[g], n, bits) + plus) % 2**bits
            w[n, k] = scales[g, n] * (field(words, k, bits) - zero)
    return w


def awq(tensors: dict[str, torch.Tensor], group: int) -> torch.Tensor:
    """float64 [N, K]; nibble i of a word is output order[i], https://github.com/casper-hansen/AutoAWQ."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    qweight, qzeros, scales = tensors["qweight"].tolist(), tensors["qzeros"].tolist(), tensors["scales"].double()
    w = torch.empty(8 * len(qweight[0]), len(qweight), dtype=torch.float64)
    for k, words in enumerate(qweight):
        for c, word in enumerate(words):
            zeros = qzeros[k // group][c]
            for i, output in enumerate(order):
                n = 8 * c + output
                w[n, k] = scales[k // group, n] * (field([word], i, 4) - field([zeros], i, 4))
    return w


def mlx(tensors: dict[str, torch.Tensor], bits: int, group: int) -> torch.Tensor:
    """float64 [N, K]: scale * code + bias, https://ml-explore.github.io/mlx."""
    scales, biases = tensors["scales"].double(), tensors["biases"].double()
    rows = tensors["weight"].view(torch.int32).tolist()
    count = len(rows[0]) * 32 // bits
    return torch.tensor(
        [
            [scales[n, k // group] * field(words, k, bits) + biases[n, k // group] for k in range(count)]
            for n, words in enumerate(rows)
        ],
        dtype=torch.float64,
    )


def modelopt_int4(weight: torch.Tensor, scale: torch.Tensor, group: int) -> torch.Tensor:
    """float64 [N, K]: signed nibbles, outputs in pairs, https://github.com/NVIDIA/Model-Optimizer."""
    w = torch.empty(2 * weight.shape[0], weight.shape[1], dtype=torch.float64)
    for pair, row in enumerate(weight.tolist()):
        for k, byte in enumerate(row):
            for half, nibble in enumerate((byte & 15, byte >> 4)):
                n = 2 * pair + half
                w[n, k] = float(scale[n, k // group]) * (nibble - 16 if nibble > 7 else nibble)
    return w
