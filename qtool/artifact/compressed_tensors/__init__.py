"""compressed-tensors: the safetensors layouts that transformers and vLLM load by themselves.

Integer weights of 2 to 8 bits are stored packed (`pack-quantized`), 8-bit weights whose inputs are quantized as well
are stored as int8 (`int-quantized`). Codes and scales are stored as they are, so nothing is lost. Widths of 3, 5, 6 and
7 bits need compressed-tensors 0.18 or later. A model that mixes asymmetric formats with others is for vLLM only:
transformers 5.23 cannot load packed zero points beside a second scheme.
Layout: https://github.com/vllm-project/compressed-tensors
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from qtool.artifact._base import Artifact, Carry
from qtool.artifact._card import write_card, write_side_files
from qtool.artifact._integers import exact_scales, model_dtype
from qtool.artifact._shards import write_shards
from qtool.artifact.compressed_tensors._config import METHOD, quantization_config
from qtool.artifact.compressed_tensors._layout import encode, infos, layout
from qtool.artifact.compressed_tensors._reader import CompressedCheckpoint
from qtool.checkpoint._base import Layer, Module, QuantizedCheckpoint
from qtool.checkpoint.config import read_json
from qtool.errors import CheckpointError
from qtool.formats.int import Int

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

    def write(self, model: QuantizedCheckpoint, out: Path, card: dict[str, Any]) -> list[Path]:
        """See `Artifact.write`."""
        self.check(model)
        dtype = model_dtype(model)
        pieces = {}
        for name in model.names():
            module = name.removesuffix(".weight")
            if layer := model.layers.get(module):
                assert isinstance(layer.format, Int)
                n, k = model.info(name).shape
                stored = infos(layout(layer), layer.format, n, k, dtype)
                pieces[name] = {f"{module}.{part}": info for part, info in stored.items()}
            else:
                pieces[name] = {name: model.info(name)}

        def read(name: str) -> dict[str, Tensor]:
            module = name.removesuffix(".weight")
            if module not in model.layers:
                return {name: model.tensor(name)}
            quantized = exact_scales(model.quantized(module), module, dtype)
            parts = encode(layout(model.layers[module]), quantized, dtype)
            return {f"{module}.{part}": tensor for part, tensor in parts.items()}

        config = model.config | {"quantization_config": quantization_config(model)} if model.layers else model.config
        files = write_shards(out, pieces, read)
        return [*files, *write_side_files(model, out, config), write_card(self, model, out, card)]

    def open(self, path: Path) -> CompressedCheckpoint:
        """See `Artifact.open`."""
        return CompressedCheckpoint(path)

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """See `Artifact.recognizes`."""
        try:
            how = read_json(path / "config.json").get("quantization_config")
        except CheckpointError:
            return False
        return isinstance(how, dict) and how.get("quant_method") == METHOD


def _refusal(module: Module, layer: Layer) -> str | None:
    """Why a layer cannot be held; None if it can."""
    fmt, inputs = layer.format, layer.activations
    if module.kind == "embedding":
        tied = " and is the output layer at the same time" if module.aliases else ""
        return f"the token embedding stays unquantized in compressed-tensors{tied}: keep it"
    if not isinstance(fmt, Int) or fmt.group == "token":
        return f"compressed-tensors holds integers per group, channel or tensor, such as int4-g128, not {fmt.label}"
    if inputs is None:
        return None
    if fmt.bits != 8 or not fmt.symmetric or fmt.group_columns:
        return f"quantized inputs go with int8-channel or int8-tensor weights, not {fmt.label}"
    if not isinstance(inputs, Int) or inputs.bits != 8 or inputs.group != "token":
        return f"inputs are quantized as int8-token, not {inputs.label}"
    return None
