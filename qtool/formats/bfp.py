"""Block floating point: a group of columns shares an exponent, and each weight has a sign and a magnitude.

    w_hat = 2^(e - 127) * q / 2^(b - 2)        q from -(2^(b - 1) - 1) to 2^(b - 1) - 1

`bfp4-g16` and `bfp8-g16` are Microsoft's MSFP12 and MSFP16 (the number counts the exponent's 8 bits); see
https://proceedings.neurips.cc/paper/2020/hash/747e32ab0fea7fbd2ad9ec03daa3f840-Abstract.html
"""

from __future__ import annotations

import re
from typing import ClassVar

from pydantic import Field

from qtool.formats._shared_exponent import SharedExponent
from qtool.numerics.grids import minifloat

SHORTHAND = re.compile(r"bfp([2-8])-g(\d+)")


class BFP(SharedExponent):
    """Integers with a shared exponent.

    Attributes:
        bits: of a weight, its sign among them.
        group: columns that share an exponent.
    """

    examples: ClassVar[tuple[str, ...]] = ("bfp4-g16", "bfp6-g16", "bfp8-g16")

    bits: int = Field(ge=2, le=8)
    group: int = Field(default=16, gt=0)

    @property
    def label(self) -> str:
        """`bfp4-g16`; the rule for exponents is left out."""
        return f"bfp{self.bits}-g{self.group}"

    @classmethod
    def parse(cls, text: str) -> BFP | None:
        """See `Format.parse`."""
        match = SHORTHAND.fullmatch(text)
        return cls(bits=int(match[1]), group=int(match[2])) if match else None

    @property
    def group_columns(self) -> int:
        """See `Format.group_columns`."""
        return self.group

    @property
    def grid(self) -> minifloat.Grid:
        """See `Scaled.grid`."""
        return minifloat.integer(self.bits)

    @property
    def point(self) -> int:
        """See `SharedExponent.point`."""
        return self.bits - 2

    def at_run_time(self) -> BFP:
        """See `Format.at_run_time`: the exponent of the largest number, as hardware takes it."""
        return self.model_copy(update={"search": "floor"})
