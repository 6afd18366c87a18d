"""Calls code of transformers, and checks that what was handed to it had its effect.

Releases rename arguments, and a function that takes any keyword drops what it does not know without a word: the result
is a number that looks right. So names come from the signature of what is called, and whatever is passed in or hooked is
checked to have been used.

Shape letters: S samples, T tokens per sample, H hidden size.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Protocol

from torch import Tensor, nn

from qtool.errors import QtoolError, one_line
from qtool.tested import NEWEST

CACHE_NAMES = ("cache", "past_key_values")
"""What releases of transformers call the argument that takes a cache."""


class KVStore(Protocol):
    """What attention asks of a cache."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Takes keys and values of a block, [S, A, T, D] each, and gives those that attention goes on with."""


def misfit(module: nn.Module, what: str) -> QtoolError:
    """The error for a module of transformers that does not do what we rely on."""
    from transformers import __version__

    return QtoolError(
        f"transformers {__version__} does not work with this qtool: {type(module).__name__} {what}",
        hint=f"qtool was tested with transformers {NEWEST['transformers']}",
    )


def cache_argument(kind: type[nn.Module]) -> str | None:
    """The argument of a class's forward that takes a cache; None: it has none that we know of."""
    taken = inspect.signature(kind.forward).parameters
    return next((name for name in CACHE_NAMES if name in taken), None)


class Handed:
    """A cache for one call of a block, which shows whether the block used it.

    Args:
        store: what keys and values go through.
    """

    def __init__(self, store: KVStore) -> None:
        self.store, self.updates = store, 0

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Called by attention; see `KVStore`."""
        self.updates += 1
        return self.store.update(keys, values)

    def check(self, block: nn.Module) -> None:
        """Raises QtoolError: the block's attention did not come by."""
        if self.updates != 1:
            raise misfit(block, f"updated its KV cache {self.updates} times instead of once")


def run_block(
    block: nn.Module,
    x: Tensor,
    arguments: Mapping[str, Any],
    store: KVStore | None,
    hand: Callable[[Sequence[Any]], None] | None = None,
) -> Tensor:
    """A decoder block's output, [S, T, H].

    Args:
        block: with its weights.
        x: [S, T, H].
        arguments: what it takes beside, by name.
        store: what keys and values go through; None: nothing.
        hand: takes all that it returns, where a later block wants more of that than hidden states.

    Raises:
        QtoolError: the block did not use what it was given.
    """
    name = cache_argument(type(block))
    if store and name is None:
        raise misfit(block, f"takes no cache by any of the names {', '.join(CACHE_NAMES)}")
    handed = Handed(store) if store else None
    output = block(x, **{**arguments, **({name: handed} if name else {})})
    first: Tensor = output[0] if isinstance(output, tuple) else output
    if hand:
        hand(output)
    if handed:
        handed.check(block)
    if first.shape != x.shape:
        raise misfit(block, f"made {list(first.shape)} of hidden states {list(x.shape)}")
    return first


def assign(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Gives a module built on the meta device its tensors.

    Raises:
        QtoolError: it wants others, or more.
    """
    try:
        unexpected = module.load_state_dict(state, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:
        raise misfit(module, f"refuses its weights: {one_line(error)}") from error
    tensors = chain(module.named_parameters(), module.named_buffers())
    missing = [name for name, tensor in tensors if tensor.is_meta]
    if unexpected or missing:
        raise misfit(module, f"lacks weights ({', '.join(missing[:3])}) or wants none of {', '.join(unexpected[:3])}")


class Calls:
    """Counts how often hooks ran."""

    def __init__(self) -> None:
        self.seen: list[str] = []  # appending is safe among threads

    def counted(self, name: str, hook: Callable[..., Any]) -> Callable[..., Any]:
        """A hook that is counted under a name."""

        def call(*args: Any) -> Any:
            self.seen.append(name)
            return hook(*args)

        return call

    def check(self, block: nn.Module, names: Iterable[str], times: int | None) -> None:
        """Raises QtoolError: a hook did not run as often as it should have.

        Args:
            block: that the hooks are in.
            names: of the hooks that have to run.
            times: how often; None: at least once.
        """
        counts = Counter(self.seen)
        for name in names:
            if not counts[name] or times not in (None, counts[name]):
                raise misfit(block, f"ran {name} {counts[name]} times instead of {times or 'at least once'}")


def check_tokens(block: nn.Module, name: str, found: int, wanted: int) -> None:
    """Raises QtoolError: a layer that reads every token was not shown all of them."""
    if found != wanted:
        raise misfit(block, f"showed {name} {found} tokens instead of {wanted}")
