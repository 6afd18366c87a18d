"""transformers' own classes, built without memory for weights."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from qtool.calibrate.foreign import misfit
from qtool.checkpoint.derived.skeleton import fill_buffers, quiet, skeleton
from qtool.checkpoint.families._base import Family
from qtool.errors import CheckpointError, one_line


def build(family: Family, config: dict[str, Any], dtype: torch.dtype) -> Any:
    """transformers' model of a family, see `build_on_meta`."""
    if family.model_free:
        what = "a model that is known by names of its tensors only cannot be run"
        raise CheckpointError(what, hint="install a transformers that knows it, and leave out --model-free")
    if not family.derived:
        return build_on_meta(config, dtype, family.attention)
    model = skeleton(config, dtype)
    fill_buffers(model)
    return model


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
    if attention and model.config._attn_implementation != attention:
        raise misfit(model, f"uses attention {model.config._attn_implementation} instead of {attention}")
    body = model.model
    body.rotary_emb = type(body.rotary_emb)(config=parsed)
    if hasattr(body.embed_tokens, "scalar_embed_scale"):
        body.embed_tokens.embed_scale = torch.tensor(body.embed_tokens.scalar_embed_scale)
    return model


class Recorder(nn.Module):
    """Stands in for a decoder block: keeps the arguments of the call, returns the hidden states.

    Args:
        block: whose signature says what arguments are called.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.kind, self.calls = type(block), list[dict[str, Any]]()
        self.attention_type = getattr(block, "attention_type", None)  # early releases of transformers 5 ask for it

    def forward(self, hidden: Tensor, *others: Any, **arguments: Any) -> Tensor:
        """Takes the place of a block's forward; hidden is [1, T, H]."""
        _self, _hidden, *names = inspect.signature(self.kind.forward).parameters
        self.calls.append(dict(zip(names, others, strict=False)) | arguments)
        return hidden

    def recorded(self) -> dict[str, Any]:
        """The arguments by name. Raises QtoolError: the model did not call the block just once."""
        if len(self.calls) != 1:
            raise misfit(self, f"in place of {self.kind.__name__} was called {len(self.calls)} times instead of once")
        return self.calls[0]
