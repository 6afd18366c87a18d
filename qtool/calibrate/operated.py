"""Linear layers behind operations on their input, as a runtime does them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from qtool.ops._base import InputOp


def operated(x: Tensor, ops: Sequence[InputOp]) -> Tensor:
    """What operations make of an input, [..., K], computed in float32: same shape and dtype."""
    result = x.float() if ops else x
    for op in ops:
        result = op.apply(result)
    return result.to(x.dtype)


class Operated(nn.Module):
    """A layer that reads its input through operations. Hooks of the layer itself see what comes out of them.

    Args:
        linear: whose weight makes up for the operations.
        ops: in order.
    """

    def __init__(self, linear: nn.Module, ops: Sequence[InputOp]) -> None:
        super().__init__()
        self.linear, self.ops = linear, tuple(ops)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        result: Tensor = self.linear(operated(x, self.ops))
        return result


class Following(nn.Module):
    """Operations on what a module gives.

    Args:
        module: gives it.
        ops: in order.
    """

    def __init__(self, module: nn.Module, ops: Sequence[InputOp]) -> None:
        super().__init__()
        self.module, self.ops = module, tuple(ops)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., K]."""
        return operated(self.module(x), self.ops)


def put_behind(block: nn.Module, ops: Mapping[str, Sequence[InputOp]]) -> None:
    """Puts operations in front of layers of a block, by path below it."""
    for path, own in ops.items():
        if own:
            owner, _, name = path.rpartition(".")
            setattr(block.get_submodule(owner), name, Operated(block.get_submodule(path), own))


def innermost(module: nn.Module) -> nn.Module:
    """A linear layer without the operations on its input."""
    return module.linear if isinstance(module, Operated) else module
