"""Where numbers of a model become infinite or NaN: the first layer, in the order of a forward pass, that has some."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qtool.errors import NumericsError
from qtool.numerics.metrics import all_finite
from qtool.stats._base import InputStats


def origin(module: nn.Module, run: Callable[[], object], names: Mapping[str, str]) -> str | None:
    """Runs a module once more: what of it is not finite first; None if everything is.

    Args:
        module: one that no other thread runs.
        run: calls it.
        names: what to call its submodules, by path; others are called by their path.
    """
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if not found and not fine(output):
                found.append(f"the {'outputs' if all(map(fine, inputs)) else 'inputs'} of {name}")

        return look

    for path, inner in module.named_modules():
        if path:
            inner._forward_hooks = OrderedDict(inner._forward_hooks)
            inner.register_forward_hook(hook(names.get(path, path)))
    run()
    return found[0] if found else None


def fine(value: object) -> bool:
    """Whether a value, or what a tuple holds, has no number that is infinite or NaN."""
    if isinstance(value, tuple | list):
        return all(map(fine, value))
    return not isinstance(value, Tensor) or not value.is_floating_point() or all_finite(value)


def finite_statistics(several: Mapping[str, InputStats]) -> None:
    """Makes sure that statistics can be used, with one look at a device for all of them that are there.

    Args:
        several: complete ones, by the name of a layer that reads the input.

    Raises:
        NumericsError: some are infinite or NaN, since the input is, or is so large that its squares are.
    """
    sums = defaultdict[torch.device, list[Tensor]](list)
    found = [
        (name, statistic, tensor)
        for name, stats in several.items()
        for statistic in (stats if stats.tokens else ())
        for tensor in statistic.state().values()
        if tensor.is_floating_point()
    ]
    for _, _, tensor in found:
        sums[tensor.device].append(tensor.sum(dtype=torch.float32))
    if all(bool(torch.stack(here).isfinite().all()) for here in sums.values()):
        return
    for name, statistic, tensor in found:
        if not fine(tensor):  # whose sum may be infinite where no number is
            raise NumericsError(
                f"inputs of {name} are not finite, or too large to be summed up",
                found=(f"a {statistic.name()} of {float(tensor[~tensor.isfinite()][0])}"),
            )
