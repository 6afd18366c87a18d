"""Operations on inputs in the neutral checkpoint: plain fields in the manifest, tensors beside the codes.

docs/neutral-checkpoint.md is the specification.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from qtool import registry
from qtool.checkpoint.safetensors_io import SafetensorsFile
from qtool.errors import CheckpointError
from qtool.ops._base import InputOp


def op_prefix(i: int) -> str:
    """What names of an operation's tensors begin with, below the module."""
    return f"input_op.{i}."


def dump_ops(ops: Sequence[InputOp]) -> tuple[dict[str, Any], ...]:
    """What the manifest says of them: {name: plain fields} each."""
    return tuple({op.name(): op.data()[0]} for op in ops)


def op_tensors(ops: Sequence[InputOp]) -> dict[str, Tensor]:
    """Their tensors, by name below the module."""
    return {f"{op_prefix(i)}{name}": t.contiguous() for i, op in enumerate(ops) for name, t in op.data()[1].items()}


def read_ops(listed: Sequence[Mapping[str, Any]], file: SafetensorsFile, module: str, k: int) -> tuple[InputOp, ...]:
    """The operations on the input of a module with k columns.

    Args:
        listed: what the manifest says.
        file: holds their tensors.
        module: its name.
        k: K.

    Raises:
        CheckpointError: no such operation, or its tensors do not fit.
    """
    found = []
    for i, entry in enumerate(listed):
        if len(entry) != 1 or (name := next(iter(entry))) not in registry.names("ops"):
            wanted = f"one of {', '.join(registry.names('ops'))}"
            raise CheckpointError(f"{file.path}: input_ops of {module}", wanted=wanted, found=f"{dict(entry)!r:.60}")
        prefix = f"{module}.{op_prefix(i)}"
        tensors = {key.removeprefix(prefix): file.read(key) for key in file.entries if key.startswith(prefix)}
        op: InputOp = registry.load("ops", name).load(entry[name], tensors)
        if op.width != k:
            raise CheckpointError(f"{file.path}: {name} of {module}", wanted=f"{k} channels", found=op.width)
        found.append(op)
    return tuple(found)
