"""A small model as a stage sees it."""

from __future__ import annotations

import torch

from qtool.checkpoint.open import open_checkpoint
from qtool.models import open_artifact
from qtool.pipeline.prepare import prepare
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.stages._base import StageTask


def quantized_task(source, recipe, out, shape):
    """What a stage is given behind a run of a recipe without one, with random tokens of that shape."""
    run(QuantizeOptions(str(source), recipe, out, device="cpu", dtype="fp32"))
    original, model = open_checkpoint(str(source)), open_artifact(str(out))
    plan = prepare(str(source), recipe, device="cpu", dtype="fp32").plan
    tokens = torch.randint(3, 500, shape, generator=torch.Generator().manual_seed(4))
    return StageTask(original, original, model, plan, tokens, torch.device("cpu"), torch.float32, lambda *_: None)
