"""Facts of a model that has no family file, from transformers' class: what blocks it has, what they read, and names.

Shape letters: T tokens, E hidden size, N rows and K columns of a matrix.
"""

from __future__ import annotations

import json
import os.path
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from qtool.checkpoint.derived.experts import Stack, expert_layers, stacks_of
from qtool.checkpoint.derived.names import Origin, origins
from qtool.checkpoint.derived.roles import is_router, merged, role_of
from qtool.checkpoint.derived.skeleton import is_experts, skeleton
from qtool.checkpoint.derived.trace import LENGTH, Call, Station, lists, watch
from qtool.checkpoint.families._parts import Linear, Slice
from qtool.errors import CheckpointError, one_line


@dataclass(frozen=True)
class Facts:
    """What `Derived` tells of a model.

    Attributes:
        architecture: the class.
        blocks_path: where its blocks are, in the class.
        block_prefix: what names of tensors of block i begin with in checkpoints, with "{i}".
        embedding, head: modules, as checkpoints call them.
        shapes: of every tensor.
        linears: of every block, in the order of computation.
        paths: what the class calls a module or tensor below its block; those that checkpoints call the same are left
            out.
        around: tensor outside of blocks that a text needs -> its name in the class.
        slices: where a checkpoint may have a tensor that it does not have under its own name.
        experts: most experts of a block.
        separate: whether checkpoints have a matrix for each expert.
        outputs: how many things each block returns; None: a tensor.
    """

    architecture: str
    blocks_path: str
    block_prefix: str
    embedding: str
    head: str
    shapes: Mapping[str, tuple[int, ...]]
    linears: tuple[tuple[Linear, ...], ...]
    paths: Mapping[str, str]
    around: Mapping[str, str]
    slices: Mapping[str, Slice]
    experts: int
    separate: bool
    outputs: tuple[int | None, ...]


class Unfit(Exception):
    """Why a model does not go through, in a few words."""


def derive(config: Mapping[str, Any]) -> Facts:
    """The facts of a model.

    Args:
        config: config.json.

    Raises:
        CheckpointError: transformers has no such model, or it is built in a way that does not go through; with the
            reason.
    """
    return _derive(json.dumps(config, sort_keys=True))


@lru_cache(maxsize=16)
def _derive(text: str) -> Facts:
    config = json.loads(text)
    model = skeleton(config, torch.float32)
    try:
        return facts_of(model)
    except Unfit as unfit:
        what = f"{config['model_type']} models do not go through block by block"
        raise CheckpointError(what, found=str(unfit)) from unfit


def facts_of(model: Any) -> Facts:
    """See `derive`. Raises Unfit."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    if id(embedding) not in names or not isinstance(head, nn.Linear):
        raise Unfit("it has no token embedding, or no single output layer")
    kinds = (nn.Linear, nn.Embedding)
    watched = {name: m for name, m in model.named_modules() if isinstance(m, kinds) or is_experts(m)}
    watched |= {f"{place}.{i}": m for place, found in lists(model) for i, m in enumerate(found)}
    others = {name: m for name, m in model.named_modules() if name and name not in watched}
    try:
        calls = watch(model, watched | others)
    except Exception as error:  # code of others, on tensors without values
        raise Unfit(f"its forward pass cannot be followed: {type(error).__name__}: {one_line(error)}") from error
    place = blocks_place(model, calls)
    blocks = model.get_submodule(place)
    check_chain(model, place, calls)
    return collect(model, place, blocks, calls, (names[id(embedding)], names[id(head)]))


def blocks_place(model: Any, calls: Mapping[str, Call]) -> str:
    """The list whose members run one after the other and hold most of the model. Raises Unfit: there is none."""
    sizes: dict[str, int] = {}
    for place, members in lists(model):
        inner = any(place.startswith(f"{other}.") for other in sizes)
        ran = [calls.get(f"{place}.{i}") for i in range(len(members))]
        orders = [call.order for call in ran if call and call.times == 1 and len(call.shape) >= 3]
        if not inner and len(orders) == len(members) and orders == sorted(orders):
            sizes[place] = sum(p.numel() for p in members.parameters())
    if not sizes:
        raise Unfit("it has no list of blocks that run once each, one after the other")
    return max(sizes, key=sizes.__getitem__)


def check_chain(model: Any, place: str, calls: Mapping[str, Call]) -> None:
    """Raises Unfit: blocks exchange something else than hidden states [1, T, E]."""
    blocks = model.get_submodule(place)
    members = [calls[f"{place}.{i}"] for i in range(len(blocks))]
    for i, call in enumerate(members):
        if len(call.shape) != 3 or call.shape[:2] != (1, LENGTH):
            raise Unfit(f"block {i} works on hidden states {list(call.shape)}")
        if i and call.hidden != members[i - 1].output:
            raise Unfit(f"hidden states are changed between blocks {i - 1} and {i}")
    owners: dict[int, int] = {}
    for i, block in enumerate(blocks):
        for parameter in block.parameters():
            if owners.setdefault(id(parameter), i) != i:
                raise Unfit(f"blocks {owners[id(parameter)]} and {i} share weights")
    alone = arguments_without_blocks(model, place, members)
    for i, (call, found) in enumerate(zip(members, alone, strict=True)):
        wanted = call.arguments
        if missing := [name for name in wanted if found.get(name) != wanted[name]]:
            raise Unfit(f"block {i} is given {missing[0]} that other blocks compute")


def arguments_without_blocks(model: Any, place: str, members: list[Call]) -> list[dict[str, Any]]:
    """What each block is given when no block computes anything. Raises Unfit: the model does not run so."""
    owner, _, name = place.rpartition(".")
    parent, blocks = model.get_submodule(owner), model.get_submodule(place)
    stations = nn.ModuleList([Station(b, call.outputs) for b, call in zip(blocks, members, strict=True)])
    setattr(parent, name, stations)
    try:
        calls = watch(model, {str(i): station for i, station in enumerate(stations)})
    except Exception as error:  # code of others, on tensors without values
        raise Unfit(f"it looks at what its blocks return: {type(error).__name__}: {one_line(error)}") from error
    finally:
        setattr(parent, name, blocks)
    return [calls[str(i)].arguments for i in range(len(blocks))]


def collect(model: Any, place: str, blocks: nn.ModuleList, calls: Mapping[str, Call], ends: tuple[str, str]) -> Facts:
    """Puts everything together. Raises Unfit: checkpoints have tensors that cannot be told apart."""
    found, lost = origins(model)
    if lost:
        raise Unfit(f"its checkpoints store {lost[0]} otherwise than the class")
    stacks = stacks_of(model, place, found)
    names = {origin.key: name for name, origin in found.items() if origin.part is None}
    owners = block_owners(place, len(blocks), found)
    prefix = block_prefix(owners)
    linears, shapes, paths, slices = [], dict[str, tuple[int, ...]](), dict[str, str](), dict[str, Slice]()
    head = module_name(names, ends[1]) if f"{ends[1]}.weight" in names else "lm_head"
    embedding = module_name(names, ends[0])
    outside = [name for name in found if name not in owners]
    last = {f"{head}.weight", f"{head}.bias"}
    shapes |= {name: found[name].shape for name in sorted(outside, key=lambda n: n != f"{embedding}.weight")}
    heads = {name: shapes.pop(name) for name in last if name in shapes}
    for i in range(len(blocks)):
        before, inside = prefix.format(i=i), f"{place}.{i}."
        own = [name for name, block in owners.items() if block == i]
        for name in own:
            origin = found[name]
            if origin.key in stacks:
                continue
            if origin.part:
                raise Unfit(f"its checkpoints store {name} as a part of {origin.key}")
            shapes[name] = origin.shape
            paths[name.removeprefix(before)] = origin.key.removeprefix(inside)
            slices[name] = Slice(origin.key, origin.shape)
        mine = [stack for stack in stacks.values() if stack.key.startswith(inside)]
        linears.append(block_linears(model, inside, before, calls, names, mine))
        for layer in expert_layers(mine):
            shapes[layer.name] = layer.shape
            paths[layer.name.removeprefix(before)] = layer.path.removeprefix(inside)
            slices[layer.name] = layer.slice
    if not any(linears):
        raise Unfit("its blocks have no linear layers that run once")
    for below, own_path in list(paths.items()):
        paths[os.path.splitext(below)[0]] = os.path.splitext(own_path)[0]
    members = [calls[f"{place}.{i}"] for i in range(len(blocks))]
    return Facts(
        architecture=type(model).__name__,
        blocks_path=place,
        block_prefix=prefix,
        embedding=embedding,
        head=head,
        shapes=shapes | heads,
        linears=tuple(linears),
        paths={below: path for below, path in paths.items() if below != path},
        around={name: found[name].key for name in outside if needed(found[name].key, calls, ends)},
        slices={name: part for name, part in slices.items() if name != part.tensor},
        experts=max((stack.shape[0] for stack in stacks.values()), default=0),
        separate=all(stack.separate for stack in stacks.values()),
        outputs=tuple(call.outputs for call in members),
    )


def module_name(names: Mapping[str, str], module: str) -> str:
    """What checkpoints call a module of the class."""
    if f"{module}.weight" not in names:
        raise Unfit(f"its checkpoints do not store the weight of {module} by itself")
    return names[f"{module}.weight"].removesuffix(".weight")


def needed(key: str, calls: Mapping[str, Call], ends: tuple[str, str]) -> bool:
    """Whether a tensor belongs to a module that runs when the model reads text."""
    owner = key.rpartition(".")[0]
    return owner in calls or owner in ends or not owner


def block_owners(place: str, count: int, found: Mapping[str, Origin]) -> dict[str, int]:
    """Tensor of a checkpoint -> its block."""
    owners = {}
    for name, origin in found.items():
        if origin.key.startswith(f"{place}."):
            owners[name] = int(origin.key.removeprefix(f"{place}.").partition(".")[0])
    return owners


def block_prefix(owners: Mapping[str, int]) -> str:
    """What names of tensors in block i begin with, with "{i}". Raises Unfit: that is not so."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, i in owners.items():
        names[i].append(name)
    templates = set()
    for i, members in names.items():
        before, number, _ = members[0].partition(f".{i}.")
        number = number if all(name.startswith(before + number) for name in members) else ""
        templates.add(f"{before}.{{i}}." if number else "")
    if len(templates) != 1 or "" in templates:
        raise Unfit("checkpoints do not number its blocks as the class does")
    return templates.pop()


def block_linears(
    model: Any, inside: str, before: str, calls: Mapping[str, Call], names: Mapping[str, str], stacks: Iterable[Stack]
) -> tuple[Linear, ...]:
    """The linear layers of a block, in the order of computation.

    Args:
        model: on the meta device.
        inside: what names of the block's modules begin with, in the class.
        before: and in checkpoints.
        calls: of modules that ran.
        names: of the class's tensors in checkpoints.
        stacks: of the block's experts.
    """
    stacks = list(stacks)
    experts = {stack.owner for stack in stacks}
    count = max((stack.shape[0] for stack in stacks), default=0)
    ran = sorted((n for n in calls if n.startswith(inside)), key=lambda n: calls[n].order)
    plain = [n for n in ran if is_plain(model.get_submodule(n), calls[n]) and f"{n}.weight" in names]
    paths = {n: names[f"{n}.weight"].removesuffix(".weight").removeprefix(before) for n in plain}
    inputs: dict[Any, list[str]] = defaultdict(list)
    for name in plain:
        inputs[calls[name].hidden].append(paths[name])
    fused = {path: name for group in inputs.values() for path, name in merged(group)}
    linears: list[Linear] = []
    for name in ran:
        if name in experts:
            linears += [
                layer.linear(before)
                for layer in expert_layers(s for s in stacks if s.owner == name)
                if layer.name.endswith(".weight")
            ]
        elif name in paths:
            path = paths[name]
            reads = f"{inputs[calls[name].hidden][0]}.in"
            router = is_router(path, model.get_submodule(name).weight.shape[0], count)
            kind = "router" if router else "linear"
            linears.append(Linear(path, "router" if router else role_of(path), reads, fused.get(path), kind=kind))
    return tuple(linears)


def is_plain(module: nn.Module, call: Call) -> bool:
    """Whether it is a linear layer that ran once, on rows of its own width."""
    return isinstance(module, nn.Linear) and call.times == 1 and call.shape[-1:] == module.weight.shape[1:]
