"""Processes of one run that torchrun or `--jobs` started: this one finds the others, and only the first one speaks.

Nothing else reads what torchrun puts into the environment.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import TYPE_CHECKING, Any

from qtool import limits

if TYPE_CHECKING:
    from qtool.numerics.threads.ranks import Ranks

DEVICES = "CUDA_VISIBLE_DEVICES"
OTHERS: list[subprocess.Popen[bytes]] = []
"""Processes that this one started."""
LAST = 60
"""Seconds that others get to end, when all is done, and this one to tidy up, when it has to end."""
GRACE = 2
"""Seconds in which a process hears a signal, or notices that another one is gone, unless it waits for that one."""


def launched() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextmanager
def started(jobs: int) -> Iterator[None]:
    """Runs the very command of this process in others too, as torchrun would; this one is the first of them.

    Args:
        jobs: how many there are then. They share the cores.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(jobs)}
    os.environ.update(place, RANK="0", LOCAL_RANK="0")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, limits.cores() // jobs)))
    command, nothing = [sys.executable, *sys.orig_argv[1:]], subprocess.DEVNULL
    for rank in map(str, range(1, jobs)):
        mine = os.environ | {"RANK": rank, "LOCAL_RANK": rank}
        OTHERS.append(subprocess.Popen(command, env=mine, stdin=nothing, stdout=nothing))
    try:
        yield
        with suppress(subprocess.TimeoutExpired):
            for process in OTHERS:
                process.wait(LAST)
    finally:
        stop()


def stop() -> None:
    """Ends the processes that this one started."""
    while OTHERS:
        process = OTHERS.pop()
        process.kill()
        process.wait()


@contextmanager
def joined() -> Iterator[Ranks]:
    """All processes of the run; those behind the first print nothing meanwhile.

    Each sees one CUDA device, so that "cuda" is its own in every thread.

    Raises:
        ProcessError: they do not find each other.
    """
    own, seen = os.environ.get("LOCAL_RANK", "0"), os.environ.get(DEVICES)
    devices = seen.split(",") if seen else []
    os.environ[DEVICES] = devices[int(own)] if int(own) < len(devices) else "" if seen else own
    from qtool.numerics.threads.ranks import join

    rank = int(os.environ["RANK"])
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        if rank == 0:
            yield join(rank, launched())
        else:
            with redirect_stdout(nowhere), redirect_stderr(nowhere):
                yield join(rank, launched())


@contextmanager
def watched(heard: threading.Event, ended: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Notices for a process that it has to end where it waits on a device for one that is gone, and hears nothing.

    Args:
        heard: set when the interpreter has got a signal, and tidies up.
        ended: told of the signal if it has not, or does not come to an end.
    """
    near, far = socket.socketpair()
    far.setblocking(False)
    before, over = signal.set_wakeup_fd(far.fileno(), warn_on_full_buffer=False), threading.Event()
    threading.Thread(target=_watch, args=(near, heard, over, ended), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        far.close()


def _watch(
    near: socket.socket, heard: threading.Event, over: threading.Event, ended: Callable[[signal.Signals], None]
) -> None:
    """What `watched` does beside all else."""
    near.settimeout(1)
    alone = 0
    while not over.is_set():
        try:
            numbers = near.recv(64)
        except TimeoutError:
            numbers = b""
            alone += any(process.poll() for process in [*OTHERS])
        if alone > GRACE:  # torchrun would send it
            alone = -LAST
            os.kill(os.getpid(), signal.SIGTERM)
        for number in numbers:
            if not (heard.wait(GRACE) and over.wait(LAST)) and not over.is_set():
                ended(signal.Signals(number))
    near.close()


def of(context: Any) -> Ranks:
    """The processes of a command: those in its context, or this one alone."""
    from qtool.numerics.threads.ranks import ALONE

    found: Ranks = context.obj or ALONE
    return found


def end(code: int) -> None:
    """Ends a process whose run has failed at once: others are gone, and libraries would wait for them."""
    stop()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(code)
