"""LFM2, dense: short convolutions with gates, and attention in some blocks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from qtool.checkpoint.conversions._states import Recurrent
from qtool.checkpoint.families._base import GGUF_FIELDS, Value

LENGTH = "feed_forward_length"


class Lfm2(Recurrent):
    """`Lfm2ForCausalLM`."""

    architecture = "Lfm2ForCausalLM"
    gguf_arch = "lfm2"
    numbers: ClassVar[dict[str, str]] = {
        **{key: field for key, field in GGUF_FIELDS.items() if key != LENGTH},
        "attention.layer_norm_rms_epsilon": "norm_eps",
        "shortconv.l_cache": "conv_L_cache",
    }
    fixed: ClassVar[dict[str, Any]] = {"conv_bias": False}
    activation = ("", "")

    def more(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Conversion.more`: how wide MLPs are, and how many heads each block has."""
        heads = int(config["num_key_value_heads"])
        kinds = config["layer_types"]
        return {
            LENGTH: mlp_width(config),
            "attention.head_count_kv": [heads if kind == "full_attention" else 0 for kind in kinds],
        }

    def gguf_fields(self, metadata: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
        """See `Conversion.gguf_fields`."""
        kinds = kinds_of(metadata, self.gguf_arch)
        width = metadata.get(f"{self.gguf_arch}.{LENGTH}")
        widths = {"intermediate_size": width, "block_ff_dim": width, "block_auto_adjust_ff_dim": False}
        return super().gguf_fields(metadata, tensors) | widths | {"layer_types": kinds}


def kinds_of(metadata: Mapping[str, Any], arch: str) -> list[str] | None:
    """What each block is, by its heads; None: the file does not say it of each."""
    heads = metadata.get(f"{arch}.attention.head_count_kv")
    return ["full_attention" if count else "conv" for count in heads] if isinstance(heads, list) else None


def mlp_width(config: Mapping[str, Any]) -> int:
    """Rows of gate and up: what config.json says, or two thirds of it up to a multiple."""
    width = int(config["intermediate_size"])
    if not config.get("block_auto_adjust_ff_dim"):
        return width
    width = int(2 * width / 3)
    if (factor := config.get("block_ffn_dim_multiplier")) is not None:
        width = int(factor * width)
    multiple = int(config["block_multiple_of"])
    return multiple * ((width + multiple - 1) // multiple)
