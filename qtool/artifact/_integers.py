"""What layouts of integers share: which formats are integers in disguise, and in which type scales are stored."""

from __future__ import annotations

import torch

from qtool.checkpoint._base import QuantizedCheckpoint
from qtool.errors import PlanError
from qtool.formats._base import Format, Quantized
from qtool.formats._ggml import Classic
from qtool.formats.int import Int


def integers(fmt: Format) -> Int | None:
    """The integer format that holds every matrix of `fmt` with the very same codes and scales; None: there is none."""
    if isinstance(fmt, Int):
        return fmt
    if isinstance(fmt, Classic) and not fmt.offset:
        return Int.model_validate({"bits": fmt.bits, "group": fmt.columns, "scale_dtype": "fp16"})
    return None


def as_integers(quantized: Quantized) -> Quantized:
    """A matrix in the format that `integers` names."""
    fmt = integers(quantized.format)
    assert fmt is not None
    if fmt is quantized.format:
        return quantized
    return Quantized(quantized.codes, {"scale": quantized.params["d"]}, fmt)


def model_dtype(model: QuantizedCheckpoint) -> torch.dtype:
    """The type that runtimes give the model, and its scales with it."""
    name = str(model.config.get("dtype") or model.config.get("torch_dtype"))
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    return known.get(name) or model.info(f"{model.family.embedding}.weight").dtype


def half_dtype(model: QuantizedCheckpoint) -> torch.dtype:
    """The same for runtimes whose scales have 16 bits."""
    dtype = model_dtype(model)
    return torch.float16 if dtype == torch.float32 else dtype


def exact_scales(quantized: Quantized, module: str, dtype: torch.dtype) -> Quantized:
    """Returns a matrix whose scales do not change in `dtype`. Raises PlanError: they do."""
    scale = quantized.params["scale"]
    if not torch.equal(scale.to(dtype).to(scale.dtype), scale):
        name = str(dtype).removeprefix("torch.")
        hint = "quantize with `scale_dtype` of the model's own type"
        problem = (
            f"{module}: scales stored as {str(scale.dtype).removeprefix('torch.')} are not exact in {name}; {hint}"
        )
        raise PlanError([problem], f"runtimes load this model, and its scales, in {name}")
    return quantized
