"""Linear layers whose inputs are rounded, and branches beside them that read inputs as they were.

A layer with codes Q, a branch B and rounded inputs R(x) computes R(x) Q^T + x B^T. Its weight here is Q + B, so what is
left to add is (x - R(x)) B^T.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qtool.calibrate.inputs import rounded
from qtool.checkpoint._base import Checkpoint, Layer, QuantizedCheckpoint
from qtool.residuals._base import Correction


def set_branches(linear: nn.Module, corrections: Sequence[Correction]) -> None:
    """Tells a linear layer which parts of its weight read inputs before they are rounded."""
    found: Any = tuple(c for c in corrections if c.residual.apart)
    linear.branches = found


def stored_branches(checkpoint: Checkpoint, module: str, device: torch.device) -> Sequence[Correction]:
    """Corrections of a module that rounds its inputs, on a device, where some of them read inputs as they were."""
    layer = checkpoint.layers.get(module) if isinstance(checkpoint, QuantizedCheckpoint) else None
    if layer is None or layer.activations is None or not any(residual.apart for residual in layer.residuals):
        return ()
    assert isinstance(checkpoint, QuantizedCheckpoint)
    return [correction.to(device) for correction in checkpoint.corrections(module)]


class RoundedInputs:
    """Two hooks of a linear layer, one before and one behind it; several threads may run it.

    Args:
        layer: how it rounds its inputs, asked every time.
    """

    def __init__(self, layer: Callable[[], Layer]) -> None:
        self.layer, self.here = layer, threading.local()

    def before(self, module: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        """Rounds inputs, [..., K]."""
        self.here.x = args[0]
        return rounded(args[0], self.layer())

    def behind(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Adds to outputs, [..., N], what branches make of what rounding took from inputs."""
        branches: tuple[Correction, ...] = getattr(module, "branches", ())
        x, self.here.x = self.here.x, None
        for branch in branches:
            output = output + branch.residual.output(x - args[0], branch.tensors)
        return output
