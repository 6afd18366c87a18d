"""Straight-through gradients: a value that was rounded, with the gradient of what it was rounded from.

After Bengio et al., https://arxiv.org/abs/1308.3432.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, relaxed: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def through(relaxed: Tensor, value: Tensor) -> Tensor:
    """`value`, exactly; its gradient is handed on to `relaxed`, which has the same shape."""
    result: Tensor = _Through.apply(relaxed, value.detach())  # type: ignore[no-untyped-call]
    return result
