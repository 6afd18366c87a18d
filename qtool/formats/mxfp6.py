"""MXFP6: 32 columns share a power of two, elements are E2M3 (or E3M2, written `mxfp6-e3m2`); 6.25 bits per weight.

https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

from __future__ import annotations

from typing import ClassVar, Literal

from qtool.formats._shared_exponent import MX


class MXFP6(MX):
    """6-bit microscaling floats."""

    examples: ClassVar[tuple[str, ...]] = ("mxfp6-e3m2", "mxfp6-floor", "mxfp6-up")
    usual: ClassVar[str] = "e2m3"

    element: Literal["e2m3", "e3m2"] = "e2m3"
