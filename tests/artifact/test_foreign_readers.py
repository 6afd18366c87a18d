"""Layouts of other tools as compressed-tensors' converters and transformers read them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter, ModelOptNvfp4Converter
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from qtool.artifact.awq import AWQ
from qtool.artifact.fp8 import FP8
from qtool.artifact.modelopt import ModelOpt
from qtool.formats._spelling import parse_format
from qtool.formats.int import Int
from tests.artifact.conftest import InMemory, quantize, save_llama
from tests.artifact.test_compressed_floats import quantized


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of 128 columns divide its rows."""
    return save_llama(tmp_path_factory.mktemp("foreign"), 128, torch.float32)


def parts(tensors: dict[str, torch.Tensor], module: str) -> dict[str, torch.Tensor]:
    """The tensors of a module by their names below it."""
    return {name.removeprefix(f"{module}."): t for name, t in tensors.items() if name.startswith(f"{module}.")}


def assert_decoded(model: InMemory, found: dict[str, torch.Tensor], rtol: float = 0) -> None:
    assert found.keys() == model.layers.keys()
    for module, weight in found.items():
        torch.testing.assert_close(weight.float(), model.matrix(module).decode(), rtol=rtol, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq(symmetric: bool, wide: Path, tmp_path: Path) -> None:
    model = quantize(wide, Int(bits=4, group=32, symmetric=symmetric, scale_dtype="fp16"))
    AWQ().write(model, tmp_path, {})
    converter = AutoAWQConverter.from_pretrained(str(tmp_path))
    tensors = converter.process(load_file(tmp_path / "model.safetensors"))
    (scheme,) = converter.update_config(None).config_groups.values()
    found = {m: PackedQuantizationCompressor.decompress(parts(tensors, m), scheme)["weight"] for m in model.layers}
    assert_decoded(model, found, 2**-11)  # decoded to the type of the scales


def test_nvfp4_of_modelopt(wide: Path, tmp_path: Path) -> None:
    model = quantized(wide, "nvfp4", None)
    ModelOpt().write(model, tmp_path, {})
    converter = ModelOptNvfp4Converter(targets=["re:.*proj$"])
    tensors = converter.process(load_file(tmp_path / "model.safetensors"))
    told = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs.model_validate(told))
    found = {m: NVFP4PackedCompressor.decompress(parts(tensors, m), scheme)["weight"] for m in model.layers}
    assert_decoded(model, found)


def test_fp8_in_blocks(wide: Path, tmp_path: Path) -> None:
    model = quantize(wide, parse_format("fp8-block"), parse_format("fp8-g128"))
    FP8().write(model, tmp_path, {})
    how = FineGrainedFP8Config(weight_block_size=(128, 128), dequantize=True)
    state = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=how).state_dict()
    assert_decoded(model, {module: state[f"{module}.weight"] for module in model.layers})
