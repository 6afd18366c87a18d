"""The experts of a block as linear layers, each of which can be measured, replaced and given rounded inputs.

transformers holds all experts of a block in two three-dimensional parameters. Here they are modules under the names
that checkpoints use, so that a walk finds them like any other layer. What they compute is the same.

Shape letters: T tokens, X experts, A experts that a token visits, H hidden size, F intermediate size of an expert.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from qtool.calibrate.copies import twin
from qtool.checkpoint._base import Module

FIRST = ("gate", "up")
"""Roles that read what the expert reads."""
Combine = Callable[..., Tensor]
"""(gate [T, F], up [T, F]), or (up [T, F]) of experts without a gate -> [T, F], what the down projection reads."""


class Expert(nn.Module):
    """One expert: down(combine(gate(x), up(x))).

    Args:
        layers: its projections by role.
        names: what checkpoints call them, by role.
        combine: see `Combine`.
    """

    def __init__(self, layers: Mapping[str, nn.Linear], names: Mapping[str, str], combine: Combine) -> None:
        super().__init__()
        self.names, self.combine = names, combine
        for role, layer in layers.items():
            self.add_module(names[role], layer)

    def layer(self, role: str) -> nn.Module:
        """The projection of a role, behind the operations on its input."""
        return self.get_submodule(self.names[role])

    def inside(self, x: Tensor) -> Tensor:
        """What the down projection reads: [T, H] -> [T, F]."""
        return self.combine(*(self.layer(role)(x) for role in FIRST if role in self.names))


class Noted(Exception):
    """Leaves a layer before it computes, with what it would read.

    Args:
        reads: `Module.reads`.
        x: its input, [T, K].
    """

    def __init__(self, reads: str, x: Tensor) -> None:
        super().__init__(reads)
        self.reads, self.x = reads, x


class Meeting(Protocol):
    """Whoever measures the inputs of several experts before any of them is used."""

    def wants(self, place: str) -> Collection[int]:
        """Experts whose layers raise `Noted` now, at a place: "in 0", "down 0", by the first of several experts."""

    def wait(self, place: str, seen: Mapping[str, Tensor]) -> None:
        """Takes inputs by `Module.reads`; returns when these layers may compute."""


class Experts(nn.ModuleList):
    """All experts of a block, in place of transformers' own module.

    Args:
        experts: in order.
        show_all: whether an expert is shown all tokens. The result is that of the true routing in any case.

    Attributes:
        abreast: how many experts are run side by side, role by role.
        meeting: where their inputs are measured before; None: nowhere.
    """

    def __init__(self, experts: Iterable[Expert], show_all: bool) -> None:
        super().__init__(experts)
        self.show_all, self.abreast = show_all, 1
        self.meeting: Meeting | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Experts:
        """Modules of its own whose parameters are shared until it gets some, as those of a block that is loaded.

        Copies of hundreds of linear layers, each with its twenty attributes, were a third of the time to load a block.
        """
        memo[id(self)] = found = cast(Experts, twin(self))
        return found

    def forward(self, x: Tensor, chosen: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Sums up what the chosen experts make of each token.

        Args:
            x: [T, H]; where nobody chooses, [X T, H]: what each expert reads, one behind the other.
            chosen: int64 [T, A], indices of experts.
            weights: [T, A], of their results.
        """
        show_all = self.show_all and chosen is not None
        result = torch.zeros_like(x)
        visits = own_rows(x, len(self)) if chosen is None else visitors(chosen, len(self))
        for start in range(0, len(self), self.abreast):
            several: dict[int, Any] = dict(list(enumerate(self))[start : start + self.abreast])
            here = [e for e in several if show_all or len(visits[e][0])]
            shown = partial(self.shown, x, visits, show_all)
            self.meet("in", start, shown, here)
            inside = {e: several[e].inside(shown(e)) for e in here}
            self.meet("down", start, inside.__getitem__, here)
            for e in here:
                token, place = visits[e]
                y = several[e].layer("down")(inside.pop(e))
                y = y[token] if show_all else y
                y = y if weights is None else y * weights[token, place, None]
                result.index_add_(0, token, y.to(result.dtype))
        return result

    def shown(self, x: Tensor, visits: Sequence[Sequence[Tensor]], show_all: bool, e: int) -> Tensor:
        """What an expert reads of [T, H], given (tokens, ...) that visit each."""
        return x if show_all else x[visits[e][0]]

    def meet(self, side: str, first: int, read: Callable[[int], Tensor], here: Collection[int]) -> None:
        """Has inputs of some experts measured, if somebody wants them, before any of these is used.

        Args:
            side: "in" or "down".
            first: of the experts.
            read: gives the input of an expert.
            here: experts that tokens visit.
        """
        place = f"{side} {first}"
        wanted = self.meeting.wants(place) if self.meeting else ()
        if not (self.meeting and wanted):
            return
        seen = {}
        for e in (e for e in here if e in wanted):
            expert: Any = self[e]
            role = "down" if side == "down" else next(role for role in FIRST if role in expert.names)
            try:
                expert.layer(role)(read(e))
            except Noted as noted:
                seen[noted.reads] = noted.x
        self.meeting.wait(place, seen)


def visitors(chosen: Tensor, experts: int) -> list[tuple[Tensor, Tensor]]:
    """(tokens, places among their choices) of those that visit each expert, in the order of tokens; chosen: [T, A]."""
    flat = chosen.flatten()
    order, counts = flat.argsort(stable=True), flat.bincount(minlength=experts).tolist()
    parts: Sequence[Tensor] = torch.split(order, counts)
    return [(part // chosen.shape[1], part % chosen.shape[1]) for part in parts]


def own_rows(x: Tensor, experts: int) -> list[tuple[Tensor, Tensor]]:
    """The same, of inputs [X T, H] of all experts; those that do not visit one are zeros there, which it makes zero."""
    parts = torch.split(x.any(-1), len(x) // experts)
    rows = [part.nonzero().flatten() + e * len(part) for e, part in enumerate(parts)]
    return [(found, torch.zeros_like(found)) for found in rows]


def split_layers(block: nn.Module, found: Mapping[str, Module], show_all: bool) -> None:
    """Gives a block of transformers the linear layers that `found` names, where its class keeps several in one.

    Args:
        block: of transformers.
        found: the linear layers of the block by path below it.
        show_all: see `Experts`.
    """
    split_experts(block, found, show_all)
    split_joined(block, found)


class OneBehindOther(nn.Module):
    """Layers that a class keeps in one: their outputs one behind the other.

    Args:
        layers: by name, in order.
    """

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N], of all layers together."""
        return torch.cat([layer(x) for layer in self.children()], dim=-1)


def split_joined(block: nn.Module, found: Mapping[str, Module]) -> None:
    """Puts `OneBehindOther` on the meta device in the place of linear layers that are known by their parts.

    Args:
        block: of transformers.
        found: the linear layers of the block by path below it, a part below the layer that it is of.
    """
    parts: dict[str, dict[str, nn.Linear]] = defaultdict(dict)
    modules = dict(block.named_modules())
    for path, module in found.items():
        whole, _, name = path.rpartition(".")
        if isinstance(modules.get(whole), nn.Linear):
            parts[whole][name] = nn.Linear(*module.shape[::-1], bias=False, device="meta")
    for whole, layers in parts.items():
        owner, _, name = whole.rpartition(".")
        setattr(block.get_submodule(owner), name, OneBehindOther(layers))


def split_experts(block: nn.Module, found: Mapping[str, Module], show_all: bool) -> None:
    """Puts `Experts` on the meta device in the place of transformers' module, if the block has one.

    Args:
        block: of transformers.
        found: the linear layers of the block by path below it.
        show_all: see `Experts`.
    """
    members: dict[str, dict[str, str]] = defaultdict(dict)
    for path, module in found.items():
        if module.expert is not None:
            members[path.rpartition(".")[0]][module.role] = path
    if not members:
        return
    place = next(iter(members)).rpartition(".")[0]
    theirs: Any = block.get_submodule(place)
    bias = any(name.endswith("_bias") for name, _ in theirs.named_parameters())
    combine = combination(theirs)
    experts = []
    for paths in members.values():
        layers = {role: nn.Linear(*found[path].shape[::-1], bias, device="meta") for role, path in paths.items()}
        experts.append(Expert(layers, {role: path.rpartition(".")[2] for role, path in paths.items()}, combine))
    owner, _, name = place.rpartition(".")
    setattr(block.get_submodule(owner), name, Experts(experts, show_all))


def combination(theirs: Any) -> Combine:
    """What a module of transformers makes of gate and up."""
    if not getattr(theirs, "has_gate", True):
        act: Combine = theirs.act_fn
        return act
    if hasattr(theirs, "act_fn") and plain_gate(theirs):
        return gated(theirs.act_fn)
    return interleaved(theirs._apply_gate) if not getattr(theirs, "is_concatenated", False) else joined(theirs)


def plain_gate(theirs: Any) -> bool:
    """Whether a module's class leaves it to transformers how gate and up are put together."""
    own = getattr(type(theirs), "_apply_gate", None)
    return own is None or own.__name__ == "_default_apply_gate"


def joined(theirs: Any) -> Combine:
    """What transformers' own function makes of gate and up, one behind the other."""
    return lambda gate, up: theirs._apply_gate(torch.cat((gate, up), dim=-1))


def gated(act: Callable[[Tensor], Tensor]) -> Combine:
    """act(gate) * up."""
    return lambda gate, up: act(gate) * up


def interleaved(apply: Callable[[Tensor], Tensor]) -> Combine:
    """What transformers' own function makes of gate and up, whose columns it wants in turns."""
    return lambda gate, up: apply(torch.stack((gate, up), dim=-1).flatten(-2))
