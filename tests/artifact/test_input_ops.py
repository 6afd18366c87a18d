"""Operations on inputs: simulated, stored, carried by those that can be told of them, refused by all others."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool import registry
from qtool.artifact.compressed_tensors import CompressedTensors
from qtool.artifact.qtool import Qtool
from qtool.calibrate.inputs import quantize_tokens
from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import Checkpoint, Layer, Module
from qtool.checkpoint.edits import Edit
from qtool.checkpoint.hf import HFCheckpoint
from qtool.checkpoint.rewritten import Rewritten
from qtool.errors import CheckpointError, PlanError
from qtool.formats._spelling import parse_format
from qtool.formats.int import Int
from qtool.ops._base import InputOp
from qtool.ops.hadamard import Hadamard
from qtool.ops.orthogonal import Orthogonal
from qtool.ops.permutation import Permutation
from qtool.ops.scale import Scale
from qtool.ops.shift import Shift
from tests.artifact.conftest import InMemory, assert_same_model

TOKENS = torch.arange(3, 40).view(1, -1)
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def plain(k: int, block: int = 16) -> Hadamard:
    return Hadamard(block, torch.ones(k, dtype=torch.int8))


def several(k: int) -> tuple[InputOp, ...]:
    """One of each that needs no bias."""
    signs = (torch.randint(0, 2, (k,), generator=generator()) * 2 - 1).to(torch.int8)
    order = torch.randperm(k, generator=generator())
    q = torch.linalg.qr(torch.randn(k // 8, 8, 8, generator=generator())).Q
    factors = torch.rand(k, generator=generator()) + 0.5
    return Scale(factors), Permutation(order), Hadamard(k, signs), Orthogonal(q)


def made(folder: Path, ops: Callable[[Module], tuple[InputOp, ...]], weights: str, inputs: str | None) -> InMemory:
    """Every linear layer of the blocks quantized, behind operations."""
    origin = HFCheckpoint(folder)
    chosen: dict[str, tuple[InputOp, ...]] = {}
    activations = parse_format(inputs) if inputs else None

    def choose(module: Module) -> Layer | None:
        if module.block is None:
            return None
        chosen[module.name] = ops(module)
        return Layer(parse_format(weights), activations, input_ops=chosen[module.name])

    InMemory(origin, choose)
    edits = [Edit("", op, (module,)) for module, own in chosen.items() for op in own]
    return InMemory(Rewritten(origin, edits), choose)


def ours(model: Checkpoint) -> Tensor:
    """Logits of our evaluation, [T, V]."""
    walker = Walker(model, torch.device("cpu"), torch.float32)
    hidden = walker.embed(TOKENS)
    for i in range(len(walker.blocks)):
        walker.advance(walker.load_block(i), i, hidden)
    return walker.logits(hidden, 0)


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("inputs", [None, "int8-token"])
def test_evaluation_does_them_before_it_rounds(
    inputs: str | None, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = made(tiny_checkpoint("llama"), lambda m: several(m.shape[1]), "int8-channel", inputs)
    theirs = AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama"), dtype=torch.float32).eval()
    state = {name: model.tensor(name).float() for name in model.names()}
    theirs.load_state_dict(state)
    for name, layer in model.layers.items():

        def before(_: torch.nn.Module, x: tuple[Tensor, ...], layer: Layer = layer) -> Tensor:
            y = x[0]
            for op in layer.input_ops:
                eye = torch.eye(op.width)
                y = y @ op.apply(eye)  # all of these are linear
            return quantize_tokens(y, layer.activations) if layer.activations else y

        theirs.get_submodule(name).register_forward_pre_hook(before)
    with torch.inference_mode():
        expected = theirs(TOKENS).logits[0]
    assert apart(ours(model), expected) < (0.02 if inputs else 1e-5)  # an input on a tie may fall either way
    original = ours(HFCheckpoint(tiny_checkpoint("llama")))
    assert apart(expected, original) < 0.1
    model.layers = {name: replace(layer, input_ops=layer.input_ops[:3]) for name, layer in model.layers.items()}
    assert apart(ours(model), original) > 0.5


def test_what_is_measured_comes_out_of_them(tiny_checkpoint: Callable[[str], Path]) -> None:
    model, op = HFCheckpoint(tiny_checkpoint("llama")), plain(64)
    seen: list[Tensor] = []
    for checkpoint in (model, Rewritten(model, [Edit("", op, (UP,))])):
        walker = Walker(checkpoint, torch.device("cpu"), torch.float32)
        hidden, block = walker.embed(TOKENS), walker.load_block(0)
        (up,) = (m for m in walker.modules[0] if m.name == UP)
        walker.linear(block, up).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        walker.advance(block, 0, hidden)
    torch.testing.assert_close(seen[1], op.apply(seen[0]), rtol=0, atol=1e-5)
    assert apart(seen[1], seen[0]) > 0.5


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_they_come_back_from_the_neutral_checkpoint(
    name: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = made(tiny_checkpoint(name), lambda m: several(m.shape[1]), "int4-g32", "int8-token")
    Qtool().write(model, tmp_path, {})
    found = Qtool().open(tmp_path)
    assert found.layers == model.layers
    assert_same_model(found, model)
    assert torch.equal(ours(found), ours(model))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    told = manifest["blocks"]["block-0"]["layers"]["model.layers.0.self_attn.o_proj"]["input_ops"]
    assert told == [{"scale": {}}, {"permutation": {}}, {"hadamard": {"block": 64}}, {"orthogonal": {}}]
    manifest["version"] = 1
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="wanted version 2, found version 1"):
        Qtool().open(tmp_path)


def test_a_shift_comes_back(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    shift = Shift(torch.randn(128, generator=generator()))
    ops = {DOWN: (shift,)}
    model = made(tiny_checkpoint("llama-biased"), lambda m: ops.get(m.name, ()), "int8-channel", None)
    Qtool().write(model, tmp_path, {})
    assert Qtool().open(tmp_path).layers[DOWN].input_ops == (shift,)
    assert apart(ours(Qtool().open(tmp_path)), ours(HFCheckpoint(tiny_checkpoint("llama-biased")))) < 0.1


DAMAGE = {
    "missing": (lambda t: t.pop(f"{DOWN}.input_op.0.signs"), "an input's hadamard is damaged"),
    "sign": (lambda t: t[f"{DOWN}.input_op.0.signs"].fill_(2), "signs are 1 or -1"),
    "width": (lambda t: t.update({f"{DOWN}.input_op.0.signs": torch.ones(64, dtype=torch.int8)}), "128 channels"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_ones_are_refused(damage: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    change, message = DAMAGE[damage]
    model = made(tiny_checkpoint("llama"), lambda m: (plain(m.shape[1]),), "int4-g32", None)
    Qtool().write(model, tmp_path, {})
    tensors = load_file(tmp_path / "block-0.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "block-0.safetensors")
    with pytest.raises(CheckpointError, match=message):
        Qtool().open(tmp_path)


@pytest.mark.parametrize("told", [{"hadamard": {"block": 3}}, {"wavelet": {}}, {}])
def test_unknown_ones_are_refused(told: object, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = made(tiny_checkpoint("llama"), lambda m: (plain(m.shape[1]),), "int4-g32", None)
    Qtool().write(model, tmp_path, {})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["blocks"]["block-0"]["layers"][DOWN]["input_ops"] = [told]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"hadamard|input_ops of"):
        Qtool().open(tmp_path)


def test_all_other_artifacts_refuse_all_but_one_kind(tiny_checkpoint: Callable[[str], Path]) -> None:
    module = Module(UP, (), "linear", "up", 0, "model.layers.0.mlp_in", None, (128, 64))
    layer, expert = Layer(Int(bits=4, group=32)), replace(module, expert=1)
    signed = Hadamard(16, plain(64).signs.index_fill(0, torch.tensor(1), -1))
    cases = [(module, op) for op in (*several(64), Hadamard(12, torch.ones(60, dtype=torch.int8)), signed)] + [
        (expert, plain(64))
    ]
    for name in registry.names("artifact"):
        artifact = registry.load("artifact", name)()
        for where, op in cases:
            verdict = artifact.can_carry(where, replace(layer, input_ops=(op,)), "source")
            assert verdict.possible == (name == "qtool"), (name, op)
        verdict = artifact.can_carry(module, replace(layer, input_ops=(plain(64),)), "source")
        assert verdict.possible == (name in ("qtool", "compressed-tensors"))
    twice = CompressedTensors().can_carry(module, replace(layer, input_ops=(plain(64), plain(64, 32))), "source")
    assert twice.reason == "inputs behind more than one operation; the qtool artifact has them"
    model = made(tiny_checkpoint("llama"), lambda m: (plain(m.shape[1]),), "int4-g32", None)
    with pytest.raises(PlanError, match="its runtimes cannot be told to do hadamard-16 to inputs; qtool can"):
        registry.load("artifact", "mlx")().check(model)


@pytest.mark.parametrize(("weights", "inputs"), [("int4-g32", None), ("int8-channel", "int8-token")])
def test_compressed_tensors_by_its_own_code(
    weights: str, inputs: str | None, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    from compressed_tensors.transform import TransformConfig, apply_transform_config
    from transformers import AutoModelForCausalLM

    blocks = {"down": 32, "o": 64}
    folder = tiny_checkpoint("llama-biased")
    model = made(folder, lambda m: (plain(m.shape[1], blocks.get(m.role, 16)),), weights, inputs)
    CompressedTensors().write(model, tmp_path, {})
    told = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["transform_config"]
    assert sorted(told["config_groups"]) == ["hadamard_16", "hadamard_32", "hadamard_64"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        without = loaded(TOKENS).logits[0]  # the first pass decodes the weights
        apply_transform_config(loaded, TransformConfig.model_validate(told))
        found = loaded(TOKENS).logits[0]
    expected = ours(model)
    assert apart(found, expected) < (0.02 if inputs else 1e-5)  # an input on a tie may fall either way
    assert apart(without, expected) > 0.5
    again = CompressedTensors().open(tmp_path)
    assert again.input_ops == model.input_ops
    assert torch.equal(ours(again), expected)
    caveats = CompressedTensors().caveats(model, model.layers)
    assert any(
        text.startswith(f"transformers leaves out the Hadamard matrices in front of {weights}") for text in caveats
    )


GROUP = {"type": "hadamard", "head_dim": 16, "apply": [{"targets": ["Linear"], "location": "input", "ignore": []}]}
FOREIGN = {
    "random": (GROUP | {"type": "random-hadamard"}, "wanted hadamard at input, found random-hadamard at input"),
    "shuffled": (GROUP | {"randomize": True}, "found hadamard with randomize at input"),
    "output": (GROUP | {"apply": [{"targets": ["Linear"], "location": "output"}]}, "found hadamard at output"),
    "kept": (GROUP, "wanted quantized layers, found lm_head"),
    "order": (GROUP | {"head_dim": 24, "apply": [{"targets": ["re:.*up"], "location": "input"}]}, "runs of 24"),
    "nonsense": ({"type": 3}, "wrong transform_config"),
    "list": ([], "wrong transform_config"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_what_we_do_not_follow_is_refused(what: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    group, message = FOREIGN[what]
    with pytest.raises(CheckpointError, match=message):
        CompressedTensors().open(rewritten_config(tiny_checkpoint("llama"), tmp_path, {"x": group}))


def test_what_was_done_to_stored_weights_needs_nothing_more(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """As llm-compressor says of rotations that are folded away."""
    places = [{"targets": ["Linear"], "location": location} for location in ("weight_input", "weight_output")]
    groups = {"R1": GROUP | {"type": "random-hadamard", "apply": places}}
    found = CompressedTensors().open(rewritten_config(tiny_checkpoint("llama"), tmp_path, groups))
    assert not found.input_ops


def rewritten_config(origin: Path, folder: Path, groups: object) -> Path:
    """An artifact with another transform_config."""
    CompressedTensors().write(made(origin, lambda m: (), "int4-g32", None), folder, {})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["transform_config"] = {"config_groups": groups}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
