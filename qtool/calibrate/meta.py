"""transformers' own classes, built without memory for weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qtool.errors import CheckpointError, one_line


def build_on_meta(config: dict[str, Any], dtype: torch.dtype, attention: str | None = None) -> Any:
    """transformers' model for a config.json: parameters on the meta device, and what is computed from config.json real.

    Args:
        config: config.json.
        dtype: of the parameters.
        attention: implementation of attention; None: the one that transformers prefers.

    Raises:
        CheckpointError: transformers does not know or refuses the config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    known = {k: v for k, v in config.items() if k not in ("quantization_config", "auto_map")}
    try:
        with quiet(), torch.device("meta"):
            parsed = AutoConfig.for_model(**known)
            model = AutoModelForCausalLM.from_config(parsed, dtype=dtype, attn_implementation=attention)
    except Exception as error:  # its own checks raise many kinds
        what = "config.json does not describe a model that transformers builds"
        raise CheckpointError(what, found=one_line(error)) from error
    body = model.model
    body.rotary_emb = type(body.rotary_emb)(config=parsed)
    if hasattr(body.embed_tokens, "scalar_embed_scale"):
        body.embed_tokens.embed_scale = torch.tensor(body.embed_tokens.scalar_embed_scale)
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """transformers says nothing about how it would like config.json to be written."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class Recorder(nn.Module):
    """Stands in for a decoder block: keeps the keyword arguments of the call, returns the hidden states."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}
        self.attention_type = getattr(block, "attention_type", None)  # early releases of transformers 5 ask for it

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        """Takes the place of a block's forward; hidden is [1, T, H]."""
        self.arguments = arguments
        return hidden
