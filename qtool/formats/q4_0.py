"""Q4_0: 4-bit codes, one fp16 scale per 32 columns, 4.5 bits per weight: `w_hat = d * (q - 8)`.

Block: d, then 16 bytes of nibbles (18 bytes; `block_q4_0` of ggml-common.h,
https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

from typing import ClassVar

from qtool.formats._classic import Classic


class Q4_0(Classic):  # noqa: N801 - spelled as in ggml
    """See the module."""

    ggml_type: ClassVar[int] = 2
    block_bytes: ClassVar[int] = 18
    bits: ClassVar[int] = 4
    ggml_range: ClassVar[int] = -8
