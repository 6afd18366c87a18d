"""Formats as recipes spell them: a shorthand such as int4-g64, or a mapping with `type:`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, cast

from pydantic import BeforeValidator, PlainSerializer, ValidationError

from qtool import registry
from qtool.errors import suggestion
from qtool.formats._base import Format
from qtool.problems import Mistakes, checked, mistake, show


def parse_format(value: Any) -> Format:
    """`int4-g128`, `q4_0`, or a mapping with `type:` and the format's own fields."""
    if isinstance(value, Format):
        return value
    if isinstance(value, str):
        return _shorthand(value)
    if not isinstance(value, Mapping) or not isinstance(value.get("type"), str):
        wanted = "a format such as int4-g128, or a mapping with type: and the format's fields"
        raise mistake("no format", wanted=wanted, found=show(value))
    name, known = value["type"], registry.names("formats")
    if name not in known:
        raise Mistakes([(("type",), f"no format is called {show(name)}; {suggestion(name, known)}")])
    fields = {key: field for key, field in value.items() if key != "type"}
    return cast(Format, checked(registry.load("formats", name), fields))


def parse_weights(value: Any) -> Format:
    """The same, for weights. Raises Mistakes: no format, or one that only inputs and KV caches can have."""
    fmt = parse_format(value)
    if fmt.granularity == "head":
        raise mistake("no format of weights", wanted="one such as int8-channel", found=fmt.label)
    if fmt.augmented:
        raise mistake("no format of weights", wanted="augment: 0; only inputs have more channels", found=fmt.label)
    if not isinstance(fmt.ranges, str):
        wanted = "minmax or search; percentages are of what calibration saw of inputs and KV caches"
        raise mistake("scales of weights", wanted=wanted, found=fmt.ranges)
    return fmt


def _shorthand(text: str) -> Format:
    """The format that a single word spells: a registered name, or what a family's `parse` accepts."""
    families = {name: registry.load("formats", name) for name in registry.names("formats")}
    if text in families:
        try:
            return cast(Format, families[text]())
        except ValidationError:
            hint = f"write {{type: {text}, ...}} or a shorthand, as in {', '.join(families[text].examples)}"
            raise mistake(f"the format {text} needs options", hint=hint) from None
    for family in families.values():
        if found := checked(family, text, family.parse):
            return cast(Format, found)
    examples = [example for family in families.values() for example in family.examples]
    raise mistake(f"no format is called {show(text)}", hint=suggestion(text, [*families, *examples]))


def dump_format(fmt: Format) -> Any:
    """What `parse_format` reads back as an equal format: the shorthand where it says everything."""
    return fmt.label if type(fmt).parse(fmt.label) == fmt else spelled_out(fmt)


def spelled_out(fmt: Format) -> dict[str, Any]:
    """A format as a mapping with every field."""
    return {"type": registry.name_of("formats", type(fmt)), **fmt.model_dump(mode="json")}


WeightsField = Annotated[Format, BeforeValidator(parse_weights), PlainSerializer(dump_format)]
"""The format of a matrix as a field."""
