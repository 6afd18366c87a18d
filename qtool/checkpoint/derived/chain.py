"""The blocks of a model: where they are, and that they hand on nothing but hidden states.

Shape letters: S samples, T tokens, E hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from qtool.checkpoint.derived.trace import LENGTH, Call, Station, lists, watch
from qtool.errors import one_line


@dataclass(frozen=True)
class Streams:
    """Several hidden states of a token, where blocks work on several.

    Attributes:
        count: how many; 0: one, and no extent for it.
        first: whether blocks want [streams, S, T, E] instead of [S, T, streams, E].
    """

    count: int = 0
    first: bool = False

    def pack(self, x: Tensor) -> Tensor:
        """What a block is given or returns -> [S, T, streams * E]."""
        return (x.permute(1, 2, 0, 3) if self.first else x).flatten(2) if self.count else x

    def unpack(self, x: Tensor) -> Tensor:
        """The way back."""
        if not self.count:
            return x
        apart: Tensor = x.view(*x.shape[:2], self.count, x.shape[2] // self.count)
        return apart.permute(2, 0, 1, 3).contiguous() if self.first else apart


def streams_of(shape: tuple[int, ...]) -> Streams:
    """How blocks want the hidden states of a pass. Raises Unfit: in a way that is not known."""
    if len(shape) == 3 and shape[:2] == (1, LENGTH):
        return Streams()
    if len(shape) == 4 and shape[:2] == (1, LENGTH):
        return Streams(shape[2])
    if len(shape) == 4 and shape[1:3] == (1, LENGTH):
        return Streams(shape[0], first=True)
    raise Unfit(f"its blocks work on hidden states {list(shape)}")


class Unfit(Exception):
    """Why a model does not go through, in a few words."""


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


def check_chain(model: Any, place: str, calls: Mapping[str, Call]) -> tuple[frozenset[str], dict[str, int]]:
    """What blocks exchange beside hidden states.

    Returns:
        (arguments in which blocks leave something for later ones, argument -> which of the things that the block
        before returns it is).

    Raises:
        Unfit: blocks exchange something else than that and hidden states.
    """
    blocks = model.get_submodule(place)
    members = [calls[f"{place}.{i}"] for i in range(len(blocks))]
    for i, call in enumerate(members):
        streams_of(call.shape)
        if i and call.hidden != members[i - 1].output:
            raise Unfit(f"hidden states are changed between blocks {i - 1} and {i}")
    owners: dict[int, int] = {}
    for i, block in enumerate(blocks):
        for parameter in block.parameters():
            if owners.setdefault(id(parameter), i) != i:
                raise Unfit(f"blocks {owners[id(parameter)]} and {i} share weights")
    carried, handed = set[str](), dict[str, int]()
    alone = arguments_without_blocks(model, place, members)
    for i, (call, found) in enumerate(zip(members, alone, strict=True)):
        differing = [name for name, wanted in call.arguments.items() if found.get(name) != wanted]
        left = {name for name in differing if isinstance(found.get(name), dict)}
        for name in (name for name in differing if name not in left):
            returned = handed_place(members, name)
            if returned is None:
                raise Unfit(f"block {i} is given {name} that other blocks compute")
            handed[argument_name(blocks[i], name)] = returned
        carried |= left
    return frozenset(carried), handed


def handed_place(members: list[Call], name: str) -> int | None:
    """Which of the things that each block returns is that argument of the next one; None: none, or it differs."""
    pairs = list(pairwise(members))
    for place in range(1, min((len(before.returned) for before, _ in pairs), default=0)):
        if all(before.returned[place] == call.given.get(name) for before, call in pairs):
            return place
    return None


def argument_name(block: nn.Module, name: str) -> str:
    """What a block calls an argument that it was given by place, counted behind the hidden states."""
    if not name.isdigit():
        return name
    _hidden, *names = inspect.signature(block.forward).parameters
    return names[int(name)]


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
