"""Units are saved one after the other, on a thread where another device computes."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from qtool.errors import StorageError
from qtool.pipeline.saving import Saving


@pytest.mark.parametrize(("device", "here"), [("cpu", True), ("cuda", False)])
def test_everything_is_saved_in_order_when_the_context_is_left(device: str, here: bool) -> None:
    saved: list[int] = []
    threads: set[bool] = set()

    def store(i: int) -> int:
        threads.add(threading.current_thread() is threading.main_thread())
        time.sleep(0.01 * (9 - i))  # so that later ones are stored first, where threads do it
        return i

    def save(i: int) -> None:
        saved.append(i)
        threads.add(threading.current_thread() is threading.main_thread())

    with Saving(torch.device(device)) as saving:
        for i in range(9):
            saving(lambda i=i: store(i), save)
    assert saved == list(range(9))
    assert threads == {here}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("more", [False, True])
def test_what_a_save_raises_ends_the_run(device: str, more: bool) -> None:
    def fail() -> None:
        raise StorageError("the disk is full")

    saved: list[int] = []
    with pytest.raises(StorageError, match="the disk is full"), Saving(torch.device(device)) as saving:
        saving(fail, saved.append)
        if more:
            saving(lambda: 1, saved.append)
    assert not saved


def test_an_error_of_the_run_itself_is_not_hidden_by_one_of_a_save() -> None:
    def fail() -> None:
        raise StorageError("the disk is full")

    with pytest.raises(ValueError, match="solving"), Saving(torch.device("cuda")) as saving:
        saving(fail, print)
        raise ValueError("solving")
