"""Multiplies runs of channels with a Hadamard matrix, signs before; of the weight's columns alike.

Source: QuIP#, https://arxiv.org/abs/2402.04396; in runs of 16 to 128 in front of layers: https://arxiv.org/abs/2509.23202
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qtool.numerics.hadamard import known_order, transform
from qtool.ops._base import InputOp, spread


@dataclass(frozen=True, eq=False)
class Hadamard(InputOp):
    """x -> (x * signs) H / sqrt(block), run by run; an orthogonal matrix.

    Attributes:
        block: length of a run.
        signs: int8 [C], 1 or -1, so that the matrix is a random one.
    """

    block: int
    signs: Tensor

    orthogonal = True

    def __post_init__(self) -> None:
        if not known_order(self.block):
            raise ValueError(f"no Hadamard matrix of order {self.block} is known here")
        if self.signs.ndim != 1 or len(self.signs) % self.block or not bool((self.signs.abs() == 1).all()):
            raise ValueError(f"signs are 1 or -1, one for each channel of runs of {self.block}")

    @property
    def label(self) -> str:
        """See `InputOp.label`: "hadamard-32"."""
        return f"hadamard-{self.block}"

    @property
    def width(self) -> int:
        """See `InputOp.width`."""
        return len(self.signs)

    @property
    def run(self) -> int:
        """See `InputOp.run`."""
        return self.block

    def apply(self, x: Tensor) -> Tensor:
        """See `InputOp.apply`."""
        return transform(x * self.signs.to(x), self.block)

    def fold(self, w: Tensor) -> Tensor:
        """See `InputOp.fold`."""
        return self.apply(w)

    def spread(self, repeat: int, dim: int) -> Hadamard:
        """See `InputOp.spread`."""
        return Hadamard(self.block, spread(self.signs, repeat, dim))
