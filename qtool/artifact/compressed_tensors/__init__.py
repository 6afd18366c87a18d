"""compressed-tensors: the safetensors layouts that transformers and vLLM load by themselves.

Integer weights of 2 to 8 bits are stored packed (`pack-quantized`), 8-bit weights whose inputs are quantized as well as
int8 (`int-quantized`); FP8 weights per tensor, row or 128 x 128 block with inputs in FP8 (`float-quantized`) or alone
(`naive-quantized`); MXFP4, MXFP8 and NVFP4 in layouts of their own. Weights of 4 bits may have inputs in INT8 or FP8.
Formats whose levels are integers, with whatever scales (MXINT8, NVINT4, block floats), are stored as integers. Codes
and scales are stored as they are, so nothing is lost.

transformers decodes with compressed-tensors: packed widths of 3, 5, 6 and 7 bits need version 0.18 of it, blocks of FP8
0.19, MXFP4 0.16. It decodes MXFP4, MXFP8 and NVFP4 to bfloat16 whatever the model's type, so such a model has to have
that type there. A model that mixes asymmetric formats with others is for vLLM only: transformers 5.23 cannot load
packed zero points beside a second scheme. Of mixtures of experts, it loads those whose experts are packed and
symmetric, FP8 or MXFP4; it refuses other experts, and decodes NVFP4 ones without their global scale: such models are
for vLLM only. INT8 and FP8 inputs, and FP8 KV caches, may have calibrated scales.
Layout: https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from qtool.artifact._base import Artifact, Carry
from qtool.artifact._integers import model_dtype
from qtool.artifact._packed import Infos, write_packed
from qtool.artifact._packed import quantization_config as quantization_config_of
from qtool.artifact.compressed_tensors import _cache, _inputs
from qtool.artifact.compressed_tensors._config import METHOD, kind_of, quantization_config, refusal
from qtool.artifact.compressed_tensors._kinds import Kind
from qtool.artifact.compressed_tensors._reader import CompressedCheckpoint
from qtool.checkpoint._base import Layer, Module, QuantizedCheckpoint
from qtool.formats._base import Format, Quantized

USAGE = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER")  # needs: pip install compressed-tensors
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

`vllm serve FOLDER` serves it.
"""


class CompressedTensors(Artifact):
    """See the module."""

    fuses: ClassVar[bool] = True
    runtimes: ClassVar[tuple[str, ...]] = ("transformers", "vLLM")
    library: ClassVar[str | None] = "transformers"
    usage: ClassVar[str] = USAGE

    def can_carry(self, module: Module, layer: Layer | None, keep: str) -> Carry:
        """See `Artifact.can_carry`."""
        reason = _refusal(module, layer) if layer else None
        return Carry(reason is None, reason or "")

    def caches(self, fmt: Format | None) -> Carry:
        """See `Artifact.caches`: FP8 with one scale per tensor."""
        return _cache.carry(fmt)

    def one_format(self, module: Module) -> str | None:
        """See `Artifact.one_format`: vLLM runs all experts of a block as one layer."""
        return super().one_format(module) if module.stack is None else module.stack.rpartition(".")[0]

    def write(self, model: QuantizedCheckpoint, out: Path, card: dict[str, Any]) -> list[Path]:
        """See `Artifact.write`."""
        self.check(model)
        dtype = model_dtype(model)

        def kind(module: str) -> Kind:
            found = kind_of(model.layers[module])
            assert found is not None
            return found

        def parts(module: str, fmt: Format, n: int, k: int) -> Infos:
            return kind(module).infos(fmt, n, k, dtype) | _inputs.infos(model.layers[module], dtype)

        def encoded(module: str, quantized: Quantized) -> Mapping[str, Tensor]:
            inputs = _inputs.encode(model.layers[module], module, dtype)
            return kind(module).encode(quantized, module, dtype) | inputs

        config = model.config | {"quantization_config": quantization_config(model)} if model.layers else model.config
        return write_packed(self, model, out, card, config, parts, encoded, _cache.tensors(model, dtype))

    def open(self, path: Path) -> CompressedCheckpoint:
        """See `Artifact.open`."""
        return CompressedCheckpoint(path)

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """See `Artifact.recognizes`."""
        return (quantization_config_of(path) or {}).get("quant_method") == METHOD


def _refusal(module: Module, layer: Layer) -> str | None:
    """Why a layer cannot be held; None if it can."""
    if module.kind == "embedding":
        tied = " and is the output layer at the same time" if module.aliases else ""
        return f"the token embedding stays unquantized in compressed-tensors{tied}: keep it"
    if module.kind == "router":
        return "routers stay unquantized in compressed-tensors: keep it"
    return None if kind_of(layer) else refusal(layer)
