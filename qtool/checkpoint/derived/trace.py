"""One forward pass of a model on the meta device, watched: which modules run, in which order, and on what.

Tensors without memory still have storages of their own, so that two layers read the same input if, and only if, they
are given the same part of the same storage. Nothing is computed: a model of any size takes a second.

Shape letters: T tokens, E hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qtool.checkpoint.derived.skeleton import is_experts, quiet

LENGTH = 16
"""Tokens of the pass."""

Key = tuple[int, int, int, int]
"""What a tensor is: its storage, where it begins there, how many numbers it has, and its last extent."""


class Undecided(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers questions about values of tensors that have none: yes.

    transformers asks, before it builds masks, whether nothing is padded and no sequences are packed.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].dtype.is_floating_point else 1)
        return func(*args, **(kwargs or {}))


def key_of(tensor: Tensor) -> Key:
    """What tells it from other tensors that are alive."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset()), tensor.numel(), tensor.shape[-1]


@dataclass
class Call:
    """A module that ran.

    Attributes:
        order: when, counted from 0.
        times: how often.
        hidden: what its first argument was; that and the next two of the first time.
        shape: the shape of that.
        output: what it returned, or the first thing of it.
        returned: each thing that it returned, if several; None in places of what is no tensor.
        outputs: how many things it returned; None: a tensor.
        arguments: what else it was given, see `looks`.
        given: those of them that are tensors, by the same names.
    """

    order: int
    times: int = 1
    hidden: Key | None = None
    shape: tuple[int, ...] = ()
    output: Key | None = None
    returned: tuple[Key | None, ...] = ()
    outputs: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Key] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Rows that its first argument has."""
        return math.prod(self.shape[:-1])


def watch(model: Any, modules: Mapping[str, nn.Module]) -> dict[str, Call]:
    """Runs a model on the meta device.

    Args:
        model: all of it on the meta device; its experts forget what they do.
        modules: what to watch, by name.

    Returns:
        Those that ran, by name, in their order.
    """
    calls: dict[str, Call] = {}
    references: list[Any] = []  # a storage that is gone leaves its place to another

    def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        references.append((args, kwargs))
        if name in calls:
            calls[name].times += 1
            return
        calls[name] = call = Call(len(calls))
        values = [*args, *kwargs.values()]
        if values and isinstance(values[0], Tensor):
            call.hidden, call.shape = key_of(values[0]), tuple(values[0].shape)
        beside = places(args[1:], kwargs if args else dict(list(kwargs.items())[1:]))
        call.arguments = {key: looks(value) for key, value in beside.items()}
        call.given = {key: key_of(value) for key, value in beside.items() if isinstance(value, Tensor) and value.ndim}

    def after(name: str, output: Any) -> None:
        references.append(output)
        first = output[0] if isinstance(output, tuple | list) and output else output
        if isinstance(first, Tensor):
            calls[name].output = key_of(first)
        if isinstance(output, tuple | list):
            calls[name].outputs = len(output)
            calls[name].returned = tuple(key_of(x) if isinstance(x, Tensor) and x.ndim else None for x in output)

    for module in model.modules():
        if is_experts(module):
            module.forward = lambda x, *_, **__: torch.zeros_like(x)
    with ExitStack() as stack:
        for name, module in modules.items():
            pre = module.register_forward_pre_hook(lambda _, a, k, n=name: before(n, a, k), with_kwargs=True)
            stack.enter_context(pre)
            stack.enter_context(module.register_forward_hook(lambda _, __, y, n=name: after(n, y)))
        run(model)
    return calls


def run(model: Any) -> None:
    """A forward pass of a few tokens, of which nothing is kept."""
    with quiet(), torch.no_grad(), all_nonzero(), Undecided():  # type: ignore[no-untyped-call]
        model.eval()(input_ids=torch.zeros((1, LENGTH), dtype=torch.long, device="meta"), use_cache=False)


def all_nonzero() -> Any:
    """Within the context, tensors without values count as nonzero everywhere, so that whoever picks rows picks all."""
    from torch.fx.experimental import _config as found

    config: Any = found
    name = "meta_nonzero_assume_all_nonzero"
    return config.patch({name: True}) if hasattr(config, name) else nullcontext()


def places(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, or by place where they have none."""
    return {str(i): value for i, value in enumerate(args)} | dict(kwargs)


def looks(value: Any) -> Any:
    """What an argument looks like: shapes of tensors, sizes of collections, None or the type of anything else."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, tuple | list):
        return [looks(x) for x in value]
    if isinstance(value, Mapping):
        return {str(name): looks(x) for name, x in value.items()}
    return None if value is None else type(value).__name__


class Station(nn.Module):
    """Stands in for a block of a model: hands hidden states on, and shows whoever asks what the block has.

    Args:
        block: whose attributes models look at.
        outputs: how many things the block returns; None: a tensor.
    """

    def __init__(self, block: nn.Module, outputs: int | None) -> None:
        super().__init__()
        self.outputs = outputs
        self.__dict__["block"] = block  # no submodule of this one

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def hand_on(self, hidden: Tensor) -> Any:
        """Hidden states as the block returns them."""
        return hidden if self.outputs is None else (hidden, *[None] * (self.outputs - 1))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes the place of a block's forward."""
        return self.hand_on(args[0] if args else next(iter(kwargs.values())))


def lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    """Lists of modules, where blocks are."""
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module):
            yield name, module
