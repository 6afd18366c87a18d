"""The format that a rule gives to rows of some length: the one that it names, or the next that divides them."""

from __future__ import annotations

from dataclasses import dataclass

from qtool.formats._base import Format
from qtool.recipe.problems import Mistakes
from qtool.recipe.schema import Rule, parse_format

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


def choose(rule: Rule, wanted: Format, columns: int) -> Choice:
    """The format for rows of so many columns.

    Args:
        rule: whose `fallback` decides what happens to rows that do not fit.
        wanted: its `weights`.
        columns: K.
    """
    misfit = wanted.misfit(columns)
    if misfit is None:
        return Choice(wanted)
    reason = misfit.partition(";")[0]
    if isinstance(rule.fallback, Format):
        if second := rule.fallback.misfit(columns):
            second = f"{wanted.label}: {misfit}; nor does fallback {rule.fallback.label}: {second}"
        return Choice(rule.fallback, fallback=_told(rule.fallback.label, wanted, reason), problem=second)
    if rule.fallback == "error" or wanted.fallback is None:
        advice = "or name a second choice, fallback: FORMAT"
        return Choice(wanted, problem=f"{wanted.label}: {misfit}; {advice}")
    found: Format | str = wanted
    while isinstance(found, Format) and found.misfit(columns):
        assert found.fallback is not None  # chains end in a type that holds rows of any length
        found = _next(found, found.fallback)
    if isinstance(found, Format):
        return Choice(found, fallback=_told(found.label, wanted, reason))
    return Choice(None, found, _told(found, wanted, reason))


def _next(fmt: Format, name: str) -> Format | str:
    """The format of that name, with the options that a format's user chose where it has them too; or a plain type."""
    if name in DTYPES:
        return name
    options = fmt.model_dump(exclude_defaults=True)
    try:
        return parse_format({"type": name, **options})
    except Mistakes:
        return parse_format(name)


def _told(label: str, wanted: Format, reason: str) -> str:
    return f"{label} instead of {wanted.label}: {reason}"
