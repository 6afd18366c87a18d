"""Experts that a class keeps in three-dimensional parameters, as the linear layers that they are.

Shape letters: X experts, R rows and C columns of an expert's matrix as it is stored, N rows and K columns of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qtool.checkpoint.derived.names import Origin
from qtool.checkpoint.derived.skeleton import is_experts, is_taken_apart
from qtool.checkpoint.families._parts import Linear, Slice

PARAMETERS = ("gate_up_proj", "up_proj", "down_proj")
"""What transformers calls the matrices of experts; their biases are called the same with "_bias"."""


@dataclass(frozen=True)
class Stack:
    """One parameter of a module of experts.

    Attributes:
        key: its name in the class.
        owner: the module.
        shape: [X, R, C], or [X, R] of biases.
        transposed: whether matrices are [K, N] in it.
        concatenated: whether rows of gate lie before those of up, instead of in turns.
        names: (expert, role) -> what a checkpoint calls the layer, where it is in the parameter, and where a checkpoint
            may have it otherwise.
        separate: whether checkpoints store it so, at least quantized ones; False: they store the parameter.
    """

    key: str
    owner: str
    shape: tuple[int, ...]
    transposed: bool
    concatenated: bool
    names: Mapping[tuple[int, str], tuple[str, Slice, Slice]]
    separate: bool


@dataclass(frozen=True)
class ExpertTensor:
    """A matrix or bias of one expert.

    Attributes:
        name: in checkpoints, with ".weight" or ".bias".
        path: where it is in a class whose experts are modules.
        shape: [N, K] or [N].
        part: where it is in the parameter.
        slice: where a checkpoint may have it instead.
        role: gate, up or down.
        expert: its index.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    part: Slice
    slice: Slice
    role: str
    expert: int

    def linear(self, before: str) -> Linear:
        """The layer of a matrix; `before` is what names of its block begin with."""
        path = self.name.removesuffix(".weight").removeprefix(before)
        owner = path.rpartition(".")[0]
        reads, fused = (f"{owner}.mid", None) if self.role == "down" else (f"{owner}.in", f"{owner}.gate_up")
        return Linear(path, self.role, reads, fused, self.expert)


def stacks_of(model: Any, place: str, found: Mapping[str, Origin]) -> dict[str, Stack]:
    """Parameters of experts by name.

    Args:
        model: on the meta device.
        place: where its blocks are.
        found: where tensors of checkpoints are.
    """
    cut: dict[str, list[tuple[str, Origin]]] = {}
    for name, origin in found.items():
        cut.setdefault(origin.key, []).append((name, origin))
    stacks = {}
    for owner, module in model.named_modules():
        if (
            not owner.startswith(f"{place}.")
            or not is_experts(module)
            or getattr(module, "has_post_expert_norm", False)
        ):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if name.removesuffix("_bias") in PARAMETERS and (key := f"{owner}.{name}") in cut:
                stacks[key] = stack_of(module, owner, name, tuple(parameter.shape), cut[key])
    return stacks


def stack_of(module: Any, owner: str, name: str, shape: tuple[int, ...], cut: list[tuple[str, Origin]]) -> Stack:
    """One of them; `cut` is what checkpoints store of it."""
    key, bias = f"{owner}.{name}", name.endswith("_bias")
    apart = is_taken_apart(module)
    turned, joined = apart or (bool(module.is_transposed) and not bias), apart or bool(module.is_concatenated)
    names: dict[tuple[int, str], tuple[str, Slice, Slice]] = {}
    separate = all(origin.part and origin.part.index is not None for _, origin in cut)
    if separate:
        for tensor, origin in cut:
            assert origin.part and origin.part.index is not None
            role = "down" if name.startswith("down") else "up" if origin.part.first or name.startswith("up") else "gate"
            names[origin.part.index, role] = tensor, origin.part, origin.part
        return Stack(key, owner, shape, turned, joined, names, True)
    stored, origin = cut[0]
    other_way = origin.part is not None and origin.part.transposed
    for e in range(shape[0]):
        for role, first, step in rows(name, shape[2 if turned else 1], joined):
            tensor = f"{experts_place(stored)}.{e}.{role}_proj.{'bias' if bias else 'weight'}"
            part = Slice(key, shape, e, first, step, turned)
            names[e, role] = tensor, part, Slice(stored, origin.shape, e, first, step, turned ^ other_way)
    return Stack(key, owner, shape, turned, joined, names, apart)


def experts_place(stored: str) -> str:
    """What experts are below that have a tensor together: "mlp.experts" of "mlp.experts.down_proj"."""
    place = stored.removesuffix(".weight").rpartition(".")[0]
    return place if place.endswith(".experts") else f"{place}.experts"


def rows(name: str, count: int, concatenated: bool) -> Iterator[tuple[str, int, int]]:
    """(role, first row, step) of what is in a parameter with so many rows."""
    if not name.startswith("gate_up"):
        yield "down" if name.startswith("down") else "up", 0, 1
    elif concatenated:
        yield from (("gate", 0, 1), ("up", count // 2, 1))
    else:
        yield from (("gate", 0, 2), ("up", 1, 2))


def expert_layers(stacks: Iterable[Stack]) -> list[ExpertTensor]:
    """Matrices and biases of all experts of a block: gate, up and down of the first, then of the next."""
    layers = []
    for stack in stacks:
        bias = stack.key.endswith("_bias")
        n, k = (
            (stack.shape[1], 0) if bias else (stack.shape[2], stack.shape[1]) if stack.transposed else stack.shape[1:]
        )
        n //= 2 if stack.key.rpartition(".")[2].startswith("gate_up") else 1
        for (e, role), (name, part, stored) in stack.names.items():
            last, kind = name.split(".")[-2:]
            path = f"{stack.owner}.{e}.{last}.{kind}"
            layers.append(ExpertTensor(name, path, (n,) if bias else (n, k), part, stored, role, e))
    order = ("gate", "up", "down")
    return sorted(layers, key=lambda layer: (layer.expert, order.index(layer.role)))
