"""Logits that a program of somebody else computes, in a process of its own, since native code may abort.

Shape letters: T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qtool.calibrate.child import Child
from qtool.errors import CheckpointError


def logits_apart(
    program: str, what: str, path: Path, tokens: Sequence[int], seconds: float, *more: str
) -> Tensor | str:
    """Runs some tokens: logits, float32 [T, V], or what the program says went wrong.

    Args:
        program: gets Python's search path as JSON, the model's path, that of a .npy file to write, and `more`; answers
            a line of tokens with what went wrong, or nothing.
        what: could not be done, for errors.
        path: the model.
        tokens: T of them.
        seconds: that it may take.
        more: arguments.

    Raises:
        CheckpointError: it ends, or hangs.
    """
    with tempfile.TemporaryDirectory(prefix="qtool-") as folder:
        place = Path(folder) / "logits.npy"
        with Child(program, what, json.dumps(sys.path), str(path), str(place), *more, memory=-1) as child:
            said: str = child.ask(list(tokens), seconds)
        return said or torch.from_numpy(np.load(place, allow_pickle=False))


def folder_logits(reader: str, program: str, path: Path, tokens: Sequence[int], seconds: float) -> Tensor:
    """Runs some tokens of a model in a folder: logits, float32 [T, V].

    Args:
        reader: whose program it is, for errors.
        program: see `logits_apart`.
        path: the folder.
        tokens: T of them.
        seconds: that it may take.

    Raises:
        CheckpointError: it does not load the folder, or ends, or hangs.
    """
    what = f"{reader} cannot run {path}"
    found = logits_apart(program, what, path, tokens, seconds)
    if isinstance(found, str):
        raise CheckpointError(what, found=found)
    return found
