"""What families need to speak of GGUF files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from qtool.checkpoint.families._biases import READ, WANTED
from qtool.checkpoint.families._scales import SCALED
from qtool.errors import CheckpointError


def unchanged(x: Tensor) -> Tensor:
    """x."""
    return x


@dataclass(frozen=True)
class Form:
    """How GGUF stores a tensor that it stores otherwise than checkpoints do, always in float32.

    Attributes:
        shape: there.
        write: what becomes of the numbers.
        read: the way back, in float32 up to rounding.
    """

    shape: tuple[int, ...]
    write: Callable[[Tensor], Tensor] = unchanged
    read: Callable[[Tensor], Tensor] = unchanged

    @property
    def rounds(self) -> bool:
        """Whether numbers come back up to rounding only."""
        return self.write is not unchanged

    def check(self, shape: tuple[int, ...], where: str) -> None:
        """Raises CheckpointError: it is stored in another shape."""
        if math.prod(shape) != math.prod(self.shape):
            raise CheckpointError(where, wanted=list(self.shape), found=list(shape))


@cache
def name_map(architecture: str, blocks: int) -> Any:
    """The gguf package's names of the tensors of an architecture. Raises CheckpointError: it does not know that one."""
    import gguf

    arch = next((arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        raise CheckpointError(f"the gguf package is too old for {architecture}", hint="pip install -U gguf")
    return gguf.get_tensor_name_map(arch, blocks)


def positive(metadata: dict[str, Any], key: str) -> int:
    """A count among a GGUF file's key-values, 1 if there is none; some files repeat it for every block."""
    value = metadata.get(key)
    value = value[0] if isinstance(value, list) and value else value
    return value if type(value) is int and value > 0 else 1


def kind_of(name: str) -> str:
    """What GGUF calls a tensor, below its block: "attn_q" of "blk.3.attn_q.bias"."""
    parts = name.split(".")
    return ".".join(parts[2:-1] if parts[0] == "blk" else parts[:-1])


def check_biases(arch: str, names: Mapping[str, str]) -> None:
    """Raises CheckpointError: a model has a bias that llama.cpp does not add, or lacks one that it wants.

    Args:
        arch: what llama.cpp calls it; of others nothing is known.
        names: in checkpoints -> in GGUF.
    """
    read = READ.get(arch)
    for here, there in names.items():
        if read is not None and there.endswith(".bias") and kind_of(there) not in read.split():
            what = f"llama.cpp adds no bias of {kind_of(there)} in {arch} models"
            raise CheckpointError(what, wanted=f"biases of {read or 'nothing'} at most", found=here)
    held = {there for there in names.values() if there.endswith(".bias")}
    for here, there in names.items():
        alone = there.endswith(".weight") and there.removesuffix("weight") + "bias" not in held
        if alone and kind_of(there) in WANTED.get(arch, "").split():
            what = f"llama.cpp wants a bias of {kind_of(there)} in {arch} models"
            raise CheckpointError(what, found=f"{here} alone")


def scales_applied(arch: str, there: str) -> bool:
    """Whether llama.cpp multiplies a matrix with a scale that is a tensor of its own; what nobody asked, it may.

    Args:
        arch: what it calls the architecture.
        there: what GGUF calls the matrix.
    """
    return arch not in SCALED or kind_of(there) in SCALED[arch].split()


def some_slide(config: Mapping[str, Any], blocks: int, first: int = 28) -> bool:
    """Whether attention slides in some block of a model that has a window.

    Args:
        config: config.json, of which `layer_types` counts before `max_window_layers`.
        blocks: how many there are.
        first: the first one that slides where config.json says neither.
    """
    if isinstance(kinds := config.get("layer_types"), list):
        return "sliding_attention" in kinds
    stated = config.get("max_window_layers")
    return blocks > int(first if stated is None else stated)


def check_fixed(arch: str, config: dict[str, Any], fixed: dict[str, Any]) -> None:
    """Raises CheckpointError: a field of config.json is there and not what llama.cpp takes for granted."""
    for field, wanted in fixed.items():
        if (found := config.get(field)) is not None and found != wanted:
            what = f"llama.cpp computes {arch} models with one {field} only"
            raise CheckpointError(what, wanted=f"{wanted!r:.80}", found=f"{found!r:.80}")
