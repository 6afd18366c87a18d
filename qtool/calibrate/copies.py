"""Copies of modules that share what is large, and what has to move with them."""

from __future__ import annotations

import copy

import torch
from torch import nn


def buffers_to(module: nn.Module, device: torch.device) -> None:
    """Moves what is computed and not stored to the device."""
    for own in module.modules():
        for name, buffer in own._buffers.items():
            own._buffers[name] = buffer if buffer is None else buffer.to(device)


def twin(module: nn.Module) -> nn.Module:
    """A module with the same parameters, and submodules and hooks of its own."""
    same = copy.copy(module)
    same._modules = {name: child and twin(child) for name, child in module._modules.items()}
    same._parameters = module._parameters.copy()
    same._forward_pre_hooks = module._forward_pre_hooks.copy()
    same._forward_hooks = module._forward_hooks.copy()
    return same
