"""NVINT4: integers from -7 to 7 with the scales of NVFP4, one in E4M3 for 16 columns and one for the matrix; 4.5 bits.

https://arxiv.org/abs/2510.25602
"""

from __future__ import annotations

from typing import ClassVar

from qtool.formats._two_level import TwoLevel
from qtool.numerics.grids import minifloat


class NVINT4(TwoLevel):
    """4-bit integers with two levels of scales."""

    examples: ClassVar[tuple[str, ...]] = ("nvint4-minmax",)

    @property
    def grid(self) -> minifloat.Grid:
        """See `Scaled.grid`."""
        return minifloat.integer(4)
