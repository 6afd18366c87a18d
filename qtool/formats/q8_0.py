"""Q8_0: 8-bit codes, one fp16 scale per 32 columns, 8.5 bits per weight: `w_hat = d * q, q a signed byte`.

Block: d, then 32 bytes (34 bytes; `block_q8_0` of ggml-common.h,
https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

from typing import ClassVar

from qtool.formats._classic import Classic


class Q8_0(Classic):  # noqa: N801 - spelled as in ggml
    """See the module."""

    ggml_type: ClassVar[int] = 8
    block_bytes: ClassVar[int] = 34
    bits: ClassVar[int] = 8
    ggml_range: ClassVar[int] = 127
    cheap: ClassVar[bool] = True
