"""The experts of a block as linear layers, each of which can be measured, replaced and given rounded inputs.

transformers holds all experts of a block in two three-dimensional parameters. Here they are modules under the names
that checkpoints use, so that a walk finds them like any other layer. What they compute is the same.

Shape letters: T tokens, X experts, A experts that a token visits, H hidden size, F intermediate size of an expert.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qtool.checkpoint._base import Module

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

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        made = [self.get_submodule(self.names[role])(x) for role in ("gate", "up") if role in self.names]
        result: Tensor = self.get_submodule(self.names["down"])(self.combine(*made))
        return result


class Experts(nn.ModuleList):
    """All experts of a block, in place of transformers' own module.

    Args:
        experts: in order.
        show_all: whether an expert is shown all tokens. The result is that of the true routing in any case.
    """

    def __init__(self, experts: Iterable[Expert], show_all: bool) -> None:
        super().__init__(experts)
        self.show_all = show_all

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Sums up what the chosen experts make of each token.

        Args:
            x: [T, H].
            chosen: int64 [T, A], indices of experts.
            weights: [T, A], of their results.
        """
        result = torch.zeros_like(x)
        for e, expert in enumerate(self):
            token, place = torch.where(chosen == e)
            if self.show_all:
                y = expert(x)[token]
            elif len(token):
                y = expert(x[token])
            else:
                continue
            result.index_add_(0, token, (y * weights[token, place, None]).to(result.dtype))
        return result


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
