"""What transformers' decoder of packed weights does with tensors that are not packed, and what is made of it."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from qtool.evaluate.readers import kernels_kept


def test_kernels_of_convolutions_are_kept_and_named() -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from transformers.integrations.compressed_tensors import CompressedTensorsDequantize

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=4), format="pack-quantized")
    quantizer = SimpleNamespace(
        compressor=SimpleNamespace(quantization_config=SimpleNamespace(format="pack-quantized"))
    )
    decoder = CompressedTensorsDequantize(quantizer, scheme)
    model = SimpleNamespace(get_parameter=lambda _: torch.zeros(1))
    kernels = {f"self_attn.{name}_conv1d.weight": [torch.randn(4, 1, 3)] for name in "qkv"}
    with kernels_kept() as lost:
        found = decoder.convert(dict(kernels), [], [], "self_attn.conv1d.weight", model=model)
    assert found.keys() == kernels.keys()
    assert all(torch.equal(found[name][0], kernels[name][0]) for name in kernels)
    assert lost == list(kernels)
    assert decoder.convert(dict(kernels), [], [], "self_attn.conv1d.weight", model=model) == {}  # why it is needed
