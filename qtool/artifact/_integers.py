"""What layouts of integers share: which formats are integers in disguise, and in which type scales are stored."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qtool.checkpoint._base import Checkpoint
from qtool.errors import PlanError
from qtool.formats._base import Format, Quantized
from qtool.formats._ggml import BlockFormat
from qtool.formats.int import Int


def integers(fmt: Format) -> Int | None:
    """The integers that hold every matrix of a format with the very same values; None: there are none.

    Scales of scales, as K-quants have them, are left out: their products are exact in 32 bits only.
    """
    if isinstance(fmt, Int):
        return fmt
    bits = max(2, fmt.code_bits)
    products = isinstance(fmt, BlockFormat) and fmt.columns != fmt.group_columns
    if bits > 8 or products or fmt.codebook():
        return None
    ints = Int.model_validate({"bits": bits, "group": fmt.group_columns or "channel"})
    return ints if ints.may_hold(fmt) is None else None


def as_integers(quantized: Quantized, module: str, dtype: torch.dtype) -> Quantized:
    """A matrix in the format that `integers` names, with scales in some type.

    Raises:
        PlanError: it is not exact there after all.
    """
    fmt = integers(quantized.format)
    assert fmt is not None
    stored = quantized if fmt is quantized.format else fmt.hold(quantized)
    if isinstance(stored, str):
        raise PlanError([f"{module}: {stored}"], f"integers cannot hold {quantized.format.label} exactly")
    return replace(stored, params=stored.params | {"scale": exact(stored.params["scale"], module, dtype)})


def exact(scale: Tensor, module: str, dtype: torch.dtype, blocks: bool = False) -> Tensor:
    """Scales in another type; `blocks`: of FP8 in blocks of rows. Raises PlanError: they change."""
    cast = scale.to(dtype)
    if not torch.equal(cast.to(scale.dtype), scale):
        names = (str(dtype).removeprefix("torch.") for dtype in (scale.dtype, dtype))
        problem = "{}: scales stored as {} are not exact in {}".format(module, *names)
        other = "export to fp8, whose scales are float32, or " if scale.dtype == torch.float32 and blocks else ""
        hint = f"{other}quantize with `scale_dtype` of the model's own type"
        raise PlanError([f"{problem}; {hint}"], "runtimes load this model, and its scales, in its own type")
    return cast


def model_dtype(model: Checkpoint) -> torch.dtype:
    """The type that runtimes give the model, and its scales with it."""
    name = str(model.config.get("dtype") or model.config.get("torch_dtype"))
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    return known.get(name) or model.info(f"{model.family.embedding}.weight").dtype


def half_dtype(model: Checkpoint) -> torch.dtype:
    """The same for runtimes whose scales have 16 bits."""
    dtype = model_dtype(model)
    return torch.float16 if dtype == torch.float32 else dtype
