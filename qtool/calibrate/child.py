"""Processes of their own for what comes with a model and may end, hang or exhaust the process that runs it.

A damaged tokenizer can abort the native code that reads it, and a chat template is a program. A child has a limit of
memory; whoever waits for it has one of time.
"""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
import time
from types import TracebackType
from typing import Any

from qtool.errors import CheckpointError

MEMORY = 8 << 30
"""Bytes of address space that a child may have; libraries alone map about one GiB."""

LONGEST = 1 << 26
"""Bytes of an answer."""

PREPARED = """
import sys
del sys.path[0]
import resource
for kind, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_AS, %d)):
    try:
        resource.setrlimit(kind, (most, most))
    except (OSError, ValueError):
        pass
"""
"""What every child does first: nothing is imported from the working directory, and no core is dumped."""


class Child:
    """A Python program that reads lines of JSON and answers each with one; also a context manager, which ends it.

    Args:
        program: its source; runs behind `PREPARED`.
        what: what it does, for errors.
        arguments: its command line.
        memory: bytes of address space that it may have; -1: no limit.
    """

    def __init__(self, program: str, what: str, *arguments: str, memory: int = MEMORY) -> None:
        self.what = what
        command = [sys.executable, "-c", PREPARED % memory + program, *arguments]
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=nowhere)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, question: Any, seconds: float) -> Any:
        """The answer to a question; see `send` and `answer`."""
        self.send(question)
        return self.answer(seconds)

    def send(self, question: Any) -> None:
        """Hands over what goes through JSON. Raises CheckpointError: the child has ended."""
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(question).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None

    def answer(self, seconds: float) -> Any:
        """What the child makes of the question that it was sent.

        Args:
            seconds: to wait.

        Raises:
            CheckpointError: no answer in that time, too long a one, something else, or the child has ended.
        """
        assert self.process.stdout
        answer, end = bytearray(), time.monotonic() + seconds
        while not answer.endswith(b"\n"):
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise CheckpointError(self.what, wanted=f"an end within {seconds:g} seconds", found="none")
            piece = self.process.stdout.read1(1 << 20)  # type: ignore[attr-defined]
            if not piece:
                raise self._ended()
            answer += piece
            if len(answer) > LONGEST:
                raise CheckpointError(self.what, wanted=f"at most {LONGEST} bytes", found="more")
        try:
            return json.loads(answer)
        except ValueError as error:  # such as what a debugger says that native code calls before it aborts
            said = answer.decode(errors="replace")
            raise CheckpointError(self.what, wanted="an answer", found=f"{said.strip()!r:.80}") from error

    def _ended(self) -> CheckpointError:
        code = self.process.wait()
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return CheckpointError(self.what, found=f"the end of the process that did it ({name})")
