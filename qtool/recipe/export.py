"""The artifacts that a recipe writes, and their options, which each artifact defines itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from qtool import registry
from qtool.errors import suggestion
from qtool.problems import Keys, explain, mistake, show
from qtool.recipe.strict import Strict


def _check_artifact(name: str) -> str:
    if name not in registry.names("artifact"):
        raise mistake(f"no artifact is called {show(name)}", hint=suggestion(name, registry.names("artifact")))
    return name


class Export(Strict):
    """One artifact to write.

    Attributes:
        to: the artifact's layout.
    """

    model_config = ConfigDict(extra="allow")

    to: Annotated[str, AfterValidator(_check_artifact)]

    @classmethod
    def conflicts(cls, value: Mapping[str, Any]) -> list[tuple[Keys, str]]:
        """Options belong to an artifact, which knows what they mean."""
        name = value.get("to")
        chosen = {key: option for key, option in value.items() if key != "to" and option is not None}
        if not chosen or name not in registry.names("artifact"):
            return []
        own = options_of(name)
        strange = [((key,), _strange(key, name)) for key in chosen if key not in own.model_fields]
        try:
            own.model_validate({key: option for key, option in chosen.items() if key in own.model_fields}, strict=True)
        except ValidationError as error:
            return [*explain(error, own, chosen), *strange]
        return [*strange]

    @property
    def options(self) -> dict[str, Any]:
        """What the artifact's writer is made with."""
        chosen = {key: option for key, option in (self.model_extra or {}).items() if option is not None}
        return options_of(self.to).model_validate(chosen, strict=True).model_dump(exclude_none=True)


def options_of(name: str) -> type[BaseModel]:
    """The options of an artifact."""
    found: type[BaseModel] = registry.load("artifact", name).Options
    return found


def owners(key: str) -> list[str]:
    """The artifacts that have an option."""
    return [name for name in registry.names("artifact") if key in options_of(name).model_fields]


def _strange(key: str, name: str) -> str:
    """What is wrong with an option that an artifact does not have."""
    if others := owners(key):
        return f"an option of {' and '.join(others)}, not of {show(name)}"
    return f"unknown key; {suggestion(key, ['to', *options_of(name).model_fields])}"
