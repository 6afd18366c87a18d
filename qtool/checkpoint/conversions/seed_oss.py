"""Seed-OSS: biases on q, k and v, heads of a length of their own."""

from __future__ import annotations

from typing import Any, ClassVar

from qtool.checkpoint.conversions._base import Conversion


class SeedOss(Conversion):
    """`SeedOssForCausalLM`."""

    architecture = "SeedOssForCausalLM"
    gguf_arch = "seed_oss"
    fixed: ClassVar[dict[str, Any]] = {"mlp_bias": False}
