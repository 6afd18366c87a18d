"""What config.json and quantize_config.json say about a GPTQ checkpoint, written and read."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field

from qtool import __version__
from qtool.artifact._integers import integers
from qtool.artifact._settings import Settings, read_settings
from qtool.artifact._targets import patterns
from qtool.checkpoint._base import Layer, QuantizedCheckpoint
from qtool.checkpoint.modules import modules
from qtool.errors import CheckpointError

Scheme = tuple[int, int, bool]
"""Bits, columns of a group (-1: all), and whether there are no zero points."""


def settings(model: QuantizedCheckpoint) -> dict[str, Any]:
    """The configuration of a model, all of whose formats are integers."""
    members: dict[Scheme, list[str]] = defaultdict(list)
    for module, layer in model.layers.items():
        members[_scheme(layer)].append(module)
    bits, group_size, sym = Counter({s: len(names) for s, names in members.items()}).most_common(1)[0][0]
    version = checkpoint_format(model.layers.values())
    return {
        "quant_method": "gptq",
        "method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "desc_act": False,
        "lm_head": model.family.head in model.layers,
        "checkpoint_format": version,
        "format": version,
        "pack_dtype": "int32",
        "dynamic": _dynamic(model, members, (bits, group_size, sym)),
        "meta": {"quantizer": [f"qtool:{__version__}"]},
    }


def checkpoint_format(layers: Iterable[Layer]) -> str:
    """How zero points are stored; symmetric codes have the older way, which more readers know."""
    return "gptq" if all(_scheme(layer)[2] for layer in layers) else "gptq_v2"


def _scheme(layer: Layer) -> Scheme:
    fmt = integers(layer.format)
    assert fmt is not None
    return fmt.bits, fmt.group_columns or -1, fmt.symmetric


def _dynamic(model: QuantizedCheckpoint, members: Mapping[Scheme, list[str]], base: Scheme) -> dict[str, Any]:
    """What differs from the rest: `-:` is not quantized, `+:` otherwise. The output layer has a switch of its own."""
    linears = [m.name for m in modules(model) if m.kind != "embedding" and m.name != model.family.head]
    kept = [name for name in linears if name not in model.layers]
    found: dict[str, Any] = {f"-:{pattern}": {} for pattern in patterns(kept, model, merged=True)}
    for scheme, names in members.items():
        keys = dict(zip(("bits", "group_size", "sym"), scheme, strict=True))
        if scheme != base:
            found |= {f"+:{pattern}": keys for pattern in patterns(names, model, merged=True)}
    return found


class _Override(Settings):
    """What an entry of `dynamic` changes."""

    bits: Literal[2, 3, 4, 8] | None = None
    group_size: int | None = None
    sym: bool | None = None


class _GPTQSettings(_Override):
    """The configuration, as far as it says how to read the tensors."""

    bits: Literal[2, 3, 4, 8]
    group_size: int
    sym: bool = True
    desc_act: bool = False
    dynamic: dict[str, Any] | None = None
    checkpoint_format: str | None = None
    format: str | None = None
    pack_dtype: Literal["int32"] = Field("int32")


class ModulePacking:
    """How each module is packed.

    Args:
        how: the configuration.
        where: the file, for messages.

    Attributes:
        less: what zero points are stored minus.
        desc_act: whether columns were quantized in the order of their activations.

    Raises:
        CheckpointError: it says something that qtool does not understand.
    """

    def __init__(self, how: Mapping[str, Any], where: str) -> None:
        self._base = read_settings(_GPTQSettings, how, where)
        version = self._base.checkpoint_format or self._base.format or "gptq"
        if version not in ("gptq", "gptq_v2"):
            raise CheckpointError(f"{where}: checkpoint_format", wanted="gptq or gptq_v2", found=repr(version)[:60])
        self.less = 1 if version == "gptq" else 0
        self.desc_act = self._base.desc_act
        self._overrides: list[tuple[re.Pattern[str], _Override]] = []
        for key, value in (self._base.dynamic or {}).items():
            if not key.startswith("-:"):
                place = f"{where}: dynamic: {key[:60]}"
                override = read_settings(_Override, value if isinstance(value, dict) else {"": value}, place)
                self._overrides.append((_compiled(key.removeprefix("+:"), place), override))

    def scheme(self, module: str) -> Scheme:
        """The first entry of `dynamic` that matches decides what it says."""
        base = self._base
        found = next((override for pattern, override in self._overrides if pattern.match(module)), _Override())
        return (
            found.bits or base.bits,
            base.group_size if found.group_size is None else found.group_size,
            base.sym if found.sym is None else found.sym,
        )


def _compiled(pattern: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise CheckpointError(f"{where}: no regular expression", found=error) from error
