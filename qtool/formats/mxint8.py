"""MXINT8: 32 columns share a power of two, elements are integers of 8 bits, 6 of them behind the point; 8.25 bits.

    w_hat = 2^(e - 127) * q / 64        q from -127 to 127

The specification leaves it open whether -128 is used; a symmetric range is better (https://arxiv.org/abs/2510.25602).
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

from __future__ import annotations

from typing import ClassVar, Literal

from qtool.formats._shared_exponent import MX
from qtool.numerics.grids import minifloat


class MXINT8(MX):
    """8-bit microscaling integers."""

    examples: ClassVar[tuple[str, ...]] = ("mxint8-floor", "mxint8-up")
    usual: ClassVar[str] = "int8"

    element: Literal["int8"] = "int8"

    @property
    def grid(self) -> minifloat.Grid:
        """See `Scaled.grid`."""
        return minifloat.integer(8)

    @property
    def point(self) -> int:
        """See `SharedExponent.point`."""
        return 6
