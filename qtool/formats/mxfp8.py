"""MXFP8: 32 columns share a power of two, elements are E4M3 (or E5M2, written `mxfp8-e5m2`); 8.25 bits per weight.

https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

from __future__ import annotations

from typing import ClassVar, Literal

from qtool.formats._shared_exponent import MX


class MXFP8(MX):
    """8-bit microscaling floats."""

    examples: ClassVar[tuple[str, ...]] = ("mxfp8-e5m2", "mxfp8-floor", "mxfp8-up")
    usual: ClassVar[str] = "e4m3"

    element: Literal["e4m3", "e5m2"] = "e4m3"
