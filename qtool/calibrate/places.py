"""Where batches stop on their way through a block: in front of an input, or of those of several experts at once.

Experts of a block do not read what others of it give. So the inputs of many are measured together, and then all of
these experts are solved, by one process or several; as many as room for their statistics and tokens allows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from qtool.calibrate.experts import Experts, Noted
from qtool.calibrate.hidden import Hidden, device_memory
from qtool.calibrate.steps import InStep
from qtool.checkpoint._base import Module

EXPERTS_LIMIT = 1 << 30
"""Bytes that statistics and tokens of experts which are measured together may take in memory."""
EXPERTS_PART = 16
"""The same on a CUDA device: one in so many of its memory."""

Places = Mapping[str, Mapping[int | None, str]]
"""What is measured at a place, `Module.reads` by expert, None outside of experts; by the place's name, in order."""
Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]


def experts_in(block: nn.Module) -> Experts | None:
    """The experts of a block, if it has some."""
    return next((module for module in block.modules() if isinstance(module, Experts)), None)


def at_a_time(experts: Experts, readers: Collection[Module], hidden: Hidden, visits: int) -> int:
    """How many experts are measured together.

    Args:
        experts: of a block.
        readers: linear layers of theirs.
        hidden: inputs of the block.
        visits: experts that a token visits.
    """
    device = hidden.device
    limit = EXPERTS_LIMIT
    if device.type == "cuda":
        limit = device_memory(device) // EXPERTS_PART
    widths = {(m.role == "down"): m.shape[1] for m in readers}
    tokens = hidden.samples * hidden.length * min(1, visits / len(experts))
    each = sum(4 * k * k for k in widths.values()) + tokens * sum(widths.values()) * hidden.values.dtype.itemsize
    return max(1, min(len(experts), int(limit / each)))


def places_of(readers: Mapping[str, Module], abreast: int | None) -> Places:
    """Where to stop, in the order of the forward pass.

    Args:
        readers: a linear layer that reads each input, by `Module.reads`.
        abreast: experts that are measured together; None: each input alone.
    """
    found: dict[str, dict[int | None, str]] = {}
    for reads, m in readers.items():
        if m.expert is None or abreast is None:
            found[reads] = {None: reads}
        else:
            role = "down" if m.role == "down" else "in"
            found.setdefault(f"{role} {m.expert // abreast * abreast}", {})[m.expert] = reads
    return found


def upcoming(places: Places, passed: Collection[str]) -> Collection[str]:
    """Inputs at the first place that is not passed yet, where batches that start anew stop; none at the end."""
    return next((members.values() for place, members in places.items() if place not in passed), ())


class WaitingExperts:
    """Has experts wait together; see `qtool.calibrate.experts.Meeting`.

    Args:
        flow: of the batches.
        places: where they wait.
    """

    def __init__(self, flow: InStep, places: Places) -> None:
        self.flow, self.places = flow, places

    def wants(self, place: str) -> Collection[Any]:
        """See `Meeting.wants`."""
        return () if place in self.flow.passed else self.places.get(place, ())

    def wait(self, place: str, seen: Mapping[str, Tensor]) -> None:
        """See `Meeting.wait`."""
        self.flow.wait(place, seen)


@contextmanager
def stopping(flow: InStep, places: Places, layers: Mapping[str, tuple[nn.Module, bool]]) -> Iterator[None]:
    """Within the context, batches stop in front of layers.

    Args:
        flow: of the batches.
        places: where they stop.
        layers: that read each input, by `Module.reads`, and whether it is measured before a runtime rounds it.
    """
    with ExitStack() as hooks:
        for place, members in places.items():
            for expert, reads in members.items():
                hook = hook_at(place, reads, expert, flow)
                layer, unrounded = layers[reads]
                hooks.enter_context(layer.register_forward_pre_hook(hook, prepend=unrounded))
        yield


@contextmanager
def meeting(experts: Experts | None, abreast: int | None, together: WaitingExperts) -> Iterator[None]:
    """Within the context, so many experts of a block are run side by side, and wait together."""
    if experts and abreast:
        experts.abreast, experts.meeting = abreast, together
    yield
    if experts:
        experts.abreast, experts.meeting = 1, None


def hook_at(place: str, reads: str, expert: int | None, flow: InStep) -> Hook:
    """A forward pre-hook that hands over a layer's input, then waits until all batches have been measured."""

    def measure(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if place in flow.passed:
            return
        x = inputs[0].flatten(0, -2)
        if expert is not None:
            raise Noted(reads, x)
        flow.wait(place, {reads: x})

    return measure
