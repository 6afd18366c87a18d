"""Runs a GGUF file in llama.cpp itself, to see what its users will see; see `llama_api`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.calibrate.child import Child
from qtool.errors import CheckpointError
from qtool.evaluate.apart import logits_apart
from qtool.evaluate.llama_api import Runtime, library

TRIAL = """
import json
sys.path[:] = json.loads(sys.argv[1])
from pathlib import Path
import numpy
from qtool.evaluate.llama_api import Runtime
for line in sys.stdin:
    try:
        found = Runtime(Path(sys.argv[2]), 256, int(sys.argv[4])).values(json.loads(line))
        numpy.save(sys.argv[3], found)
        said = ""
    except Exception as error:
        said = str(error)
    print(json.dumps(said), flush=True)
"""
SPEED = """
import json
sys.path[:] = json.loads(sys.argv[1])
from pathlib import Path
from qtool.evaluate.llama_api import Runtime
for line in sys.stdin:
    prompt, written = json.loads(line)
    print(json.dumps(Runtime(Path(sys.argv[2]), prompt + written, int(sys.argv[3])).speed(prompt, written)), flush=True)
"""
PROMPT, WRITTEN = 64, 24
"""Tokens by which speed is measured."""
SECONDS = 600.0
"""To load a model and run some tokens, which reads every weight once."""


def try_file(path: Path, tokens: list[int] | None = None) -> Tensor:
    """Runs a few tokens in another process, since llama.cpp aborts on some of what it does not expect.

    Args:
        path: a GGUF file.
        tokens: up to 256; None: one.

    Returns:
        Logits, float32 [T, V].

    Raises:
        CheckpointError: it does not load the file, or ends, or hangs.
    """
    library()  # says what is wrong with it, rather than with the file
    what = f"llama.cpp cannot run {path}"
    found = logits_apart(TRIAL, what, path, tokens or [0], SECONDS, str(torch.get_num_threads()))
    if isinstance(found, str):
        raise CheckpointError(found)
    return found


class Speed(NamedTuple):
    """Tokens per second: of a prompt that is read at once, and of those that are written one by one."""

    prompt: float
    written: float


def speed_of(path: Path) -> Speed:
    """How fast llama.cpp is with a file, in another process.

    Args:
        path: a GGUF file.

    Raises:
        CheckpointError: it does not load the file, or ends, or hangs.
        MissingExtra: xllamacpp is not installed.
    """
    library()
    arguments = (json.dumps(sys.path), str(path), str(torch.get_num_threads()))
    with Child(SPEED, f"llama.cpp cannot run {path}", *arguments, memory=-1) as child:
        return Speed(*child.ask([PROMPT, WRITTEN], SECONDS))


class LlamaCpp(Runtime):
    """A model loaded in llama.cpp, on the CPU or wherever the library was built to run.

    Args:
        path: a GGUF file.
        n_ctx: most tokens that are run at once.

    Raises:
        CheckpointError: llama.cpp does not load the file; with its own words.
    """

    def __init__(self, path: Path, n_ctx: int) -> None:
        super().__init__(path, n_ctx, torch.get_num_threads())

    def logits(self, tokens: Tensor | list[int]) -> Tensor:
        """float32 [T, V]: what follows each of T tokens from the start of a context; see `values`."""
        return torch.from_numpy(self.values([int(token) for token in tokens]))
