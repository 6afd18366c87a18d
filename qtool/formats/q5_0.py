"""Q5_0: 5-bit codes, one fp16 scale per 32 columns, 5.5 bits per weight: `w_hat = d * (q - 16)`.

Block: d, 32 fifth bits, then 16 bytes of nibbles (22 bytes; `block_q5_0` of ggml-common.h,
https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

from typing import ClassVar

from qtool.formats._classic import Classic


class Q5_0(Classic):  # noqa: N801 - spelled as in ggml
    """See the module."""

    ggml_type: ClassVar[int] = 6
    block_bytes: ClassVar[int] = 22
    bits: ClassVar[int] = 5
    ggml_range: ClassVar[int] = -16
