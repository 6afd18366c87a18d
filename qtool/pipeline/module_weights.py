"""Weights of single modules, read while those before them are solved: a run without data reads as long as it solves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qtool.calibrate.ahead import Ahead, Weights
from qtool.checkpoint._base import Checkpoint, QuantizedCheckpoint
from qtool.numerics.threads.marks import marked
from qtool.pipeline.prepare import Job
from qtool.pipeline.rows import row_parts
from qtool.pipeline.units import steps


class ModulesAhead:
    """Weights of modules as a checkpoint has them, on a device.

    Args:
        checkpoint: where they are.
        modules: names, in the order in which they are asked for.
        device: where they go.
    """

    def __init__(self, checkpoint: Checkpoint, modules: Sequence[str], device: torch.device) -> None:
        self.checkpoint, self.modules, self.device = checkpoint, modules, device
        self.places = {name: i for i, name in enumerate(modules)}
        self.ahead = Ahead(self.read, len(modules), device)

    def of(self, module: str) -> Weights:
        """The weight of a module, [N, K], by its name; not to be written to."""
        with marked("weights read"):
            return self.ahead.take(self.places[module])

    def read(self, i: int) -> dict[str, Tensor]:
        """Reads one, piece by piece."""
        name = self.modules[i]
        info, weight = self.checkpoint.info(f"{name}.weight"), None
        for start, stop in row_parts(info.shape):  # whose memory is used again, and not asked of the system each time
            part = self.checkpoint.rows(f"{name}.weight", start, stop)
            weight = torch.empty(info.shape, dtype=part.dtype, device=self.device) if weight is None else weight
            weight[start:stop] = part
        return {} if weight is None else {name: weight}


def modules_ahead(job: Job) -> ModulesAhead | None:
    """Those of a run without data; None where reading ahead gains nothing, or codes are taken over."""
    if job.device.type != "cuda" or job.ranks.size > 1 or isinstance(job.checkpoint, QuantizedCheckpoint):
        return None
    modules = [p.module.name for unit in steps(job.plan) for plans in unit.inputs().values() for p in plans]
    return ModulesAhead(job.checkpoint, modules, job.device)
