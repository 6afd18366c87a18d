"""Reads GPTQ checkpoints, whoever wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from qtool.artifact._packed import Infos, PackedCheckpoint, Packing
from qtool.artifact.gptq._config import ModulePacking
from qtool.artifact.gptq._layout import WORD, decode_codes, decode_zeros, group_index, infos
from qtool.checkpoint._base import Layer
from qtool.errors import CheckpointError
from qtool.formats._base import Quantized
from qtool.formats.int import DTYPES, Int


class GPTQCheckpoint(PackedCheckpoint):
    """A GPTQ checkpoint; see `PackedCheckpoint`."""

    mark: ClassVar[str] = "qweight"

    def _understand(self, how: Mapping[str, Any]) -> None:
        """See `PackedCheckpoint._understand`."""
        self._schemes = ModulePacking(how, self.source)

    def _packing(self, module: str, n: int, k: int, found: Infos) -> Packing:
        """See `PackedCheckpoint._packing`."""
        bits, group, symmetric = self._schemes.scheme(module)
        where = f"{self.source}: {module}"
        if group == 0 or group < -1:
            raise CheckpointError(f"{where}: group_size", wanted="a positive number, or -1 for whole rows", found=group)
        if n * bits % WORD or k * bits % WORD:
            raise CheckpointError(f"{where}: {n} x {k} weights of {bits} bits do not fill whole words")
        size: int | str = group if 0 < group <= k else "channel"
        group = k if size == "channel" else group
        scales = self._scale_dtype(module, "scales", found)
        parts = infos(bits, -(-k // group), n, k, DTYPES[scales])
        reason = "the last group of a row is shorter than the others" if k % group else ""
        if "g_idx" not in found:
            if self._schemes.desc_act and group < k:
                raise CheckpointError(f"{self.source} lacks {module}.g_idx, and its columns are in activation order")
            del parts["g_idx"]
        elif not torch.equal(self._index(module, -(-k // group)), group_index(k, group)):
            reason = "its groups are in activation order (g_idx)"
        if reason:
            return Packing((n, k), None, parts, reason)
        fmt = Int.model_validate({"bits": bits, "group": size, "symmetric": symmetric, "scale_dtype": scales})
        return Packing((n, k), Layer(fmt), parts)

    def _index(self, module: str, groups: int) -> Tensor:
        """The group of each column, int32 [K]."""
        index = self._read(module, "g_idx")
        if index.dtype != torch.int32 or (index.numel() and not 0 <= int(index.min()) <= int(index.max()) < groups):
            wanted = f"int32 from 0 to {groups - 1}"
            raise CheckpointError(f"{self.source}: {module}.g_idx", wanted=wanted, found="others")
        return index

    def _unpack(self, module: str, packing: Packing, start: int, stop: int) -> Quantized | Tensor:
        """See `PackedCheckpoint._unpack`."""
        n, k = packing.shape
        bits, group, symmetric = self._schemes.scheme(module)
        codes = decode_codes(self._read(module, "qweight")[:, start:stop], bits, k)
        zeros = decode_zeros(self._read(module, "qzeros"), bits, n, self._schemes.less)[start:stop]
        scales = self._read(module, "scales")[:, start:stop].T.contiguous()
        middle = 1 << (bits - 1)
        if symmetric and not bool((zeros == middle).all()):
            hint = "checkpoint_format and sym in config.json must be those that the file was written with"
            raise CheckpointError(
                f"{self.source}: {module}: zero points of symmetric codes", wanted=middle, found="others", hint=hint
            )
        if packing.layer is None:
            index = self._index(module, scales.shape[1]) if "g_idx" in packing.parts else group_index(k, group)
            return (codes.float() - zeros.float()[:, index]) * scales.float()[:, index]
        params = {"scale": scales}
        if not symmetric:
            params["zero"] = (zeros.to(torch.int16) - middle).to(torch.int8)
        return Quantized(codes, params, packing.layer.format)
