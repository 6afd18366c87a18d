"""What recipes name with options: methods, transforms, residuals, stages.

A class says in which room of the registry it is found; its fields are its options.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from qtool import registry


class Spec(BaseModel):
    """Something that a recipe names. Instances are immutable, and comparable by their options.

    Attributes:
        room: where the registry finds it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    room: ClassVar[str]

    @classmethod
    def name(cls) -> str:
        """The name that recipes use."""
        return registry.name_of(cls.room, cls)
