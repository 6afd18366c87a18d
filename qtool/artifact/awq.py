"""AWQ checkpoints of version GEMM, which vLLM, SGLang, GPTQModel, transformers and mlx-lm load: 4 bits, one group size.

    qweight  int32 [K, N / 8]     codes, eight neighbouring outputs in a word
    qzeros   int32 [G, N / 8]     zero points in the same order; 8 where there are none
    scales   fp16 or bf16 [G, N]

    w_hat = scales * (code - zero)

The eight nibbles of a word hold the outputs 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on. This layout is that of the
AWQ tools; the scales that the AWQ method moves between layers are part of the weights and norms, as in every layout.
Source: https://github.com/casper-hansen/AutoAWQ
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import AliasChoices, Field
from torch import Tensor

from qtool.artifact._base import Carry, Reading, naming
from qtool.artifact._integers import as_integers, half_dtype, integers
from qtool.artifact._packed import Infos, PackedCheckpoint, Packing
from qtool.artifact._packed_artifact import Layout, PackedArtifact
from qtool.artifact._settings import Settings, quantization_config, read_settings
from qtool.artifact._targets import kept_linears
from qtool.checkpoint._base import Checkpoint, Layer, Module, QuantizedCheckpoint, TensorInfo
from qtool.errors import CheckpointError
from qtool.formats._base import Format, Quantized
from qtool.formats.int import DTYPES, Int
from qtool.numerics.grids.bits import pack_words, unpack_words

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output in each nibble of a word, lowest bits first."""
BITS, PER_WORD = 4, 8
EIGHTS = -0x77777778
"""Eight zero points of symmetric codes in a word, 0x88888888."""


class AWQ(PackedArtifact):
    """See the module."""

    fuses: ClassVar[bool] = True
    runtimes: ClassVar[tuple[str, ...]] = ("vLLM", "SGLang", "GPTQModel", "mlx-lm")
    library: ClassVar[str | None] = "transformers"
    usage: ClassVar[str] = "`vllm serve FOLDER` serves it."

    def _refusal(self, module: Module, layer: Layer) -> str | None:
        """See `PackedArtifact._refusal`."""
        fmt = integers(layer.format)
        if fmt is None or fmt.bits != BITS or fmt.group == "token":
            return f"AWQ holds 4-bit integers per group or channel, such as int4-g128-asym, not {layer.format.label}"
        if layer.activations is not None:
            return "AWQ cannot say how activations are quantized"
        n = module.shape[0]
        return f"AWQ packs 8 rows together, which {n} are not" if n % PER_WORD else None

    def agree(self, layers: Collection[Layer]) -> Carry:
        """See `Artifact.agree`."""
        sizes = sorted({_group(layer.format) for layer in layers if integers(layer.format)})
        if len(sizes) < 2:
            return super().agree(layers)
        return Carry(False, f"AWQ has one group size for all layers, not {', '.join(map(str, sizes))}")

    def reading(self, model: QuantizedCheckpoint) -> Reading:
        """See `Artifact.reading`."""
        return Reading("vLLM", torch.float16, other="GPTQModel")

    def caveats(self, model: Checkpoint, layers: Mapping[str, Layer]) -> list[str]:
        """See `Artifact.caveats`; from csrc/quantization/awq/gemm_kernels.cu of vLLM."""
        narrow = [layer for layer in layers.values() if _group(layer.format) % 32 and _group(layer.format) > 0]
        return naming({"vLLM and SGLang run groups that are multiples of 32 columns only, not {}": narrow})

    def _layout(self, model: Checkpoint, layers: Mapping[str, Layer]) -> Layout:
        """See `PackedArtifact._layout`."""
        dtype = half_dtype(model)

        def parts(module: str, layer: Layer, n: int, k: int) -> Infos:
            group = _group(layer.format)
            return infos(k // group if group > 0 else 1, n, k, dtype)

        return Layout(parts, lambda module, quantized: encode(as_integers(quantized, module, dtype)))

    def _config(self, model: QuantizedCheckpoint) -> dict[str, Any]:
        """See `PackedArtifact._config`."""
        return model.config | {"quantization_config": settings(model)}

    def open(self, path: Path) -> QuantizedCheckpoint:
        """See `Artifact.open`."""
        return AWQCheckpoint(path)

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """See `Artifact.recognizes`."""
        return (quantization_config(path) or {}).get("quant_method") == "awq"


def _group(fmt: Format) -> int:
    """Columns of a group; -1: all of them."""
    ints = integers(fmt)
    assert ints is not None
    return ints.group_columns or -1


def settings(model: QuantizedCheckpoint) -> dict[str, Any]:
    """`quantization_config` of config.json. Readers look for the names of what is kept inside of module names."""
    return {
        "quant_method": "awq",
        "bits": BITS,
        "group_size": _group(next(iter(model.layers.values())).format),
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": kept_linears(model),
    }


def infos(groups: int, n: int, k: int, dtype: torch.dtype) -> Infos:
    """Names below the module, shapes and types; `dtype` is that of scales."""
    return {
        "qweight": TensorInfo((k, n // PER_WORD), torch.int32),
        "qzeros": TensorInfo((groups, n // PER_WORD), torch.int32),
        "scales": TensorInfo((groups, n), dtype),
    }


def encode(quantized: Quantized) -> dict[str, Tensor]:
    """The tensors of a matrix."""
    codes, params, fmt = quantized.codes, quantized.params, quantized.format
    assert isinstance(fmt, Int)
    zero = params.get("zero", torch.zeros_like(params["scale"])).to(torch.int16) - fmt.lowest
    return {
        "qweight": _pack(codes),
        "qzeros": _pack(zero.to(torch.uint8)),
        "scales": params["scale"].T.contiguous(),
    }


def _pack(fields: Tensor) -> Tensor:
    """uint8 [N, C] -> int32 [C, N / 8]."""
    words = fields.T.reshape(fields.shape[1], -1, PER_WORD)[..., ORDER]
    return pack_words(words.flatten(1), BITS)


def _unpack(words: Tensor) -> Tensor:
    """int32 [C, W] -> uint8 [8 W, C]."""
    fields = unpack_words(words, BITS, words.shape[1] * PER_WORD).reshape(len(words), -1, PER_WORD)
    back = torch.tensor(ORDER).argsort()
    return fields[..., back].flatten(1).T.contiguous()


class _AWQSettings(Settings):
    """`quantization_config`, as AutoAWQ and as its earliest versions spelled it."""

    bits: Literal[4] = Field(validation_alias=AliasChoices("bits", "w_bit"))
    group_size: int = Field(validation_alias=AliasChoices("group_size", "q_group_size"))
    version: str = "gemm"


class AWQCheckpoint(PackedCheckpoint):
    """An AWQ checkpoint; see `PackedCheckpoint`."""

    mark: ClassVar[str] = "qweight"

    def _understand(self, how: Mapping[str, Any]) -> None:
        """See `PackedCheckpoint._understand`."""
        found = read_settings(_AWQSettings, how, self.source)
        if found.version.lower() != "gemm":
            raise CheckpointError(f"{self.source}: version of AWQ", wanted="gemm", found=repr(found.version)[:40])
        if found.group_size < -1 or found.group_size == 0:
            wanted = "a positive number, or -1 for whole rows"
            raise CheckpointError(f"{self.source}: group_size", wanted=wanted, found=found.group_size)
        self._group = found.group_size

    def _packing(self, module: str, n: int, k: int, found: Infos) -> Packing:
        """See `PackedCheckpoint._packing`."""
        group = self._group if self._group > 0 else k
        if n % PER_WORD or k % group:
            wanted = f"rows in eights, columns in groups of {group}"
            raise CheckpointError(f"{self.source}: {module}", wanted=wanted, found=f"{n} x {k} weights")
        scales = self._scale_dtype(module, "scales", found)
        parts = infos(k // group, n, k, DTYPES[scales])
        symmetric = found.get("qzeros") == parts["qzeros"] and bool((self._read(module, "qzeros") == EIGHTS).all())
        size = "channel" if self._group < 0 else group
        fmt = Int.model_validate({"bits": BITS, "group": size, "symmetric": symmetric, "scale_dtype": scales})
        return Packing((n, k), Layer(fmt), parts)

    def _unpack(self, module: str, packing: Packing, start: int, stop: int) -> Quantized:
        """See `PackedCheckpoint._unpack`."""
        assert packing.layer is not None
        fmt = packing.layer.format
        assert isinstance(fmt, Int)
        first = start // PER_WORD
        words = slice(first, -(-stop // PER_WORD))
        rows = slice(start - first * PER_WORD, stop - first * PER_WORD)
        codes = _unpack(self._read(module, "qweight")[:, words])[rows]
        params = {"scale": self._read(module, "scales")[:, start:stop].T.contiguous()}
        if not fmt.symmetric:
            zero = _unpack(self._read(module, "qzeros")[:, words])[rows]
            params["zero"] = (zero.to(torch.int16) - 8).to(torch.int8)
        return Quantized(codes, params, fmt)
