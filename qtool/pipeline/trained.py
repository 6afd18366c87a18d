"""Plain models whose weights training left on a grid: they are taken over where the wanted format has their values.

A model that was trained with ternary weights, or with two bits, has nothing to spare: rounded to another grid it is
destroyed, however good that grid is for other models. So its values are looked at, not what its files say of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qtool.checkpoint._base import Checkpoint, QuantizedCheckpoint
from qtool.formats._base import Format, Quantized
from qtool.formats.biased import Biased
from qtool.formats.int import Int
from qtool.numerics.grids import phases
from qtool.numerics.grids.trained import multiples
from qtool.numerics.threads.ranks import ALONE, Ranks
from qtool.plan import LayerPlan, Plan
from qtool.residuals._base import Residual
from qtool.residuals.phases import Phases

HOLDERS = "tq1_0 and tq2_0 hold ternary rows, int3 any such grid, biased2 two bits"
PROBED = 4
"""Rows that are looked at first, and that plans look at."""
VALUES = 1024
"""Of each half that are looked at where rows are short: enough to tell plain numbers from sums of units."""

PLAIN = WeakKeyDictionary[Checkpoint, set[str]]()
"""Modules that are on no grid, by the look of a plan: a run, which would begin with the same rows, asks no more."""


def trained_grid(checkpoint: Checkpoint, module: str, probe: bool = False) -> tuple[Quantized, ...]:
    """A matrix as codes of formats that have its values; none if it is on no grid.

    Args:
        checkpoint: has the matrix as plain numbers.
        module: its name.
        probe: only the first rows.
    """
    name = f"{module}.weight"
    info = checkpoint.info(name)
    if not info.dtype.is_floating_point:
        return ()
    found = forms(checkpoint.rows(name, 0, min(PROBED, info.shape[0])))
    return found if probe or not found else forms(checkpoint.tensor(name))


def forms(w: Tensor) -> tuple[Quantized, ...]:
    """The same of a matrix, [N, K] in the type that it is stored in."""
    if (found := multiples(w)) is None:
        return ()
    codes, scale = found
    columns = w.shape[1] // scale.shape[1]
    group: int | Literal["channel"] = columns if scale.shape[1] > 1 else "channel"
    result = [q for q in (integers(codes, scale, bits, group) for bits in (2, 3)) if q][:1]
    if bool((codes.abs() % 2 == 1).all()):
        between = Biased(bits=2, group=group, scale_dtype="fp32")
        odd = {"scale": 2 * scale, "offset": -3 * scale}
        result.insert(0, Quantized(((codes + 3) // 2).to(torch.uint8), odd, between))
    return tuple(result)


def integers(codes: Tensor, scale: Tensor, bits: int, group: int | Literal["channel"]) -> Quantized | None:
    """Multiples as integers of so many bits, with negative scales if that helps; None if they are no such integers."""
    fmt = Int(bits=bits, group=group, scale_dtype="fp32")
    for sign in (1, -1):
        low, high = (int(end) for end in (sign * codes).aminmax())
        if fmt.lowest <= low and high < -fmt.lowest:
            return Quantized((sign * codes - fmt.lowest).to(torch.uint8), {"scale": sign * scale}, fmt)
    return None


def trained_phases(checkpoint: Checkpoint, module: str, probe: bool = False) -> int:
    """How many units of 1, i, -1, -i a matrix is a sum of, if it is (see `phases`); 0: it is none."""
    name = f"{module}.weight"
    info = checkpoint.info(name)
    n, k = info.shape
    if not info.dtype.is_floating_point or n % 2 or k % 2:
        return 0
    starts, count, spacing = (0, n // 2), min(max(PROBED, VALUES // k), n // 2), torch.finfo(info.dtype).eps
    some = torch.cat([checkpoint.rows(name, start, start + count).float() for start in starts])
    for terms in range(1, phases.MOST + 1) if phases.may_be(some, phases.MOST, spacing) else ():
        if phases.may_be(some, terms, spacing) and phases.recognized(some, terms):
            return terms if probe or phases.recognized(checkpoint.tensor(name).float(), terms) else 0
    return 0


def units_off(terms: int, residuals: Sequence[Residual]) -> str | None:
    """Why corrections do not say all of a matrix that is a sum of so many units; None if they do."""
    said = any(isinstance(residual, Phases) and residual.terms == terms for residual in residuals)
    return None if said else f"only codeless with the residual phases, terms: {terms}, holds it"


def units(terms: int) -> str:
    """What grid that is, in words."""
    return f"sums of {terms} {'unit' if terms == 1 else 'units'} of 1, i, -1, -i"


def held(wanted: Format, found: Sequence[Quantized]) -> Quantized | str:
    """The same values in a wanted format, or why it does not have them. At least one form is given."""
    reason = ""
    for form in found:
        same = wanted.hold(form)
        if not isinstance(same, str):
            return same
        reason = reason or same
    return reason


def described(found: Sequence[Quantized]) -> str:
    """What grid it is, in words: "3 levels, a scale per row"."""
    codes, columns = found[0].codes, found[0].format.group_columns
    levels = int(codes.max()) - int(codes.min()) + 1
    return f"{levels} levels, a scale per {f'{columns} columns' if columns else 'row'}"


def trained_lines(plan: Plan, checkpoint: Checkpoint, ranks: Ranks = ALONE) -> list[str]:
    """What is to be said about a plan for a model with such weights; one line for each grid and format.

    Args:
        plan: of all matrices.
        checkpoint: the model.
        ranks: who looks at others.
    """
    quantized = checkpoint.layers if isinstance(checkpoint, QuantizedCheckpoint) else {}
    names, lines = set(checkpoint.names()), defaultdict[str, int](int)
    plain = [p for p in plan.layers if p.format and p.module.name not in quantized]
    asked = [p for p in plain if f"{p.module.name}.weight" in names]
    shares = ranks.gather([trained_line(plan, checkpoint, p) for p in asked[ranks.share(len(asked))]])
    for i, p in enumerate(asked):
        if text := shares[i % ranks.size][i // ranks.size]:
            lines[text] += 1
        else:
            PLAIN.setdefault(checkpoint, set()).add(p.module.name)
    return [f"{count} {'matrix is' if count == 1 else 'matrices are'} {text}" for text, count in lines.items()]


def trained_line(plan: Plan, checkpoint: Checkpoint, p: LayerPlan) -> str | None:
    """What is to be said about one matrix; None if it is on no grid."""
    assert p.format is not None
    moved = "transforms move them off it" if plan.recipe.transforms else None
    if found := trained_grid(checkpoint, p.module.name, probe=True):
        same = moved or held(p.format, found)
        on = f"on a grid that training left ({described(found)})"
        return line(on, p.format.label, f"{same}; {HOLDERS}" if isinstance(same, str) else None)
    if terms := trained_phases(checkpoint, p.module.name, probe=True):
        off = moved or units_off(terms, p.residuals)
        return line(f"on a grid that training left ({units(terms)})", p.format.label, off)
    return None


def line(on: str, label: str, reason: str | None) -> str:
    """What becomes of matrices on a grid."""
    if reason is None:
        return f"{on} and taken over as {label} wherever that is exact"
    return f"{on} and rounded again to {label}, which they do not survive: {reason}"
