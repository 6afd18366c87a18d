"""A decoder block with other tensors, and other inputs of its linear layers, that gradients go through.

Shape letters: S samples, T tokens, H hidden size, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

from torch import Tensor, nn

from qtool.calibrate.blocks import Blocks
from qtool.calibrate.copies import twin
from qtool.calibrate.foreign import Calls
from qtool.calibrate.operated import innermost


def run_replaced(
    blocks: Blocks,
    block: nn.Module,
    i: int,
    x: Tensor,
    tensors: Mapping[str, Tensor],
    inputs: Mapping[str, Callable[[Tensor], Tensor]],
) -> Tensor:
    """A block's output, [S, T, H].

    Args:
        blocks: the model.
        block: from `blocks.load_block(i)`; stays as it is.
        i: its index.
        x: its inputs, [S, T, H].
        tensors: in place of its own, by the names of the checkpoint.
        inputs: what linear layers read instead of their input, [..., K] -> same shape, by module.

    Raises:
        QtoolError: a layer that reads every token did not come by.
    """
    block, calls = twin(block), Calls()
    prefix = blocks.family.block_prefix.format(i=i)

    def module(name: str) -> nn.Module:
        return innermost(block.get_submodule(blocks.family.submodule(name.removeprefix(prefix))))

    for name, tensor in tensors.items():
        owner, _, kind = name.rpartition(".")
        del module(owner)._parameters[kind]
        setattr(module(owner), kind, tensor.to(blocks.device, blocks.dtype))
    around = blocks.around
    arguments = around.anyhow(len(x), x.shape[1])[i] if around else blocks.block_arguments(x.shape[1])[i]
    with ExitStack() as hooks:
        for name, change in inputs.items():
            hook = calls.counted(name, lambda _, args, change=change: change(args[0]))
            hooks.enter_context(module(name).register_forward_pre_hook(hook))
        output = blocks.run(block, x.to(blocks.device, blocks.dtype), arguments)
    calls.check(block, [m.name for m in blocks.modules[i] if m.name in inputs and m.expert is None], 1)
    return output
