"""Which layers read what a norm returns, as the pass that is watched shows it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from qtool.checkpoint.derived.experts import Stack, expert_layers
from qtool.checkpoint.derived.trace import LENGTH, Call

Readers = tuple[tuple[str, tuple[str, ...]], ...]
"""Norms, and the layers that read the output of each."""


def block_norms(
    model: Any, inside: str, before: str, calls: Mapping[str, Call], names: Mapping[str, str], stacks: Iterable[Stack]
) -> Readers:
    """Norms of a block whose output is what some of its layers read, below the block.

    Args:
        model: on the meta device.
        inside: what names of the block's modules begin with, in the class.
        before: and in checkpoints.
        calls: of modules that ran.
        names: of the class's tensors in checkpoints.
        stacks: of the block's experts.
    """
    layers: dict[str, tuple[str, ...]] = {}
    experts: dict[str, list[str]] = defaultdict(list)
    for layer in expert_layers(stacks):
        if layer.name.endswith(".weight") and layer.role != "down":
            experts[layer.path.rsplit(".", 3)[0]].append(layer.linear(before).path)
    for name, call in sorted(calls.items(), key=lambda item: item[1].order):
        if name in experts:
            layers[name] = tuple(experts[name])
        elif name.startswith(inside) and is_matrix(model.get_submodule(name), call) and f"{name}.weight" in names:
            layers[name] = (names[f"{name}.weight"].removesuffix(".weight").removeprefix(before),)
    found = norms_of(model, inside, calls, names, layers)
    return tuple((norm.removeprefix(before), readers) for norm, readers in found)


def norms_of(
    model: Any, inside: str, calls: Mapping[str, Call], names: Mapping[str, str], layers: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(norm, layers that read what it returns): modules with a vector that multiplies channels, and maybe a bias."""
    for name, call in calls.items():
        if not name.startswith(inside) or call.output is None or call.times > 1:
            continue
        shapes = {key: tuple(p.shape) for key, p in model.get_submodule(name).named_parameters()}
        vectors = shapes.keys() <= {"weight", "bias"} and set(shapes.values()) == {(call.output[3],)}
        if vectors and f"{name}.weight" in names:
            readers = [own for reader, own in layers.items() if calls[reader].hidden == call.output]
            if readers:
                yield names[f"{name}.weight"].removesuffix(".weight"), tuple(x for own in readers for x in own)


def is_matrix(module: nn.Module, call: Call) -> bool:
    """Whether it is a linear layer that ran once, or looks like one: routers of experts have classes of their own."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Embedding) or weight is None or weight.ndim != 2:
        return False
    return call.times == 1 and call.hidden is not None and weight.shape[1] == call.hidden[3]


def is_plain(module: nn.Module, call: Call) -> bool:
    """Whether it is a linear layer that ran once, on every token."""
    return isinstance(module, nn.Linear) and call.times == 1 and call.tokens == LENGTH
