"""Gradients that are asked for over and over with other inputs: a CUDA device replays what it was once told to do.

Small blocks take a device less time than telling it each operation takes. Where a step can be recorded, it is told all
of them at once. What waits for the device on the way, as experts do that look for their tokens, cannot be recorded, and
is run as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

WARM = 3
"""Runs before a recording, in which libraries set up what they keep."""


class Repeated:
    """Calls of a function that leaves gradients in leaves. It is not kept: who owns it may own this as well.

    Args:
        leaves: what it leaves gradients in.
        record: whether it is worth to be recorded.
    """

    def __init__(self, leaves: Sequence[Tensor], record: bool) -> None:
        self.leaves, self.wanted = leaves, record
        self.replay: Callable[[], None] | None = None
        self.held, self.gradients = list[Tensor](), list[Tensor | None]()

    def __call__(self, run: Callable[..., None], *given: Tensor) -> None:
        """Leaves gradients, on these inputs.

        Args:
            run: the same each time, given tensors of the same shapes, and does the same with them. The leaves have no
                gradients when it begins.
            given: what it gets.
        """
        if self.wanted and self.replay is None:
            self.held, self.wanted = [t.clone() for t in given], False
            self.replay = recorded(lambda: run(*self.held), self.leaves, given[0].device)
            self.gradients = [leaf.grad for leaf in self.leaves]
            forget(self.leaves)
        if self.replay is None or [t.shape for t in given] != [t.shape for t in self.held]:
            run(*given)
            return
        for held, new in zip(self.held, given, strict=True):
            held.copy_(new)
        self.replay()
        for leaf, gradient in zip(self.leaves, self.gradients, strict=True):
            leaf.grad = gradient


def recorded(run: Callable[[], None], leaves: Sequence[Tensor], device: torch.device) -> Callable[[], None] | None:
    """What repeats `run` and leaves gradients where the recording did; None: the device cannot record it.

    Args:
        run: reads and writes the same memory each time.
        leaves: what it leaves gradients in.
        device: where it runs.
    """
    if device.type != "cuda":
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            for _ in range(WARM):
                run()
                forget(leaves)
        torch.cuda.current_stream(device).wait_stream(beside)
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:  # something waits for the device; whatever else is wrong shows when it is run as it is
        forget(leaves)
        torch.cuda.synchronize(device)
        return None
    return graph.replay


def forget(leaves: Sequence[Tensor]) -> None:
    """Lets go of gradients."""
    for leaf in leaves:
        leaf.grad = None
