"""MLX checkpoints, which mlx-lm loads on Apple silicon: integers with free offsets, and MXFP4 and MXFP8.

    weight   uint32 [N, K b / 32]    codes along the inputs, low bits first
    scales   [N, K / g]              bf16, fp16 or fp32; for MXFP4 and MXFP8 bytes, the exponents of powers of two
    biases   [N, K / g]              of the same type; not for MXFP4 and MXFP8

    w_hat = scales * code + biases

Integers of 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128 columns; larger groups are split, and offsets take the
place of zero points. Numbers stay what they are: scales keep their type, and go to fp32 where scale times zero point
would not be exact in it. MLX computes in float32 where that type is not the model's. The experts of a block are in one
tensor for gate, up and down each: `switch_mlp`, [experts, N, ...].

What mlx-lm would compute otherwise than transformers (a rotary scaling that it does not know, LongRoPE among them) is
refused. Sliding windows, which it ignores but for Gemma 3, are said, and types that nobody has seen it run.
Layout: https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from qtool.artifact import _mlx_models
from qtool.artifact._base import Carry, Reading
from qtool.artifact._floats import from_bits, to_bits
from qtool.artifact._mlx_models import rope_fields
from qtool.artifact._packed import Infos, PackedCheckpoint, Packing
from qtool.artifact._packed_artifact import Layout, PackedArtifact
from qtool.artifact._settings import SETTINGS, Settings, quantization_config, read_settings
from qtool.artifact._stacks import Stacks, split
from qtool.checkpoint._base import Checkpoint, Layer, Module, QuantizedCheckpoint, TensorInfo
from qtool.checkpoint.safetensors_io import SafetensorsFile
from qtool.errors import CheckpointError, PlanError
from qtool.formats._base import Format, Quantized
from qtool.formats._classic import Classic
from qtool.formats.biased import Biased
from qtool.formats.int import DTYPES, Int
from qtool.formats.mxfp4 import MXFP4
from qtool.formats.mxfp8 import MXFP8
from qtool.numerics.grids.bits import pack_words, unpack_words

BITS, GROUPS = (2, 3, 4, 5, 6, 8), (128, 64, 32)
KEYS = ("quantization", SETTINGS)
"""Of config.json; the second one is a copy for others."""
Target = Biased | MXFP4 | MXFP8


class MLX(PackedArtifact):
    """See the module."""

    fuses: ClassVar[bool] = False
    packs_embeddings: ClassVar[bool] = True
    runtimes: ClassVar[tuple[str, ...]] = ("mlx-lm",)
    library: ClassVar[str | None] = "mlx"
    usage: ClassVar[str] = "`mlx_lm.chat --model FOLDER` chats with it."

    def _refusal(self, module: Module, layer: Layer) -> str | None:
        """See `PackedArtifact._refusal`."""
        if layer.activations is not None:
            return "MLX cannot say how activations are quantized"
        target = _choose(layer.format, module.shape[1])
        wanted = "integers in groups that are multiples of 32 columns, mxfp4 and mxfp8"
        return f"MLX holds {wanted}, not {layer.format.label}" if target is None else None

    def supports(self, model: Checkpoint) -> Carry:
        """See `Artifact.supports`."""
        known = super().supports(model)
        reason = _mlx_models.refusal(model) if known.possible else known.reason
        return Carry(not reason, reason or "")

    def computed(self, model: Checkpoint, module: Module, layer: Layer | None) -> Carry:
        """See `Artifact.computed`."""
        again = layer is not None and model.config["model_type"] in _mlx_models.TAKEN_APART
        if again and module.name.endswith(".kv_b_proj"):
            return Carry(False, "mlx-lm takes this matrix apart and rounds its parts again: keep it")
        return Carry(True)

    def caveats(self, model: Checkpoint, layers: Mapping[str, Layer]) -> list[str]:
        """See `Artifact.caveats`."""
        return _mlx_models.caveats(model)

    def reading(self, model: QuantizedCheckpoint) -> Reading:
        """See `Artifact.reading`."""
        return Reading("mlx-lm", most=_mlx_models.ignored_window(model))

    def one_format(self, module: Module) -> str | None:
        """See `Artifact.one_format`: matrices of all experts are one tensor."""
        return module.stack

    def _layout(self, model: Checkpoint, layers: Mapping[str, Layer]) -> Layout:
        """See `PackedArtifact._layout`."""

        def parts(module: str, layer: Layer, n: int, k: int) -> Infos:
            return infos(_target(layer.format, k), n, k)

        def encoded(module: str, quantized: Quantized) -> Mapping[str, Tensor]:
            wanted = _target(quantized.format, quantized.codes.shape[1])
            stored = wanted.hold(quantized)
            if isinstance(stored, str) or scale_dtype(stored.format) != scale_dtype(wanted):
                raise PlanError([f"{module}: offsets are too large for the type of its scales"], "MLX cannot hold this")
            return encode(stored)

        return Layout(parts, encoded, stacks=stacks_of(model))

    def _config(self, model: QuantizedCheckpoint) -> dict[str, Any]:
        """See `PackedArtifact._config`."""
        return rope_fields(model) | model.config | dict.fromkeys(KEYS, settings(model, stacks_of(model)))

    def open(self, path: Path) -> QuantizedCheckpoint:
        """See `Artifact.open`."""
        return MLXCheckpoint(path)

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """See `Artifact.recognizes`."""
        return "group_size" in (quantization_config(path, KEYS[0]) or {})


def scale_dtype(fmt: Format) -> str | None:
    """The type that a format stores scales in, where that is a choice."""
    return getattr(fmt, "scale_dtype", None)


def _choose(fmt: Format, k: int) -> Target | None:
    """The format of MLX that holds the same values; None if none does."""
    if isinstance(fmt, MXFP4 | MXFP8):
        return type(fmt)() if fmt.levels().equal(type(fmt)().levels()) else None
    levels, width = len(fmt.levels()), fmt.group_columns or k
    bits = next((b for b in BITS if levels <= 1 << b), None)
    group = next((g for g in GROUPS if width % g == 0), None)
    if bits is None or group is None:
        return None
    zeros = isinstance(fmt, Int) and not fmt.symmetric
    own = "fp16" if isinstance(fmt, Classic) else fmt.scale_dtype if isinstance(fmt, Int | Biased) else "fp32"
    target = Biased.model_validate({"bits": bits, "group": group, "scale_dtype": "fp32" if zeros else own})
    return None if target.may_hold(fmt) else target


def _target(fmt: Format, k: int) -> Target:
    target = _choose(fmt, k)
    assert target is not None  # the plan has asked
    return target


def _keys(target: Target) -> dict[str, Any]:
    """What config.json says about a matrix."""
    if isinstance(target, Biased):
        return {"group_size": target.group, "bits": target.bits, "mode": "affine"}
    return {"group_size": 32, "bits": target.code_bits, "mode": type(target).__name__.lower()}


def stacks_of(model: Checkpoint) -> dict[str, list[str]]:
    """Modules whose matrices mlx-lm keeps in one tensor, by its name: those of one role of a block's experts."""
    found: dict[str, list[str]] = defaultdict(list)
    for i in range(model.family.blocks(model.config)):
        prefix = model.family.block_prefix.format(i=i)
        for linear in model.family.block_linears(model.config, i):
            if linear.expert is not None:
                mixture = linear.path.partition(".experts.")[0]
                found[f"{prefix}{mixture}.switch_mlp.{linear.role}_proj"].append(prefix + linear.path)
    return found


def settings(model: QuantizedCheckpoint, stacks: Stacks) -> dict[str, Any]:
    """`quantization` of config.json: the most frequent format, and those of the modules that differ."""
    stack_of = {member: stack for stack, members in stacks.items() for member in members}
    keys = {
        stack_of.get(module, module): _keys(_target(layer.format, model.info(f"{module}.weight").shape[1]))
        for module, layer in model.layers.items()
    }
    usual = dict(Counter(tuple(k.items()) for k in keys.values()).most_common(1)[0][0])
    return usual | {module: k for module, k in keys.items() if k != usual}


def infos(target: Target, n: int, k: int) -> Infos:
    """Names below the module, shapes and types."""
    keys = _keys(target)
    shape = (n, k // keys["group_size"])
    weight = {"weight": TensorInfo((n, k * keys["bits"] // 32), torch.uint32)}
    if not isinstance(target, Biased):
        return weight | {"scales": TensorInfo(shape, torch.uint8)}
    dtype = DTYPES[target.scale_dtype]
    return weight | {"scales": TensorInfo(shape, dtype), "biases": TensorInfo(shape, dtype)}


def encode(quantized: Quantized) -> dict[str, Tensor]:
    """The tensors of a matrix in one of the formats that MLX has."""
    codes, params, fmt = quantized.codes, quantized.params, quantized.format
    if isinstance(fmt, Biased):
        words = pack_words(codes, fmt.bits).view(torch.uint32)
        return {"weight": words, "scales": params["scale"], "biases": params["offset"]}
    assert isinstance(fmt, MXFP4 | MXFP8)
    return {"weight": pack_words(to_bits(codes, fmt), fmt.code_bits).view(torch.uint32), "scales": params["exponent"]}


class _MLXKeys(Settings):
    """How a matrix is packed."""

    bits: Literal[2, 3, 4, 5, 6, 8]
    group_size: Literal[32, 64, 128]
    mode: Literal["affine", "mxfp4", "mxfp8"] = "affine"


class MLXCheckpoint(PackedCheckpoint):
    """An MLX checkpoint; see `PackedCheckpoint`."""

    mark: ClassVar[str] = "scales"
    keys: ClassVar[tuple[str, ...]] = KEYS

    def _locate(self, folder: Path) -> dict[str, SafetensorsFile]:
        """See `PackedCheckpoint._locate`; matrices of experts are parts of stacks."""
        located = super()._locate(folder)
        self._stacks = stacks_of(self)
        split(located, self._stacks, ("weight", "scales", "biases"))
        return located

    def _understand(self, how: Mapping[str, Any]) -> None:
        """See `PackedCheckpoint._understand`. Entries that are no objects say that a module is not packed."""
        doubled = list(rope_fields(self).items())
        self.config = {key: value for key, value in self.config.items() if (key, value) not in doubled}
        self._usual = read_settings(_MLXKeys, how, self.source)
        named = {module: keys for module, keys in how.items() if isinstance(keys, dict)}
        found = {m: read_settings(_MLXKeys, keys, f"{self.source}: {m[:60]}") for m, keys in named.items()}
        self._named = {member: keys for m, keys in found.items() for member in self._stacks.get(m, [m])}

    def _packing(self, module: str, n: int, k: int, found: Infos) -> Packing:
        """See `PackedCheckpoint._packing`."""
        keys = self._named.get(module, self._usual)
        target: Target
        if keys.mode == "affine":
            scales = self._scale_dtype(module, "scales", found)
            target = Biased.model_validate({"bits": keys.bits, "group": keys.group_size, "scale_dtype": scales})
        else:
            target = MXFP4() if keys.mode == "mxfp4" else MXFP8()
            if (keys.bits, keys.group_size) != (target.code_bits, 32):
                wanted = f"{target.code_bits} bits in groups of 32"
                found_text = f"{keys.bits} in groups of {keys.group_size}"
                raise CheckpointError(f"{self.source}: {module}: {keys.mode}", wanted=wanted, found=found_text)
        if reason := target.misfit(k):
            raise CheckpointError(f"{self.source}: {module}: {reason}")
        parts = infos(target, n, k)
        return Packing((n, k), Layer(self._symmetric(module, target, found == parts) or target), parts)

    def _symmetric(self, module: str, target: Target, whole: bool) -> Int | None:
        """The integers without zero points that a matrix is, so that other layouts may hold it; None: it is not.

        Products of scales in 32 bits are not exact, with which an offset is not what it stands for.
        """
        if not (whole and isinstance(target, Biased)) or target.scale_dtype == "fp32":
            return None
        scales, middle = self._read(module, "scales"), 1 << (target.bits - 1)
        if not torch.equal(self._read(module, "biases"), -middle * scales):
            return None
        fields = {"bits": target.bits, "group": target.group, "scale_dtype": target.scale_dtype}
        return Int.model_validate(fields)

    def _unpack(self, module: str, packing: Packing, start: int, stop: int) -> Quantized:
        """See `PackedCheckpoint._unpack`."""
        assert packing.layer is not None
        fmt, k = packing.layer.format, packing.shape[1]
        words = self._read(module, "weight", start, stop).view(torch.int32)
        scales = self._read(module, "scales", start, stop)
        if isinstance(fmt, Int):
            return Quantized(unpack_words(words, fmt.bits, k), {"scale": scales}, fmt)
        if isinstance(fmt, Biased):
            biases = self._read(module, "biases", start, stop)
            return Quantized(unpack_words(words, fmt.bits, k), {"scale": scales, "offset": biases}, fmt)
        assert isinstance(fmt, MXFP4 | MXFP8)
        return Quantized(from_bits(unpack_words(words, fmt.code_bits, k), fmt), {"exponent": scales}, fmt)
