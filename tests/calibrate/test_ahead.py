"""Weights of blocks, read ahead on devices where that costs nothing."""

from __future__ import annotations

import threading

import torch

from qtool.calibrate.ahead import Ahead


class Counted:
    """Reads weights that tell their block, and remembers which were read on which thread."""

    def __init__(self) -> None:
        self.reads: list[tuple[int, bool]] = []

    def __call__(self, i: int) -> dict[str, torch.Tensor]:
        self.reads.append((i, threading.current_thread() is threading.main_thread()))
        return {"w": torch.full((2,), float(i))}


def test_the_next_block_is_read_on_another_thread_and_each_only_once() -> None:
    read = Counted()
    ahead = Ahead(read, 3, torch.device("cuda"))
    found = [float(ahead.take(i)["w"][0]) for i in (0, 0, 1, 1, 2)]
    assert found == [0.0, 0.0, 1.0, 1.0, 2.0]
    assert sorted(read.reads) == [(0, True), (1, False), (2, False)]


def test_blocks_out_of_order_are_read_when_they_are_asked_for() -> None:
    read = Counted()
    ahead = Ahead(read, 5, torch.device("cuda"))
    assert [float(ahead.take(i)["w"][0]) for i in (0, 3, 2)] == [0.0, 3.0, 2.0]


def test_on_the_processor_nothing_is_read_before_it_is_wanted_or_kept() -> None:
    read = Counted()
    ahead = Ahead(read, 3, torch.device("cpu"))
    for i in (0, 0, 1):
        ahead.take(i)
    assert read.reads == [(0, True), (0, True), (1, True)]
