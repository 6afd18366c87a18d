"""Q5_1: 5-bit codes, fp16 scale and minimum per 32 columns, 6 bits per weight: `w_hat = d * q + m`.

Block: d, m, 32 fifth bits, then 16 bytes of nibbles (24 bytes; `block_q5_1` of ggml-common.h,
https://github.com/ggml-org/llama.cpp).
"""

from __future__ import annotations

from typing import ClassVar

from qtool.formats._classic import Classic


class Q5_1(Classic):  # noqa: N801 - spelled as in ggml
    """See the module."""

    ggml_type: ClassVar[int] = 7
    block_bytes: ClassVar[int] = 24
    bits: ClassVar[int] = 5
    offset: ClassVar[bool] = True
    free_offset: ClassVar[bool] = True
    ggml_range: ClassVar[int] = 31
