"""Inputs with one calibrated scale in compressed-tensors: literal tensors, its own code, and damage."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from safetensors.torch import load_file

from qtool.artifact.compressed_tensors import CompressedTensors
from qtool.artifact.compressed_tensors._kinds import spelled
from qtool.artifact.qtool import Qtool
from qtool.calibrate.inputs import quantize_static, rounded
from qtool.checkpoint._base import Static
from qtool.errors import CheckpointError, PlanError
from qtool.formats._base import Quantized
from qtool.formats._spelling import parse_format
from tests.artifact.conftest import quantize, save_llama
from tests.artifact.test_compressed_tensors import TOKENS, UP, change_tensors, dense, load, write

SCHEMES = {  # weights, inputs, one scale, what config.json says
    "int8": ("int8-channel", "int8-tensor", Static(0.0625), (8, "int", "tensor", True, False)),
    "int8-asym": ("int8-channel", "int8-tensor-asym", Static(0.03125, 17), (8, "int", "tensor", False, False)),
    "fp8": ("fp8-channel", "fp8-tensor", Static(0.015625), (8, "float", "tensor", True, False)),
    "fp8-tensor": ("fp8-tensor", "fp8-tensor", Static(0.0107421875), (8, "float", "tensor", True, False)),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("static"), 64, torch.float32)


def static_model(folder, scheme):
    weights, inputs, static, _ = SCHEMES[scheme]
    model = quantize(folder, parse_format(weights), parse_format(inputs).model_copy(update={"scale_dtype": "fp32"}))
    model.layers = {name: replace(layer, static=static) for name, layer in model.layers.items()}
    return model


def simulation_error(model, source, written):
    """How far transformers' logits are from our simulation, relative to what quantizing does to them."""
    twin = dense(model, source)
    with ExitStack() as stack, torch.no_grad():
        for name, layer in model.layers.items():
            hook = twin.get_submodule(name).register_forward_pre_hook(lambda _, x, kept=layer: rounded(x[0], kept))
            stack.callback(hook.remove)
        ours = twin(TOKENS).logits
    with torch.no_grad():
        theirs, original = load(written)(TOKENS).logits, dense(model, source)(TOKENS).logits
    return float((theirs - ours).norm() / (theirs - original).norm())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_transformers_computes_what_evaluation_simulates(scheme, folder, tmp_path):
    model = static_model(folder, scheme)
    write(model, tmp_path)
    assert simulation_error(model, folder, tmp_path) < 1e-3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_tensors_and_settings_are_those_of_the_specification(scheme, folder, tmp_path):
    _, inputs, static, told = SCHEMES[scheme]
    write(static_model(folder, scheme), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors[f"{UP}.input_scale"], torch.tensor([static.scale]))
    zero = tensors.get(f"{UP}.input_zero_point")
    assert (zero.dtype, zero.tolist()) == (torch.int8, [17]) if inputs.endswith("asym") else zero is None
    group = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    keys = ("num_bits", "type", "strategy", "symmetric", "dynamic")
    assert tuple(group["input_activations"][key] for key in keys) == told


@pytest.mark.parametrize("artifact", [CompressedTensors, Qtool], ids=["compressed-tensors", "qtool"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_comes_back(scheme, artifact, folder, tmp_path):
    model = static_model(folder, scheme)
    artifact().write(model, tmp_path, {})
    found = artifact().open(tmp_path)
    assert found.decoded == {}
    for name, layer in model.layers.items():
        assert (found.layers[name].activations, found.layers[name].static) == (layer.activations, layer.static)
        assert torch.equal(found.tensor(f"{name}.weight"), model.tensor(f"{name}.weight"))
    write(found, tmp_path / "again")
    write(model, tmp_path / "direct")
    again, direct = (load_file(tmp_path / name / "model.safetensors") for name in ("again", "direct"))
    assert again.keys() == direct.keys()
    assert all(torch.equal(again[name], direct[name]) for name in direct)


DAMAGE = {
    "missing": (lambda t: t.pop(f"{UP}.input_scale"), "input_scale: wanted one number, found no such tensor"),
    "no zero": (lambda t: t.pop(f"{UP}.input_zero_point"), "input_zero_point: wanted one number"),
    "negative": (lambda t: t[f"{UP}.input_scale"].neg_(), "wanted a positive float, found -0.03125"),
    "infinite": (lambda t: t[f"{UP}.input_scale"].fill_(torch.inf), "wanted a positive float, found inf"),
    "several": (lambda t: t.update({f"{UP}.input_scale": torch.ones(2)}), "wanted one number"),
    "type": (lambda t: t.update({f"{UP}.input_zero_point": torch.ones(1)}), "wanted torch.int8"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(damage, folder, tmp_path):
    change, message = DAMAGE[damage]
    write(static_model(folder, "int8-asym"), tmp_path)
    change_tensors(change)(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        CompressedTensors().open(tmp_path)


def test_a_scale_that_the_model_type_cannot_hold_is_refused(folder, tmp_path):
    model = static_model(folder, "int8")
    model.config = model.config | {"dtype": "bfloat16"}
    model.layers = {name: replace(layer, static=Static(0.0625001)) for name, layer in model.layers.items()}
    with pytest.raises(PlanError, match="not exact in bfloat16"):
        write(model, tmp_path)


def nvfp4_model(folder, scale):
    """Weights and inputs in NVFP4; matrices that runtimes merge have one scale."""
    model = quantize(folder, parse_format("nvfp4"), parse_format("nvfp4"))
    for name, q in model.matrices.items():
        w, fmt = model.origin.tensor(f"{name}.weight").float(), q.format.with_largest(1.0)
        params = fmt.fit(w)
        model.matrices[name] = Quantized(fmt.snap(w, params), params, q.format)
        model.layers[name] = replace(model.layers[name], static=Static(scale))
    return model


@pytest.fixture(scope="session")
def folder_bf16(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("static-bf16"), 64, torch.bfloat16)


@pytest.mark.parametrize("scale", [2**-9, 1 / 1000], ids=["power of two", "another"])
def test_nvfp4_inputs_are_rounded_as_its_own_code_does(scale):
    told = spelled(4, "float", "tensor_group", 16, dynamic="local", scale_dtype="torch.float8_e4m3fn")
    args = QuantizationArgs.model_validate(told)
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(0)).exp() - 1
    x[0], x[1, :16], x[2] = x[0] * 1e-6, 0, x[2] * 1e4
    multiplier = torch.tensor([1.0 / scale])
    scales, zeros = compute_dynamic_scales_and_zp(x, args, None, multiplier)
    wanted = fake_quantize(x, scales, zeros, args, multiplier)
    found = quantize_static(x, parse_format("nvfp4"), Static(1 / float(multiplier)))
    torch.testing.assert_close(found, wanted, rtol=2e-7, atol=0)
    if scale == 2**-9:
        assert torch.equal(found, wanted)


def test_nvfp4_inputs_in_transformers(folder_bf16, tmp_path):
    model = nvfp4_model(folder_bf16, 2**-11)
    write(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors[f"{UP}.input_global_scale"], torch.tensor([2048.0]))
    group = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    keys = ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic", "scale_dtype")
    wanted = [4, "float", "tensor_group", 16, True, "local", "torch.float8_e4m3fn"]
    assert [group["input_activations"][key] for key in keys] == wanted
    assert simulation_error(model, folder_bf16, tmp_path) < 0.05


@pytest.mark.parametrize("artifact", [CompressedTensors, Qtool], ids=["compressed-tensors", "qtool"])
def test_nvfp4_inputs_come_back(artifact, folder_bf16, tmp_path):
    model = nvfp4_model(folder_bf16, 1 / float(torch.tensor(3000.0)))
    artifact().write(model, tmp_path, {})
    found = artifact().open(tmp_path)
    assert found.decoded == {}
    for name, layer in model.layers.items():
        assert found.layers[name] == layer
        assert torch.equal(found.tensor(f"{name}.weight"), model.tensor(f"{name}.weight"))


NVFP4_DAMAGE = {
    "missing": (lambda t: t.pop(f"{UP}.input_global_scale"), "input_global_scale: wanted one number"),
    "zero": (lambda t: t[f"{UP}.input_global_scale"].zero_(), "wanted a positive float, found 0.0"),
    "type": (lambda t: t.update({f"{UP}.input_global_scale": torch.ones(1).half()}), "wanted torch.float32"),
}


@pytest.mark.parametrize("damage", NVFP4_DAMAGE)
def test_damage_of_nvfp4_inputs_is_named(damage, folder_bf16, tmp_path):
    change, message = NVFP4_DAMAGE[damage]
    write(nvfp4_model(folder_bf16, 2**-11), tmp_path)
    change_tensors(change)(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        CompressedTensors().open(tmp_path)
