"""Parameters of matrices as files hold them: what rows share stands there once, and codes of few bits are packed.

`Format.tight` says of which parameters that is so; all others are stored as they are.

Shape letters: N rows, K columns, G entries of a row, R rows that share an entry.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from qtool.checkpoint._base import TensorInfo
from qtool.checkpoint.safetensors_io import SafetensorsFile
from qtool.errors import CheckpointError
from qtool.formats._base import Format, Params, Quantized
from qtool.numerics.grids.bits import pack, unpack


def tightened(q: Quantized) -> Params:
    """The parameters of a matrix as they are stored."""
    found = dict(q.params)
    for name, (bits, rows) in q.format.tight.items():
        once = found[name][::rows].contiguous()
        found[name] = pack(once, bits) if bits < 8 else once
    return found


def tight_info(fmt: Format, name: str, n: int, entries: int, dtype: torch.dtype) -> TensorInfo:
    """Shape and type of a stored parameter of n rows, each with so many entries of a type."""
    bits, rows = fmt.tight.get(name, (8, 1))
    return TensorInfo((ceil(n / rows), ceil(entries * bits / 8) if bits < 8 else entries), dtype)


def loosened(file: SafetensorsFile, name: str, fmt: Format, start: int, stop: int, k: int) -> Tensor:
    """Rows `start` to `stop` of a stored parameter, [rows, G].

    Args:
        file: which holds it.
        name: of the tensor there; ends with that of the parameter.
        fmt: of the matrix.
        start: first row of it.
        stop: behind the last one.
        k: columns of the matrix.

    Raises:
        CheckpointError: codes of another type.
    """
    bits, rows = fmt.tight.get(name.rpartition(".")[2], (8, 1))
    found = file.read(name, start // rows, ceil(stop / rows))
    if bits < 8:
        if found.dtype != torch.uint8:
            raise CheckpointError(f"{file.path}: {name}", wanted=f"codes of {bits} bits", found=str(found.dtype)[6:])
        found = unpack(found, bits, k // (fmt.group_columns or k))
    if rows == 1:
        return found
    first = start - start // rows * rows
    return found.repeat_interleave(rows, 0)[first : first + stop - start]
