"""How single tensors, weights and inputs of linear layers, take formats: signal over error, and crest factors.

The crest factor of a block is its largest magnitude over its root mean square. Integers are at their best where it is
small, floats where it is large; at which one they are equal is what https://arxiv.org/abs/2510.25602 derives.

Shape letters: N rows, K columns, G blocks of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qtool.calibrate.hidden import Hidden
from qtool.calibrate.inputs import quantize_tokens
from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import Checkpoint
from qtool.formats._base import Format
from qtool.numerics.metrics import energy, ratio_db

STEP = 0.1
"""Width of a bin of crest factors."""


class Pair(NamedTuple):
    """Two formats with as many bits and scales: names, and columns of a block."""

    integer: str
    float: str
    block: int


class Named(NamedTuple):
    """A weight [N, K], or the inputs [T, K] of a layer."""

    kind: str
    role: str
    block: int
    values: Tensor


def measure(
    checkpoint: Checkpoint,
    tokens: Tensor,
    device: torch.device,
    formats: Mapping[str, Mapping[str, Format]],
    pairs: tuple[Pair, ...],
) -> dict[str, Any]:
    """Rounds every weight and every input of the unquantized model in every format.

    Args:
        checkpoint: the model.
        tokens: int64 [S, T], few enough to be run at once.
        device: where.
        formats: by kind ("weight", "input") and name.
        pairs: to be compared by crest factors.

    Returns:
        JSON data. "tensors": of each tensor kind, role, block, decibels by format, and the 75th percentile of the crest
        factors of its blocks of 16 and 32. "crests": by pair and bin, (mean relative squared error of the integers, of
        the floats, blocks).
    """
    records, sums = [], {pair: torch.zeros(math.ceil(pair.block**0.5 / STEP) + 1, 3).double() for pair in pairs}
    for tensor in every(checkpoint, tokens, device):
        x, asked = tensor.values, formats[tensor.kind]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            found = pool.map(partial(error, x, tensor.kind), asked.values())
        errors = dict(zip(asked, found, strict=True))
        decibels = {name: ratio_db(energy(x), float(e.double().sum())) for name, e in errors.items()}
        for pair, total in sums.items():
            total += binned(x, errors[pair.integer], errors[pair.float], pair.block, len(total)).cpu()
        crests = {str(size): float(crest(x, size).flatten().nanquantile(0.75)) for size in (16, 32)}
        place = {"kind": tensor.kind, "role": tensor.role, "block": tensor.block}
        records.append({**place, "decibels": decibels, "crests": crests})
    return {"tensors": records, "crests": {pair.float: means(total) for pair, total in sums.items()}}


def every(checkpoint: Checkpoint, tokens: Tensor, device: torch.device) -> Iterator[Named]:
    """Weights and inputs of all linear layers, block by block; float32."""
    walker = Walker(checkpoint, device, torch.float32)
    hidden = walker.embed(tokens)
    for i in range(len(walker.blocks)):
        block = walker.load_block(i)
        for module in walker.modules[i]:
            yield Named("weight", module.role, i, walker.tensor(f"{module.name}.weight"))
        for reads, x in inputs(walker, block, i, hidden).items():
            yield Named("input", reads.rpartition(".")[2], i, x)


def inputs(walker: Walker, block: nn.Module, i: int, hidden: Hidden) -> dict[str, Tensor]:
    """Advances by block i; returns what its linear layers read, [T, K] by name of the input."""
    found: dict[str, Tensor] = {}

    def keep(reads: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, given: found.update({reads: given[0].flatten(0, -2).clone()})

    readers = {module.reads: module for module in walker.modules[i]}
    hooks = [walker.linear(block, m).register_forward_pre_hook(keep(reads)) for reads, m in readers.items()]
    walker.advance(block, i, hidden)
    for hook in hooks:
        hook.remove()
    return found


def error(x: Tensor, kind: str, fmt: Format) -> Tensor:
    """Squared error of every number, shape of x."""
    return (x - rounded(x, fmt, kind)).square_()


def rounded(x: Tensor, fmt: Format, kind: str) -> Tensor:
    """In a format, inputs as at run time; one scale for all of them is chosen for these very ones."""
    if kind == "input" and not fmt.static:
        return quantize_tokens(x, fmt)
    params = fmt.fit(x)
    return fmt.decode(fmt.snap(x, params), params)


def crest(x: Tensor, block: int) -> Tensor:
    """Largest magnitude over root mean square of every block, [N, G]; NaN for a block of zeros."""
    blocks = x.view(len(x), -1, block)
    return blocks.abs().amax(2) / blocks.square().mean(2).sqrt()


def binned(x: Tensor, integer: Tensor, floating: Tensor, block: int, bins: int) -> Tensor:
    """Sums over the blocks of each bin of crest factors, [bins, 3]: two relative squared errors, and 1.

    Args:
        x: [N, K].
        integer: squared errors of the integers, [N, K].
        floating: of the floats.
        block: columns of a block.
        bins: of width STEP.
    """
    at = crest(x, block).flatten()
    real = at.isfinite()
    signal = x.view(-1, block).square().sum(1)
    shares = [error.view(-1, block).sum(1)[real] / signal[real] for error in (integer, floating)]
    index = (at[real] / STEP).long()
    columns = [torch.bincount(index, share.double(), bins) for share in (*shares, torch.ones_like(shares[0]))]
    return torch.stack(columns, dim=1)


def means(total: Tensor) -> list[list[float]]:
    """Sums of `binned` -> (crest factor in the middle, both mean errors, blocks) of the bins that hold blocks."""
    rows = ((i + 0.5) * STEP for i in range(len(total)))
    return [[at, float(a / n), float(b / n), int(n)] for at, (a, b, n) in zip(rows, total, strict=True) if n]
