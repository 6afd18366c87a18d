"""transformers' own model classes, built without memory for weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from qtool.errors import CheckpointError, one_line

APART = "qtool_apart"
"""What config.json says where linear layers are told apart that transformers' class keeps in one parameter."""
IN_TURN = "qtool_in_turn"
"""What config.json says where a gated delta rule's output layer reads heads of values in another order: the first ones
of all heads of keys, then the second ones, and so on, instead of each key's heads together."""
OWN = (APART, IN_TURN)
LEFT_OUT = ("quantization_config", "auto_map", *OWN)
"""Fields of config.json that are not transformers' business here."""
TAG = "__float__"
CLASSES = ("ForConditionalGeneration", "ForCausalLM", "LMHeadModel")
"""How names of classes end that are, or have as a part, a language model with an output layer."""


def skeleton(config: dict[str, Any], dtype: torch.dtype, attention: str | None = None) -> Any:
    """transformers' model for a config.json, on the meta device.

    Args:
        config: config.json.
        dtype: of the parameters.
        attention: implementation of attention; None: the one that transformers prefers.

    Raises:
        CheckpointError: transformers does not know or refuses the config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    known = {field: value for field, value in config.items() if field not in LEFT_OUT}
    try:
        with quiet(), torch.device("meta"):
            parsed = AutoConfig.for_model(**finite_again(known))
            options = {"dtype": dtype, "attn_implementation": attention}
            if (named := named_class(config)) and isinstance(parsed, named.config_class):
                model = named._from_config(parsed, **options)
            else:
                model = AutoModelForCausalLM.from_config(parsed, **options)
    except Exception as error:  # its own checks raise many kinds
        what = "config.json does not describe a model that transformers builds"
        raise CheckpointError(what, found=one_line(error)) from error
    if config.get(IN_TURN):
        take_turns(model)
    return model


def value_order(config: Mapping[str, Any]) -> torch.Tensor | None:
    """Heads of values of a gated delta rule by turns, see `IN_TURN`: int64 [heads]; None: each key has only one."""
    keys, values = (int(config.get(f"linear_num_{kind}_heads") or 0) for kind in ("key", "value"))
    return torch.arange(values).view(keys, -1).t().reshape(-1) if values > keys > 0 else None


def take_turns(model: Any) -> None:
    """Has output layers of gated delta rules read heads in turn: the norm in front of them gives these out so."""
    if (order := value_order(model.config.get_text_config().to_dict())) is not None:
        for module in model.modules():
            if hasattr(module, "in_proj_qkv"):
                module.norm.register_forward_hook(partial(reorder, order))


def reorder(order: torch.Tensor, module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
    """A hook: output [tokens * heads, dim], its heads in that order."""
    return output.view(-1, len(order), output.shape[-1])[:, order.to(output.device)].reshape(output.shape)


def finite_again(value: Any) -> Any:
    """JSON with infinities, which transformers writes as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        return float(value[TAG]) if value.keys() == {TAG} else {key: finite_again(x) for key, x in value.items()}
    return [finite_again(x) for x in value] if isinstance(value, list) else value


def known_to_transformers(kind: str) -> bool:
    """Whether the installed transformers has classes for a `model_type`."""
    from transformers import CONFIG_MAPPING

    return kind in CONFIG_MAPPING


def named_class(config: dict[str, Any]) -> Any | None:
    """The class that config.json names, if transformers has it."""
    import transformers

    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""
    found = getattr(transformers, name, None) if name.endswith(CLASSES) else None
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else None


def fill_buffers(model: Any) -> None:
    """Computes what a skeleton's buffers hold that no checkpoint stores, such as the frequencies of rotary embeddings.

    Raises:
        CheckpointError: transformers does not say how.
    """
    filled = []
    for name, module in model.named_modules():
        for key in module._non_persistent_buffers_set:
            buffer = module._buffers.get(key)
            if buffer is not None and buffer.is_meta:
                unset = float("nan") if buffer.dtype.is_floating_point else torch.iinfo(torch.int8).min
                empty = torch.zeros(buffer.shape, dtype=buffer.dtype)
                module._buffers[key] = empty if buffer.dtype == torch.bool else empty.fill_(unset)
                filled.append((name, module, key))
    for module in {id(module): module for _, module, _ in filled}.values():
        initialize(model, module)
    if any(unfilled(module._buffers[key]) for _, module, key in filled):
        for module in model.modules():  # some modules fill buffers of others
            initialize(model, module)
    if lost := [f"{name}.{key}" for name, module, key in filled if unfilled(module._buffers[key])]:
        what = f"transformers does not say what {lost[0]} of {type(model).__name__} holds"
        raise CheckpointError(what, wanted="a model whose buffers can be computed without its weights")


def initialize(model: Any, module: nn.Module) -> None:
    """Has the innermost model that a module is part of fill what it holds, as far as it knows how."""
    owners = [m for m in model.modules() if hasattr(m, "_init_weights") and any(part is module for part in m.modules())]
    with quiet(), torch.no_grad(), suppress(Exception):  # code of others, in an order that is not theirs
        owners[-1]._init_weights(module)


def unfilled(buffer: torch.Tensor) -> bool:
    """Whether a buffer holds what `fill_buffers` put there."""
    if buffer.dtype == torch.bool or not buffer.numel():
        return False
    if buffer.dtype.is_floating_point:
        return bool(buffer.isnan().all())
    return bool((buffer == torch.iinfo(torch.int8).min).all())


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


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds all experts of a block in three-dimensional parameters, by a protocol that is known.

    https://huggingface.co/docs/transformers/main/experts_interface
    """
    by_protocol = all(hasattr(module, name) for name in ("_apply_gate", "has_gate", "is_transposed", "is_concatenated"))
    return by_protocol or is_taken_apart(module)


def is_taken_apart(module: nn.Module) -> bool:
    """Whether transformers makes layers of such experts where a checkpoint is quantized, which then has them apart.

    Their matrices are [K, N], gate before up, and each expert is given all tokens, one expert's behind the other's.
    """
    from transformers.quantizers import base

    return type(module).__name__ in getattr(base, "MODULES_TO_PATCH_FOR_QUANTIZATION", {})
