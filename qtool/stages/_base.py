"""What a stage is: it looks at the whole quantized model, behind the last block, and moves some of its numbers.

A stage may replace parameters of quantized matrices (scales, offsets), their codes, and tensors that are stored as they
are (norms, biases, kept weights), by others of the same shapes and types, so whatever an artifact could hold before it
can hold afterwards. What it found is stored, so a run that is continued does not search for it again.

Shape letters: S samples, T tokens per sample.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import Checkpoint, QuantizedCheckpoint
from qtool.methods._base import Course
from qtool.plan.layers import LayerPlan, Plan
from qtool.spec import Spec


@dataclass(frozen=True)
class StageTask:
    """A quantized model, and what it was made from.

    Attributes:
        original: the model as it was given.
        unrounded: what was rounded: the same, or what transforms made of it. It computes the same.
        model: the quantized model, with what the stages before found.
        plan: that it was quantized by.
        tokens: the calibration's, int64 [S, T]; None if the stage asks for none.
        device, dtype: where models run, and in which type.
        progress: told how many of how many steps are done, and what there is to say about the last one.
    """

    original: Checkpoint
    unrounded: Checkpoint
    model: QuantizedCheckpoint
    plan: Plan
    tokens: Tensor | None
    device: torch.device
    dtype: torch.dtype
    progress: Callable[[int, int, str], None]

    @property
    def layers(self) -> tuple[LayerPlan, ...]:
        """Plans of the quantized matrices, in the model's order."""
        return tuple(p for p in self.plan.layers if p.module.name in self.model.layers)

    @property
    def seed(self) -> int:
        """For what is drawn at random."""
        return self.plan.recipe.calibration.seed

    def walker(self, model: Checkpoint) -> Walker:
        """What runs one of the models block by block; a quantized one rounds inputs and KV cache as a runtime does."""
        return Walker(model, self.device, self.dtype, self.plan.recipe.calibration.experts == "all")


@dataclass(frozen=True)
class StageResult:
    """What a stage found.

    Attributes:
        params: parameters to replace, by module and name, and codes as "codes"; those that are missing stay.
        tensors: tensors that are stored as they are, to replace, by name.
        about: numbers and words for the report.
        course: of a training, epoch by epoch.
    """

    params: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    about: Mapping[str, float | str] = field(default_factory=dict)
    course: Course = ()


class Stage(Spec):
    """Finishes a quantized model. The fields of a subclass are its options in a recipe."""

    room: ClassVar[str] = "stages"

    @property
    def needs_tokens(self) -> bool:
        """Whether it wants the calibration's tokens."""
        return True

    def misfit(self, plan: Plan) -> str | None:
        """Why it has nothing to work on in a model that is quantized by this plan, with what would; None if it has."""
        return None

    @abstractmethod
    def run(self, task: StageTask) -> StageResult:
        """Finds what to replace. Equal tasks give equal results."""
