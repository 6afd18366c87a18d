"""Q4_1: 4-bit codes, fp16 scale and minimum per 32 columns, 5 bits per weight: `w_hat = d * q + m`.

Block: d, m, then 16 bytes of nibbles (20 bytes; `block_q4_1` of ggml-common.h,
https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

from typing import ClassVar

from qtool.formats._classic import Classic


class Q4_1(Classic):  # noqa: N801 - spelled as in ggml
    """See the module."""

    ggml_type: ClassVar[int] = 3
    block_bytes: ClassVar[int] = 20
    bits: ClassVar[int] = 4
    offset: ClassVar[bool] = True
    free_offset: ClassVar[bool] = True
    ggml_range: ClassVar[int] = 15
