"""compressed-tensors' layouts of floats against its own code, transformers, literal bytes, and files that it writes."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import compressed_tensors
import pytest
import torch
from safetensors.torch import load_file

from qtool.artifact.compressed_tensors import CompressedTensors
from qtool.calibrate.inputs import quantize_tokens
from qtool.checkpoint._base import Layer
from qtool.errors import CheckpointError, NumericsError, PlanError
from qtool.formats._base import Quantized
from qtool.formats._spelling import parse_format
from qtool.formats.int import Int
from qtool.formats.nvfp4 import NVFP4
from tests.artifact.conftest import assert_same_model, quantize, save_llama
from tests.artifact.test_compressed_tensors import (
    TOKENS,
    UP,
    assert_loads_exactly,
    change_config,
    change_group,
    change_tensors,
    decompressed,
    dense,
    load,
    write,
)

SCHEMES = {  # weights, inputs, layout
    "fp8-dynamic": ("fp8-channel", "fp8-token", "float-quantized"),
    "fp8-tensor": ("fp8-tensor", "fp8-token", "float-quantized"),
    "fp8-block": ("fp8-block", "fp8-g128", "float-quantized"),
    "fp8-weights": ("fp8-channel", None, "naive-quantized"),
    "fp8-tensor-weights": ("fp8-tensor", None, "naive-quantized"),
    "mxfp8-weights": ("mxfp8", None, "mxfp8-quantized"),
    "mxfp8": ("mxfp8", "mxfp8", "mxfp8-quantized"),
    "mxfp4-weights": ("mxfp4", None, "mxfp4-pack-quantized"),
    "mxfp4": ("mxfp4", "mxfp4", "mxfp4-pack-quantized"),
    "mxfp6-weights": ("mxfp6", None, "mxfp6-pack-quantized"),
    "mxfp6": ("mxfp6", "mxfp8", "mxfp6-pack-quantized"),
    "nvfp4-weights": ("nvfp4", None, "nvfp4-pack-quantized"),
    "nvfp4-minmax-weights": ("nvfp4-minmax", None, "nvfp4-pack-quantized"),
    "w4afp8": ("int4-g32", "fp8-token", "pack-quantized"),
    "w4a8": ("int4-g32", "int8-token", "pack-quantized"),
    "w4a8-channel": ("int4-channel", "int8-token", "pack-quantized"),
}
DISGUISED = ["mxint8", "nvint4", "bfp4-g16", "bfp6-g32"]


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of 128 columns divide its rows; k and v have fewer rows than a block."""
    return save_llama(tmp_path_factory.mktemp("wide"), 128, torch.float32)


@pytest.fixture(scope="session")
def wide_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("wide-bf16"), 128, torch.bfloat16)


def quantized(folder, weights, inputs, **roles):
    """A model as the pipeline quantizes it: matrices that runtimes merge know of each other."""
    activations = parse_format(inputs) if inputs else None
    model = quantize(folder, parse_format(weights), activations, **roles)
    sets = {
        m: m.rpartition(".")[0]
        for m in model.layers
        if m.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
    }
    for name, q in model.matrices.items():
        if q.format.needs_largest:
            members = [m for m in model.layers if sets.get(m, m) == sets.get(name, name)]
            w = model.origin.tensor(f"{name}.weight").float()
            fmt = q.format.with_largest(max(float(model.origin.tensor(f"{m}.weight").abs().max()) for m in members))
            params = fmt.fit(w)
            model.matrices[name] = Quantized(fmt.snap(w, params), params, q.format)
    return model


def simulated(model, folder):
    """Logits of our decoded weights with inputs rounded as our evaluation does it."""
    twin = dense(model, folder)

    def rounded(fmt):
        return lambda _, inputs: quantize_tokens(inputs[0], fmt)

    with ExitStack() as stack, torch.no_grad():
        for name, layer in model.layers.items():
            if layer.activations:
                hook = twin.get_submodule(name).register_forward_pre_hook(rounded(layer.activations))
                stack.callback(hook.remove)
        return twin(TOKENS).logits.float()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_and_logits_are_those_of_transformers(scheme, wide, wide_bf16, tmp_path):
    weights, inputs, layout = SCHEMES[scheme]
    wide = wide_bf16 if weights.startswith(("mx", "nv")) else wide  # compressed-tensors decodes these to bfloat16 only
    model = quantized(wide, weights, inputs)
    write(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == config["config_groups"]["group_0"]["format"] == layout
    since = {"fp8-block": "0.19.0", "mxfp4": "0.16.0", "mxfp6": "0.20.0"}  # tried with each version
    assert config["version"] == since.get(scheme.removesuffix("-weights"), "0.15.0")
    if inputs is None:
        assert_loads_exactly(model, tmp_path, wide)
    loaded = load(tmp_path)
    with torch.no_grad():
        logits = loaded(TOKENS).logits.float()
    state, reference = loaded.state_dict(), dense(model, wide).state_dict()
    for name in (f"{m}.weight" for m in model.layers):
        assert torch.equal(state[name], reference[name]), name
    ours, original = simulated(model, wide), load(wide)(TOKENS).logits.detach()
    distance = float((logits - ours).norm() / (logits - original).norm())
    assert distance < (1e-3 if inputs else 1e-6)  # an input on a tie may fall either way
    generated = load(tmp_path).generate(TOKENS, min_new_tokens=5, max_new_tokens=5, do_sample=False)
    assert generated.shape == (1, TOKENS.shape[1] + 5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_comes_back(scheme, wide, tmp_path):
    weights, inputs, _ = SCHEMES[scheme]
    model = quantized(wide, weights, inputs)
    files = write(model, tmp_path)
    assert sorted(files) == sorted(tmp_path.iterdir())
    found = CompressedTensors().open(tmp_path)
    assert found.decoded == {}
    for module, layer in model.layers.items():
        assert found.layers[module].activations == layer.activations
        a, b = found.matrix(module).quantized, model.matrix(module).quantized
        assert torch.equal(a.codes, b.codes)
        assert torch.equal(a.decode(), b.decode())
        for start, stop in ((0, 1), (3, 50), (60, 64)):
            assert torch.equal(found.rows(f"{module}.weight", start, stop), b.decode()[start:stop])


@pytest.mark.parametrize("weights", ["fp8-channel", "mxfp4", "nvfp4", "mxfp8"])
def test_every_family_loads_exactly(weights, tiny_checkpoint, tmp_path):
    """Scales and levels have so few bits that their products are exact, or rounded once."""
    model = quantize(tiny_checkpoint("qwen3"), parse_format(weights))
    write(model, tmp_path)
    assert_loads_exactly(model, tmp_path, tiny_checkpoint("qwen3"))
    assert_same_model(CompressedTensors().open(tmp_path), model)


@pytest.mark.parametrize("label", DISGUISED)
def test_formats_whose_levels_are_integers_are_stored_as_integers(label, wide, tmp_path):
    model = quantized(wide, label, None)
    write(model, tmp_path)
    assert_loads_exactly(model, tmp_path, wide)
    found = CompressedTensors().open(tmp_path)
    fmt = parse_format(label)
    wanted = Int(bits=fmt.code_bits, group=fmt.group_columns)
    for module in model.layers:
        assert found.layers[module].format.label == wanted.label
        assert torch.equal(found.matrix(module).decode(), model.matrix(module).decode())


def test_several_layouts_in_one_model(wide_bf16, tmp_path):
    """Each in a group of its own, whose targets match no module of another."""
    wide = wide_bf16
    roles = {"down": parse_format("mxfp4"), "o": parse_format("int4-g64"), "gate": parse_format("nvfp4")}
    model = quantized(wide, "fp8-channel", None, up=roles["gate"], **roles)
    write(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    layouts = {group["format"] for group in config["config_groups"].values()}
    assert layouts == {"naive-quantized", "mxfp4-pack-quantized", "pack-quantized", "nvfp4-pack-quantized"}
    assert_loads_exactly(model, tmp_path, wide)
    assert_same_model(CompressedTensors().open(tmp_path), model)


ARGUMENTS = {
    "fp8-dynamic": ({"strategy": "channel"}, {"strategy": "token", "dynamic": True}),
    "fp8-block": (
        {"strategy": "block", "block_structure": [128, 128]},
        {"strategy": "group", "group_size": 128, "dynamic": True},
    ),
    "mxfp8": (
        {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
        {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8", "dynamic": True},
    ),
    "mxfp4-weights": ({"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}, None),
    "nvfp4-weights": (
        {"num_bits": 4, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"},
        None,
    ),
}


@pytest.mark.parametrize("scheme", ARGUMENTS)
def test_configuration(scheme, wide, tmp_path):
    weights, inputs, layout = SCHEMES[scheme]
    write(quantized(wide, weights, inputs), tmp_path)
    (group,) = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"].values()
    usual = {"num_bits": 8, "type": "float", "symmetric": True, "group_size": None, "dynamic": False}
    told = [None if arguments is None else usual | arguments for arguments in ARGUMENTS[scheme]]
    assert [group["weights"], group["input_activations"]] == told
    assert (group["targets"], group["format"], group["output_activations"]) == (["Linear"], layout, None)
    for arguments in filter(None, told):
        assert set(arguments) <= set(compressed_tensors.quantization.QuantizationArgs.model_fields)
        read = compressed_tensors.quantization.QuantizationArgs.model_validate(arguments)
        assert (read.num_bits, read.strategy) == (arguments["num_bits"], arguments["strategy"])


def literal(weights, rows):
    """The stored tensors of a matrix with the given rows, scaled by 1."""
    from qtool.artifact.compressed_tensors._config import kind_of

    fmt = parse_format(weights)
    kind = kind_of(Layer(fmt))
    assert kind is not None
    w = torch.tensor(rows)
    groups = w.shape[1] // (fmt.group_columns or w.shape[1])
    if weights == "nvfp4":
        params = {"scale": torch.full((len(w), groups), 0x38).byte(), "tensor": torch.full((len(w), 1), 0.5).double()}
        w = w / 2
    elif weights.startswith("mx"):
        params = {"exponent": torch.full((len(w), groups), 127).byte()}
    else:
        params = {"scale": torch.ones(len(w), groups).bfloat16()}
    return kind.encode(Quantized(fmt.snap(w, params), params, fmt), "m", torch.bfloat16)


MAGNITUDES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def test_bytes_of_four_bits():
    row = (MAGNITUDES + [-x for x in MAGNITUDES]) * 2
    golden = "10325476" + "90badcfe"  # the least negative number, zero, is positive here
    for weights in ("mxfp4", "nvfp4"):
        stored = literal(weights, [row])
        assert bytes(stored["weight_packed"][0].tolist()).hex() == golden * 2
    assert stored["weight_global_scale"].tolist() == [2.0] and stored["weight_global_scale"].dtype == torch.float32
    assert stored["weight_scale"].view(torch.uint8).tolist() == [[0x38, 0x38]]
    assert literal("mxfp4", [row])["weight_scale"].tolist() == [[127]]


def test_bytes_of_eight_bits():
    values = [0.0, 2**-9, -(2**-9), 7 * 2**-9, 2**-6, 1.0, -1.0, 1.125, 2.0, 448.0, -448.0, 1e4, -1e4, 17.0, 19.0, 0.3]
    wanted = "00018107083" + "8b8394" + "07efe7efe58" + "5a2a"
    row = torch.tensor([values * 2])
    for weights in ("fp8-channel", "mxfp8"):
        weight = literal(weights, row.tolist())["weight"]
        assert weight.dtype == torch.float8_e4m3fn
        assert torch.equal(weight.view(torch.uint8), row.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
    assert bytes(weight.view(torch.uint8)[0, :16].tolist()).hex() == wanted


def test_shapes_on_disk(wide, tmp_path):
    model = quantized(wide, "fp8-block", "fp8-g128")
    write(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    found = {
        n.removeprefix("model.layers.1."): (t.dtype, tuple(t.shape)) for n, t in stored.items() if "layers.1." in n
    }
    assert found["self_attn.k_proj.weight"] == (torch.float8_e4m3fn, (64, 128))
    assert found["self_attn.k_proj.weight_scale"] == (torch.float32, (1, 1))
    assert found["mlp.down_proj.weight_scale"] == (torch.float32, (1, 2))
    assert found["mlp.up_proj.weight_scale"] == (torch.float32, (2, 1))


PRESETS = {
    "FP8": ("fp8-tensor", "fp8-tensor", "float-quantized"),
    "FP8_DYNAMIC": ("fp8-channel", "fp8-token", "float-quantized"),
    "FP8_BLOCK": ("fp8-block", "fp8-g128", "float-quantized"),
    "NVFP4A16": ("nvfp4", None, "nvfp4-pack-quantized"),
    "MXFP4A16": ("mxfp4", None, "mxfp4-pack-quantized"),
    "MXFP4": ("mxfp4", "mxfp4", "mxfp4-pack-quantized"),
    "MXFP8A16": ("mxfp8", None, "mxfp8-quantized"),
    "W4AFP8": ("int4-g128", "fp8-token", "pack-quantized"),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_reads_what_the_library_writes(preset, wide, tmp_path):
    """A model compressed by compressed-tensors itself, as llm-compressor does it."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    weights, inputs, layout = PRESETS[preset]
    theirs = load(wide)
    scheme = preset_name_to_scheme(preset, ["Linear"])
    scheme.format = layout
    apply_quantization_config(theirs, QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"]))
    fmt = parse_format(weights)
    for module in theirs.modules():
        if hasattr(module, "quantization_scheme"):
            w = module.weight.detach()
            rows, width = fmt.group_rows or len(w), fmt.group_columns or w.shape[1]
            blocks = torch.nn.functional.pad(w, (0, 0, 0, -len(w) % rows)).view(-1, rows, w.shape[1] // width, width)
            whole = generate_gparam(w.min(), w.max()) if weights == "nvfp4" else None
            scale, _ = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), scheme.weights, global_scale=whole)
            module.weight_scale.data = scale.flatten() if weights == "fp8-tensor" else scale
            if whole is not None:
                module.weight_global_scale.data = whole.float().view(1)
            if inputs == "fp8-tensor":
                module.input_scale.data = torch.full_like(module.input_scale, 0.375)  # what calibration would find
            compressed_tensors.compressors.compress_module(module)
    compressor = compressed_tensors.compressors.ModelCompressor.from_pretrained_model(theirs)
    theirs.save_pretrained(tmp_path)
    if compressor is not None:
        compressor.update_config(tmp_path)
    found = CompressedTensors().open(tmp_path)
    assert {layer.format.label for layer in found.layers.values()} == {weights}
    assert {layer.activations and layer.activations.label for layer in found.layers.values()} == {inputs}
    assert not found.decoded
    for layer in found.layers.values():
        assert (layer.static and layer.static.scale) == (0.375 if inputs == "fp8-tensor" else None)
    state = decompressed(theirs)
    assert len(found.layers) == 14
    for module in found.layers:
        weight = state[f"{module}.weight"]
        assert torch.equal(found.matrix(module).decode().to(weight.dtype), weight), module


REFUSED = {
    "fp8-e5m2-channel": "holds integers such as int4-g128 .*, not fp8-e5m2-channel",
    "fp6-channel": "holds integers such as int4-g128 .*, not fp6-channel",
    "fp8-g32": "not fp8-g32",
    "int8-b16x32": "not int8-b16x32",
    "mxfp8-e5m2": "not mxfp8-e5m2",
    "mxfp6-e3m2": "not mxfp6-e3m2",
    "qoq-g64": "not qoq-g64",
    "fp8-block": "inputs of fp8-block weights are fp8-g128, not left alone",
}


@pytest.mark.parametrize("label", REFUSED)
def test_what_it_cannot_hold_is_refused_by_name(label, wide, tmp_path):
    with pytest.raises(PlanError, match=REFUSED[label]):
        write(quantize(wide, parse_format(label)), tmp_path)


def test_inputs_that_do_not_go_with_weights_are_refused(wide, tmp_path):
    wrong = {("nvfp4", "mxfp4"): "inputs of nvfp4 weights are nvfp4 or left alone, not mxfp4"}
    wrong |= {
        (
            "fp8-channel",
            "int8-token",
        ): "inputs of fp8-channel weights are fp8-token or fp8-tensor or left alone, not int8-token"
    }
    wrong |= {("mxfp4", "mxfp8"): "inputs of mxfp4 weights are mxfp4 or left alone, not mxfp8"}
    wrong |= {("int4-g32-asym", "fp8-token"): "inputs of int4-g32-asym weights are left alone, not fp8-token"}
    for (weights, inputs), message in wrong.items():
        with pytest.raises(PlanError, match=message):
            write(quantize(wide, parse_format(weights), parse_format(inputs)), tmp_path)


def test_a_matrix_scale_whose_reciprocal_is_not_exact(tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), NVFP4())
    for name, q in model.matrices.items():
        model.matrices[name] = replace(q, params=q.params | {"tensor": q.params["tensor"] * (1 + 2**-30)})
    with pytest.raises(
        PlanError, match="q_proj: the scale of the whole matrix is not the reciprocal of a float32 number"
    ):
        write(model, tmp_path)


DAMAGE = {
    "kind": ("fp8-channel", change_config(format="other"), None),
    "group layout": ("fp8-channel", change_group(format="float6"), "wanted one of pack-quantized, .*, found float6"),
    "dynamic weights": (
        "fp8-channel",
        change_group(dynamic=True),
        "found naive-quantized, 8-bit float per channel, dynamic",
    ),
    "asymmetric floats": (
        "fp8-channel",
        change_group(symmetric=False),
        "found naive-quantized, 8-bit float per channel",
    ),
    "six bits": ("mxfp8", change_group(num_bits=6), "found mxfp8-quantized, 6-bit float per group"),
    "groups of 16": ("mxfp4", change_group(group_size=16), "found mxfp4-pack-quantized, 4-bit float per group"),
    "no number": (
        "nvfp4",
        change_tensors(lambda t: t.pop(f"{UP}.weight_global_scale")),
        f"lacks {UP}.weight_global_scale",
    ),
    "wrong scale": (
        "mxfp8",
        change_tensors(lambda t: t.update({f"{UP}.weight_scale": t[f"{UP}.weight_scale"].float()})),
        r"weight_scale: wanted uint8 \[128, 2\], found float32",
    ),
    "wrong shape": (
        "mxfp4",
        change_tensors(lambda t: t.update({f"{UP}.weight_packed": t[f"{UP}.weight_packed"][:, :8].contiguous()})),
        r"weight_packed: wanted .*32.*, found .*8",
    ),
    "not a number": (
        "fp8-channel",
        change_tensors(lambda t: t[f"{UP}.weight"].view(torch.uint8).fill_(0x7F)),
        r"codes of .*up_proj: wanted below 253, found larger",
    ),
}


@pytest.mark.parametrize(("weights", "damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_artifacts(weights, damage, message, tiny_checkpoint, tmp_path):
    write(quantize(tiny_checkpoint("llama"), parse_format(weights)), tmp_path)
    damage(tmp_path)
    if message is None:  # each group says its own layout
        CompressedTensors().open(tmp_path).matrix(UP)
        return
    with pytest.raises(CheckpointError, match=message):
        CompressedTensors().open(tmp_path).matrix(UP)


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 0.0, -1.0])
def test_a_scale_of_a_matrix_that_decodes_to_nothing_names_it(value, tiny_checkpoint, tmp_path):
    write(quantize(tiny_checkpoint("llama"), NVFP4()), tmp_path)
    change_tensors(lambda t: t[f"{UP}.weight_global_scale"].fill_(value))(tmp_path)
    with pytest.raises(NumericsError, match=rf"{UP}\.weight_global_scale: wanted a positive number, found {value}"):
        CompressedTensors().open(tmp_path).tensor(f"{UP}.weight")
