"""A product with a large matrix in float32, whatever type that is stored in, without a copy of all of it.

Shape letters: T tokens, K inputs, N outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def float32_product(x: Tensor, weight: Tensor, values: int) -> Tensor:
    """x weight^T in float32: [T, K] and [N, K] of any float type -> [T, N].

    Args:
        x: inputs.
        weight: the matrix.
        values: how many of its numbers are in memory in float32 at a time.
    """
    x, step = x.float(), max(1, values // weight.shape[1])
    result = x.new_empty(len(x), len(weight))
    for a in range(0, len(weight), step):
        torch.mm(x, weight[a : a + step].float().T, out=result[:, a : a + step])
    return result
