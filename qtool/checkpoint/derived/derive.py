"""Facts of a model that has no family file, from transformers' class: what blocks it has, what they read, and names.

Shape letters: T tokens, E hidden size, N rows and K columns of a matrix.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from qtool.checkpoint.derived.chain import Unfit, blocks_place, check_chain, streams_of
from qtool.checkpoint.derived.experts import Stack, expert_layers, stacks_of
from qtool.checkpoint.derived.facts import Facts
from qtool.checkpoint.derived.halves import halved
from qtool.checkpoint.derived.names import Origin, origins
from qtool.checkpoint.derived.norms import Readers, block_norms, is_plain, norms_of
from qtool.checkpoint.derived.roles import is_router, merged, role_of
from qtool.checkpoint.derived.skeleton import APART, is_experts, skeleton
from qtool.checkpoint.derived.trace import Call, lists, watch
from qtool.checkpoint.families._parts import Linear, Slice
from qtool.errors import CheckpointError, one_line


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
        return halved(facts_of(model, True)) if config.get(APART) else facts_of(model)
    except Unfit as unfit:
        what = f"{config['model_type']} models do not go through block by block"
        raise CheckpointError(what, found=str(unfit), hint="--model-free quantizes without data") from unfit


def facts_of(model: Any, apart: bool = False) -> Facts:
    """See `derive`; `apart`: tells experts apart that checkpoints store in one tensor. Raises Unfit."""
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
    carried, handed = check_chain(model, place, calls)
    facts = collect(model, place, blocks, calls, (names[id(embedding)], names[id(head)]), apart)
    return replace(facts, carried=carried, handed=handed)


def collect(
    model: Any, place: str, blocks: nn.ModuleList, calls: Mapping[str, Call], ends: tuple[str, str], apart: bool
) -> Facts:
    """Puts everything together. Raises Unfit: checkpoints have tensors that cannot be told apart."""
    found, lost = origins(model)
    if lost:
        raise Unfit(f"its checkpoints store {lost[0]} otherwise than the class")
    stacks = {key: stack for key, stack in stacks_of(model, place, found).items() if stack.separate or apart}
    names = {origin.key: name for name, origin in found.items() if origin.part is None}
    owners = block_owners(place, len(blocks), found)
    prefix = block_prefix(owners)
    head, bias = output_names(model, names, ends)
    embedding = module_name(names, ends[0])
    outside = [name for name in found if name not in owners]
    shapes = {name: found[name].shape for name in sorted(outside, key=lambda n: n != f"{embedding}.weight")}
    heads = {name: shapes.pop(name) for name in (f"{head}.weight", f"{head}.bias") if name in shapes}
    linears, norms, paths, slices = [], list[Readers](), dict[str, str](), dict[str, Slice]()
    parts: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for i in range(len(blocks)):
        before, inside = prefix.format(i=i), f"{place}.{i}."
        mine = [stack for stack in stacks.values() if stack.key.startswith(inside)]
        own = {name: found[name] for name, block in owners.items() if block == i and found[name].key not in stacks}
        for name, shape, key, part in block_tensors(own, mine):
            shapes[name] = shape
            paths[name.removeprefix(before)] = key.removeprefix(inside)
            if name not in own or not own[name].part:
                slices[name] = part
            else:
                parts[name.removeprefix(before)] = key.removeprefix(inside), part.shape, part.first
        linears.append(block_linears(model, inside, before, calls, names, mine))
        norms.append(block_norms(model, inside, before, calls, names, mine))
    if not any(linears):
        raise Unfit("its blocks have no linear layers that run once")
    for below, own_path in list(paths.items()):
        if below.endswith(".weight") and own_path.endswith(".weight"):
            paths[below.removesuffix(".weight")] = own_path.removesuffix(".weight")
    members = [calls[f"{place}.{i}"] for i in range(len(blocks))]
    return Facts(
        architecture=type(model).__name__,
        blocks_path=place,
        block_prefix=prefix,
        embedding=embedding,
        head=head,
        head_bias=bias,
        streams=streams_of(calls[f"{place}.0"].shape),
        shapes=shapes | heads,
        linears=tuple(linears),
        paths={below: path for below, path in paths.items() if below != path},
        around={name: found[name].key for name in outside if needed(found[name].key, calls, ends)},
        outside={name: found[name].key for name in outside if is_weight(model, found[name])},
        slices={name: part for name, part in slices.items() if name != part.tensor},
        parts=parts,
        experts=max((stack.shape[0] for stack in stacks.values()), default=0),
        separate=all(stack.separate for stack in stacks.values()),
        outputs=tuple(call.outputs for call in members),
        norms=tuple(norms),
        last_norm=next((norm for norm, _ in norms_of(model, "", calls, names, {ends[1]: (head,)})), None),
    )


def output_names(model: Any, names: Mapping[str, str], ends: tuple[str, str]) -> tuple[str, str | None]:
    """What checkpoints call the output layer, and its bias if it has one."""
    output = model.get_submodule(ends[1])
    if f"{ends[1]}.weight" not in names and output.weight is not model.get_input_embeddings().weight:
        raise Unfit("its output layer shares the matrix of something else than the embedding")
    head = module_name(names, ends[1]) if f"{ends[1]}.weight" in names else ends[1]
    return head, next((names.get(name) for name, p in model.named_parameters() if p is output.bias), None)


def block_tensors(
    own: Mapping[str, Origin], stacks: Iterable[Stack]
) -> Iterator[tuple[str, tuple[int, ...], str, Slice]]:
    """(name in checkpoints, shape, name in the class, where it may be instead) of the tensors of a block."""
    for name, origin in own.items():
        part = origin.part or Slice(origin.key, origin.shape)
        if len(part.shape) != len(origin.shape) or part.transposed or part.step != 1:
            raise Unfit(f"its checkpoints store {name} as a part of {origin.key}")
        yield name, origin.shape, origin.key, part
    for layer in expert_layers(stacks):
        yield layer.name, layer.shape, layer.path, layer.slice


def module_name(names: Mapping[str, str], module: str) -> str:
    """What checkpoints call a module of the class."""
    if f"{module}.weight" not in names:
        raise Unfit(f"its checkpoints do not store the weight of {module} by itself")
    return names[f"{module}.weight"].removesuffix(".weight")


def is_weight(model: Any, origin: Origin) -> bool:
    """Whether a tensor is all of the weight of a linear layer."""
    owner, _, last = origin.key.rpartition(".")
    return last == "weight" and origin.part is None and isinstance(model.get_submodule(owner), nn.Linear)


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
