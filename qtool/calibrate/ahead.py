"""Reads the weights of the next block while the present one is at work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


class Ahead:
    """Weights of blocks; on CUDA devices, where processor and bus are idle meanwhile, those of the next one are begun.

    Args:
        read: gives the weights of a block, on the device.
        blocks: how many there are.
        device: where they go.
    """

    def __init__(self, read: Callable[[int], Weights], blocks: int, device: torch.device) -> None:
        self.read, self.blocks, self.active = read, blocks, device.type == "cuda"
        self.lane = ThreadPoolExecutor(1, "qtool")  # whose thread is started by the first work
        there = self.active and torch.cuda.is_available()
        self.stream = torch.cuda.Stream(device) if there else None  # type: ignore[no-untyped-call]
        """So that copies wait for nothing that is computed."""
        self.last: tuple[int, Weights] = (-1, {})
        self.next: tuple[int, Future[Weights] | None] = (-1, None)

    def take(self, i: int) -> Weights:
        """Those of block i; whoever asks shares them with whoever asks again, so they are not to be written to."""
        if not self.active:
            return self.read(i)
        if self.last[0] != i:
            self.last = (-1, {})
            index, begun = self.next
            self.last = i, self._arrived(begun.result()) if begun and index == i else self.read(i)
            self.next = i + 1, self.lane.submit(self._begin, i + 1) if i + 1 < self.blocks else None
        return self.last[1]

    def _begin(self, i: int) -> Weights:
        with torch.cuda.stream(self.stream):
            return self.read(i)

    def _arrived(self, weights: Weights) -> Weights:
        """Weights that the stream in use may read, and keeps from being written over until it has."""
        if self.stream:
            here = torch.cuda.current_stream(self.stream.device)
            here.wait_stream(self.stream)
            for w in (w for w in weights.values() if w.is_cuda):
                w.record_stream(here)
        return weights
