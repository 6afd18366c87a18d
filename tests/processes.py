"""Two processes that compute together, for tests: started once, given functions as often as wanted."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from typing import Any

import torch
from typing_extensions import Self

from qtool.numerics.threads.ranks import Ranks, join

JOINED: list[Ranks] = []
"""Of this process, if it is one of the two."""


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def _join(rank: int, size: int, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    JOINED.append(join(rank, size))


def _call(work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return work(JOINED[0], *arguments)


class Processes:
    """Processes that have met.

    Args:
        size: how many.
    """

    def __init__(self, size: int) -> None:
        port, self.stack = free_port(), ExitStack()
        self.pools = [
            self.stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"), _join, (rank, size, port)))
            for rank in range(size)
        ]

    def __call__(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `work(ranks, *arguments)` gives in each of them."""
        begun = [pool.submit(_call, work, arguments) for pool in self.pools]
        return [future.result(timeout=400) for future in begun]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()
