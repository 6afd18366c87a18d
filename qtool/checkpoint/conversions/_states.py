"""Layers with a state instead of attention: what their conversions have in common.

Shape letters: C channels of a convolution, L its length, H heads, G groups, N elements of a state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from qtool.checkpoint.conversions._base import Conversion
from qtool.checkpoint.families._gguf import Form, check_fixed

CONVOLUTIONS = ("conv1d.weight", "conv.conv.weight")
"""How names of kernels end, which checkpoints store as [C, 1, L] and GGUF as [C, L]."""


def decay(x: Tensor) -> Tensor:
    """-exp(x), what states are multiplied with per unit of time, of the logarithm that checkpoints store."""
    return -x.double().exp().float()


def log_decay(x: Tensor) -> Tensor:
    """The way back."""
    return torch.log(-x.double()).float()


class Recurrent(Conversion):
    """Convolutions and decays, as all of them have these.

    Attributes:
        columns: whether decays and skips are [H, 1] in GGUF instead of [H].
    """

    names: ClassVar[dict[str, str]] = {".dt_bias": ".dt_proj.bias"}
    columns: ClassVar[bool] = False

    def form(self, config: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Form | None:
        """See `Conversion.form`."""
        if name.endswith(CONVOLUTIONS):
            return Form((shape[0], shape[2]))
        there = (*shape, 1) if self.columns else shape
        if name.endswith(".A_log"):
            return Form(there, decay, log_decay)
        return Form(there) if self.columns and name.endswith(".D") else None


class Mamba(Recurrent):
    """States in a part of their block that is called `mamba`, maybe with a norm behind them."""

    columns = True

    def form(self, config: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Form | None:
        """See `Conversion.form`: the norm is over each group."""
        groups = int(config["mamba_n_groups"])
        return Form((groups, shape[0] // groups)) if "mamba.norm" in name else super().form(config, name, shape)


def check_steps(arch: str, limits: object) -> None:
    """Raises CheckpointError: lengths of steps are limited, which llama.cpp does not do."""
    low, high = limits if isinstance(limits, list | tuple) and len(limits) == 2 else (0.0, math.inf)
    high = math.inf if isinstance(high, str | Mapping) or high is None else high
    check_fixed(arch, {"time_step_limit": [low, high]}, {"time_step_limit": [0.0, math.inf]})
