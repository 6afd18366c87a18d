"""The format that a rule gives to rows of some length: the one that it names, or the next that divides them."""

from __future__ import annotations

from dataclasses import dataclass

from qtool.formats._base import Format
from qtool.formats._spelling import parse_format

DTYPES = ("f32", "f16", "bf16")


@dataclass(frozen=True)
class Choice:
    """What becomes of a layer.

    Attributes:
        format: of its weight; None: kept.
        keep: "source", or the type that a kept weight is cast to.
        fallback: why the format is not the one that the rule names; None if it is.
        problem: why no format fits; None if one does.
    """

    format: Format | None
    keep: str = "source"
    fallback: str | None = None
    problem: str | None = None


def choose(wanted: Format, fallback: Format | str | None, columns: int) -> Choice:
    """The format for rows of so many columns.

    Args:
        wanted: the `weights` of a rule.
        fallback: of the rule, or of the recipe where the rule names none; None: what the format itself says.
        columns: K.
    """
    misfit = wanted.misfit(columns)
    if misfit is None:
        return Choice(wanted)
    found = fallback or _next(wanted)
    if found is None or found == "error":
        otherwise = "or name" if ";" in misfit else "name"
        advice = f"{otherwise} a second choice, fallback: {wanted.fallback or 'FORMAT'}"
        return Choice(wanted, problem=f"{wanted.label}: {misfit}; {advice}")
    reason = misfit.partition(";")[0]
    while isinstance(found, Format) and (second := found.misfit(columns)):
        following = _next(found)
        if following is None:
            return Choice(found, problem=f"{wanted.label}: {misfit}; nor does fallback {found.label}: {second}")
        found = following
    if isinstance(found, Format):
        return Choice(found, fallback=f"{found.label} instead of {wanted.label}: {reason}")
    return Choice(None, found, f"{found} instead of {wanted.label}: {reason}")


def _next(fmt: Format) -> Format | str | None:
    """What the format itself names, with the options that its user chose; or a plain type."""
    if fmt.fallback is None or fmt.fallback in DTYPES:
        return fmt.fallback
    return parse_format({"type": fmt.fallback, **fmt.model_dump(exclude_defaults=True)})
