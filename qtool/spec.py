"""What recipes name with options: methods, transforms, residuals, stages.

A class says in which room of the registry it is found; its fields are its options.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from pydantic import BaseModel, ConfigDict, model_validator
from typing_extensions import Self

from qtool import registry
from qtool.errors import suggestion
from qtool.problems import Mistakes, checked, mistake, show


class Spec(BaseModel):
    """Something that a recipe names. Instances are immutable, and comparable by their options.

    Attributes:
        room: where the registry finds it.
        wanted: what a mistake says that it should have been.
        shorthand: the option that a list alone is short for; None: there is none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    room: ClassVar[str]
    wanted: ClassVar[str] = "a name, or {NAME: {option: value}}"
    shorthand: ClassVar[str | None] = None

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """Options from the list that is short for one of them."""
        return {cls.shorthand: value} if cls.shorthand and isinstance(value, list | tuple) else value

    @classmethod
    def name(cls) -> str:
        """The name that recipes use."""
        return registry.name_of(cls.room, cls)

    @classmethod
    def of(cls, value: Any, room: str | None = None) -> Self:
        """A thing as recipes spell it: its name, or a mapping from that to its options.

        Args:
            value: what stands in the recipe, or the thing itself.
            room: where the registry finds it, if this class does not say it.

        Raises:
            Mistakes: nothing is spelled like this, or its options are wrong.
        """
        if isinstance(value, cls):
            return value
        room = room or cls.room
        what, options = room.removesuffix("s"), {value: {}} if isinstance(value, str) else value
        if not isinstance(options, Mapping) or len(options) != 1:
            raise mistake(f"no {what}", wanted=cls.wanted, found=show(value))
        ((name, fields),) = options.items()
        if name not in (known := registry.names(room)):
            raise mistake(f"no {what} is called {show(name)}", hint=suggestion(str(name), known))
        try:
            return cast(Self, checked(registry.load(room, name), {} if fields is None else fields))
        except Mistakes as error:
            raise Mistakes([((name, *path), text) for path, text in error.found]) from None

    def spelled(self) -> dict[str, Any]:
        """What `of` reads back: the name, with every option."""
        return {self.name(): self.model_dump(mode="json")}
