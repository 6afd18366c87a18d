"""`quantization_config` of config.json: which modules are quantized, and how.

Only keys that every compressed-tensors from 0.15 and vLLM's own copy know are written, because readers refuse unknown
ones. Readers disagree on which of two matching targets wins, so no module matches two.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from qtool.artifact.compressed_tensors._layout import PACKED, PLAIN, layout
from qtool.checkpoint._base import Checkpoint, Layer, QuantizedCheckpoint, modules
from qtool.errors import CheckpointError
from qtool.formats._base import Format
from qtool.formats.int import Int

METHOD = "compressed-tensors"
DENSE_ODD_WIDTHS = "0.18.0"
"""The first version that reads 3, 5, 6 and 7 bits packed without gaps."""
OLDEST = "0.15.0"


def quantization_config(model: QuantizedCheckpoint) -> dict[str, Any]:
    """What config.json says about a model all of whose formats are `Int`."""
    members: dict[str, list[str]] = defaultdict(list)
    schemes: dict[str, dict[str, Any]] = {}
    for module, layer in model.layers.items():
        scheme = _scheme(layer)
        key = json.dumps(scheme, sort_keys=True)
        schemes[key] = scheme
        members[key].append(module)
    groups = {}
    for i, (key, scheme) in enumerate(schemes.items()):
        targets = ["Linear"] if len(schemes) == 1 else _patterns(members[key], model)
        groups[f"group_{i}"] = {**scheme, "targets": targets}
    formats = {scheme["format"] for scheme in schemes.values()}
    odd = any(isinstance(x.format, Int) and x.format.bits in (3, 5, 6, 7) for x in model.layers.values())
    asymmetric = not all(scheme["weights"]["symmetric"] for scheme in schemes.values())
    config = {
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "version": DENSE_ODD_WIDTHS if odd else OLDEST,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": groups,
        "ignore": _ignored(model),
    }
    if asymmetric and len(schemes) == 1:
        # transformers (5.23, compressed-tensors 0.20) makes room for unpacked zero points where the file has packed
        # ones, unless it decodes while it loads; then it decodes everything by the first group. vLLM ignores the key.
        config["dequantize"] = True
    return config


def _scheme(layer: Layer) -> dict[str, Any]:
    assert isinstance(layer.format, Int)
    kind = layout(layer)
    return {
        "format": kind,
        "weights": _arguments(layer.format, packed=kind == PACKED),
        "input_activations": None if layer.activations is None else _activation_arguments(layer.activations),
        "output_activations": None,
    }


def _arguments(fmt: Int, packed: bool) -> dict[str, Any]:
    strategy = "group" if fmt.group_columns else str(fmt.group)
    if packed and strategy == "tensor":
        strategy = "channel"  # packed weights have one scale a row at least; they may all be equal
    return {
        "num_bits": fmt.bits,
        "type": "int",
        "symmetric": fmt.symmetric,
        "strategy": strategy,
        "group_size": fmt.group_columns,
        "dynamic": False,
    }


def _activation_arguments(fmt: Format) -> dict[str, Any]:
    assert isinstance(fmt, Int)
    return _arguments(fmt, packed=False) | {"dynamic": True}


def _patterns(members: Collection[str], model: Checkpoint) -> list[str]:
    """Anchored expressions that match these modules and nothing else; one for all blocks that have the same one."""
    before = model.family.block_prefix.split("{i}")[0]
    blocks: dict[str, list[str]] = defaultdict(list)
    patterns = []
    for module in modules(model):
        if module.name in members and module.block is None:
            patterns.append(f"re:^{re.escape(module.name)}$")
        elif module.name in members:
            blocks[module.name.removeprefix(f"{before}{module.block}")].append(str(module.block))
    patterns += [f"re:^{re.escape(before)}(?:{'|'.join(i)}){re.escape(path)}$" for path, i in blocks.items()]
    return sorted(patterns)


def _ignored(model: QuantizedCheckpoint) -> list[str]:
    """Linear modules that stay as they are, a tied output layer among them."""
    linears = [m.name for m in modules(model) if m.kind == "linear"]
    linears += [model.family.head] if model.tied else []
    return [name for name in linears if name not in model.layers]


class _Arguments(BaseModel):
    """Weights or activations of a group, as far as qtool reads them."""

    model_config = ConfigDict(strict=True)

    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str | None = None
    group_size: int | None = None
    dynamic: bool | str = False


class _Group(BaseModel):
    """One entry of `config_groups`."""

    model_config = ConfigDict(strict=True)

    targets: list[str]
    format: str | None = None
    weights: _Arguments
    input_activations: _Arguments | None = None
    output_activations: dict[str, Any] | None = None


class Schemes:
    """The groups of a `quantization_config`, read.

    Args:
        config: its content.
        where: the file, for messages.

    Raises:
        CheckpointError: it says something that qtool does not understand, or cannot do.
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.where = where
        for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
            if config.get(key):
                raise CheckpointError(f"{where}: qtool does not read models with a {key}")
        try:
            groups = dict(config.get("config_groups") or {})
            read = [_Group.model_validate(group) for group in groups.values()]
            self._targets = [(self._pattern(target), group) for group in read for target in group.targets]
        except (ValidationError, TypeError, ValueError, re.error) as error:
            first = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{where}: wrong config_groups", found=first) from error
        self.format = config.get("format")

    @staticmethod
    def _pattern(target: str) -> re.Pattern[str] | None:
        """None for the class of all linear layers."""
        if target == "Linear":
            return None
        return re.compile(target[3:] if target.startswith("re:") else re.escape(target) + r"\Z")

    def layer(self, module: str) -> tuple[str, Layer]:
        """Kind of layout, and formats; scales are taken for bf16. Exact targets win over the class.

        Raises:
            CheckpointError: no group, or one that qtool does not read.
        """
        named = [group for pattern, group in self._targets if pattern and pattern.match(module)]
        found = named + [group for pattern, group in self._targets if pattern is None]
        if not found:
            raise CheckpointError(f"{self.where}: no group of config_groups has {module} as target")
        group = found[0]
        kind = group.format or self.format
        inputs = None if group.input_activations is None else self._activations(group.input_activations, module)
        w = group.weights
        known = kind in (PACKED, PLAIN) and w.type == "int" and 2 <= w.num_bits <= 8 and not w.dynamic
        strategy = w.strategy or ("group" if (w.group_size or 0) > 0 else "tensor")
        if not known or strategy not in ("group", "channel", "tensor") or group.output_activations:
            wanted = f"{PACKED} or {PLAIN} with 2 to 8 bits per group, channel or tensor"
            found_text = f"{kind}, {w.num_bits}-bit {w.type} per {strategy}"
            raise CheckpointError(f"{self.where}: {module}", wanted=wanted, found=found_text)
        size = w.group_size if strategy == "group" else strategy
        return str(kind), Layer(self._int(w, size, module), inputs)

    def _activations(self, a: _Arguments, module: str) -> Int:
        if a.type != "int" or a.num_bits != 8 or a.strategy != "token" or a.dynamic is not True:
            wanted = "inputs of 8-bit integers, scaled per token at run time"
            found = f"{a.num_bits}-bit {a.type} per {a.strategy}, dynamic: {a.dynamic}"
            raise CheckpointError(f"{self.where}: {module}", wanted=wanted, found=found)
        return self._int(a, "token", module)

    def _int(self, arguments: _Arguments, group: int | str | None, module: str) -> Int:
        fields = {"bits": arguments.num_bits, "group": group, "symmetric": arguments.symmetric}
        try:
            return Int.model_validate(fields)
        except ValidationError as error:
            raise CheckpointError(f"{self.where}: {module}: {error.errors()[0]['msg']}", found=group) from error
