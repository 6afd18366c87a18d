"""Tries several transforms, and keeps in every decoder block what is best there: measured, not believed.

    transforms: [{try: [awq, {smooth: {alpha: 0.6}}, [equalize, {hadamard: {block: 32}}]]}]
    transforms: [{try: {by: model, candidates: [rotate, {smooth: {alpha: 0.5}}, {smooth: {alpha: 0.8}}]}}]

Whether a rewrite helps depends on the format and on the model: rotations help MXFP4 and INT4 and hurt NVFP4
(https://arxiv.org/abs/2509.23202, https://arxiv.org/abs/2510.25602). A candidate is a transform, or several that work
one behind the other; what they measure, they measure on most of the calibration's samples. The others judge: each
block, rounded to nearest behind each candidate and as it is, with inputs rounded as planned, is compared with what the
unrounded block makes of the same hidden states. Nothing is a candidate too. What lies behind the last block is left
alone, and hidden states cannot be turned in some blocks only. By model, one candidate is taken everywhere: that whose
rounded model diverges least, so that errors of blocks that add up are looked at together, as SmoothQuant+ does for one
strength (https://arxiv.org/abs/2312.03788).
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, field_validator, model_validator
from typing_extensions import Self

from qtool.ops._base import InputOp
from qtool.spec import Spec
from qtool.stats._base import Statistic
from qtool.stats.channels import Channels
from qtool.transforms._base import Candidates, Kind, Site, Transform


def _several(value: Any) -> Any:
    """One transform as a list of one."""
    return value if isinstance(value, list | tuple) else (value,)


One = Annotated[
    Transform,
    BeforeValidator(Transform.of),
    PlainSerializer(Spec.spelled),
]
Candidate = Annotated[
    tuple[One, ...], Field(min_length=1), BeforeValidator(_several, json_schema_input_type=One | list[One])
]


class Try(Transform):
    """Candidates.

    Attributes:
        candidates: transforms, or lists of transforms; `try: [...]` is short for this alone.
        held_out: share of the calibration's samples that only judge.
        by: what takes a candidate: each block, by its outputs, or the model, by its divergence.
    """

    shorthand: ClassVar[str | None] = "candidates"

    candidates: tuple[Candidate, ...] = Field(min_length=1)
    held_out: float = Field(default=0.25, gt=0, lt=1)
    by: Literal["block", "model"] = "block"

    @field_validator("candidates")
    @classmethod
    def _possible(cls, candidates: tuple[tuple[Transform, ...], ...]) -> tuple[tuple[Transform, ...], ...]:
        for transforms in candidates:
            for i, transform in enumerate(transforms):
                if isinstance(transform, Try):
                    raise ValueError("candidates that are tried inside of candidates: list them here")
                if "input" in transform.kinds and i + 1 < len(transforms):
                    raise ValueError(f"{transform.name()} stays in front of layers: name it last")
        return candidates

    @model_validator(mode="after")
    def _together(self) -> Self:
        for transform in (t for transforms in self.candidates for t in transforms):
            if "stream" in transform.kinds and self.by == "block":
                what = f"{transform.name()} turns the hidden states of all blocks"
                raise ValueError(f"{what}, but candidates are chosen block by block; name other edges, or by: model")
        return self

    @property
    def tried(self) -> Candidates:
        """See `Transform.tried`."""
        return Candidates(self.candidates, self.held_out, self.by)

    @property
    def kinds(self) -> frozenset[Kind]:
        """See `Transform.kinds`."""
        return frozenset().union(*(transform.kinds for transforms in self.candidates for transform in transforms))

    @property
    def needs(self) -> frozenset[type[Statistic]]:
        """What candidates need, and what blocks are rounded by."""
        own = (transform.needs for transforms in self.candidates for transform in transforms)
        return frozenset({Channels}).union(*own)

    def op(self, site: Site) -> InputOp | None:
        """Nothing, before it is decided for which candidate."""
        return None

    def stays(self, width: int) -> InputOp | None:
        """See `Transform.stays`: of the first candidate that leaves one."""
        ops = (transform.stays(width) for transforms in self.candidates for transform in transforms)
        return next((op for op in ops if op), None)

    def misfit(self, kind: Kind, width: int, dim: int) -> str | None:
        """See `Transform.misfit`."""
        several = (t for transforms in self.candidates for t in transforms if kind in t.kinds)
        found = ((t.name(), t.misfit(kind, width, dim)) for t in several)
        return next((f"{name}: {why}" for name, why in found if why), None)
