"""The neutral checkpoint gives back exactly what was put in, survives kills, and believes no manifest."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from qtool import registry
from qtool.artifact.qtool import Qtool
from qtool.checkpoint._base import Cache, Static
from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import CheckpointError, NumericsError, StorageError
from qtool.formats._spelling import parse_format
from qtool.formats.int import Int
from qtool.numerics.grids.bits import pack
from qtool.recipe.cache import parse_cache
from qtool.store.neutral import NeutralCheckpoint, NeutralWriter
from tests.artifact.conftest import assert_same_model, quantize, save_llama

RUN = {"recipe": "abc", "source": "def"}
FORMATS = [Int(bits=b, group=32, symmetric=b % 2 == 0) for b in range(2, 9)]
FORMATS += [
    Int(bits=3, group="channel"),
    Int(bits=8, group="tensor", scales="minmax"),
    Int(bits=4, group=16, scale_dtype="fp32"),
]


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.label}-{getattr(f, 'scale_dtype', '')}")
def test_every_format_comes_back(fmt, tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), fmt, down=None, embedding=fmt)
    Qtool().write(model, tmp_path, {})
    assert Qtool.recognizes(tmp_path)
    found = Qtool().open(tmp_path)
    assert found.layers == model.layers
    assert_same_model(found, model)


@pytest.fixture(scope="session")
def wide(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("wide"), 256, torch.bfloat16, blocks=1)


@pytest.mark.parametrize("name", registry.names("formats"))
def test_every_registered_format_comes_back(name, wide, tmp_path):
    cls = registry.load("formats", name)
    labels = [label for label in (name, *cls.examples) if cls.parse(label) is not None]
    formats = [parse_format(labels[0]), parse_format(labels[-1])]
    model = quantize(wide, None, o=formats[0], down=formats[1])
    Qtool().write(model, tmp_path, {})
    found = Qtool().open(tmp_path)
    assert found.layers == model.layers
    assert_same_model(found, model)


def test_every_family_comes_back(tiny_folder, tmp_path):
    model = quantize(tiny_folder, Int(bits=4, group=32), activations=Int(bits=8, group="token"))
    files = Qtool().write(model, tmp_path, {})
    found = Qtool().open(tmp_path)
    assert found.layers == model.layers
    assert_same_model(found, model)
    assert sorted(files) == sorted(tmp_path.iterdir())
    assert (tmp_path / "tokenizer.json").read_bytes() == (tiny_folder / "tokenizer.json").read_bytes()


def test_layout_on_disk(tiny_checkpoint, tmp_path):
    """By another reader: one file per block, 3-bit codes in a dense little-endian stream, parameters by name."""
    model = quantize(tiny_checkpoint("llama"), Int(bits=3, group=32, symmetric=False))
    Qtool().write(model, tmp_path, {})
    names = {p.name for p in tmp_path.glob("*.safetensors")}
    assert names == {"block-0.safetensors", "block-1.safetensors", "outside.safetensors"}
    module = "model.layers.1.mlp.down_proj"
    with safe_open(tmp_path / "block-1.safetensors", "pt") as file:
        assert set(file.keys()) >= {f"{module}.weight.{part}" for part in ("codes", "scale", "zero")}
        codes = file.get_tensor(f"{module}.weight.codes")
        assert torch.equal(file.get_tensor(f"{module}.weight.scale"), model.matrix(module).quantized.params["scale"])
    expected = model.matrix(module).quantized.codes
    assert codes.shape == (64, 48)
    for row, packed in zip(expected.tolist(), codes.tolist(), strict=True):
        assert int.from_bytes(bytes(packed), "little") == sum(code << (3 * i) for i, code in enumerate(row))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["version"] == 2
    assert manifest["blocks"]["block-1"]["layers"][module]["shape"] == [64, 128]


def test_same_bytes_again(tiny_checkpoint, tmp_path, tree):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        model = quantize(tiny_checkpoint("qwen3"), Int(bits=4, group=32))
        Qtool().write(model, tmp_path / name, {"base_model": "org/model", "recipe_name": "r"})
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def blocks_of(model):
    for i in range(2):
        prefix = f"model.layers.{i}."
        yield f"block-{i}", {m: model.matrix(m) for m in model.layers if m.startswith(prefix)}


def test_work_folder_with_its_source(tiny_checkpoint, tmp_path):
    source = HFCheckpoint(tiny_checkpoint("llama"))
    model = quantize(tiny_checkpoint("llama"), Int(bits=4, group=32))
    writer = NeutralWriter(tmp_path, RUN, keep={"lm_head": "f32", "model.embed_tokens": "source"})
    for key, layers in blocks_of(model):
        writer.enter(key, writer.write_block(key, layers, record={"tokens": 7}))
    found = NeutralCheckpoint(tmp_path, source)
    head = found.tensor("lm_head.weight")
    assert found.info("lm_head.weight").dtype == head.dtype == torch.float32
    assert torch.equal(head, source.tensor("lm_head.weight").float())
    assert found.tensor("model.embed_tokens.weight").dtype == torch.bfloat16
    assert {m: layer.format for m, layer in found.layers.items()} == {m: x.format for m, x in model.layers.items()}
    (tmp_path / "alone").mkdir()
    Qtool().write(found, tmp_path / "alone", {})
    assert_same_model(Qtool().open(tmp_path / "alone"), found)


def test_a_cast_that_overflows_is_an_error(tiny_checkpoint, tmp_path):
    source = HFCheckpoint(tiny_checkpoint("llama"))
    NeutralWriter(tmp_path, RUN, keep={"lm_head": "f16"})
    found = NeutralCheckpoint(tmp_path, source)
    assert torch.equal(found.tensor("lm_head.weight"), source.tensor("lm_head.weight").half())
    source.tensor = lambda name: torch.full((512, 64), 1e6, dtype=torch.bfloat16)
    with pytest.raises(NumericsError, match=r"lm_head\.weight is not finite"):
        found.tensor("lm_head.weight")


def test_finished_blocks_are_those_that_are_whole(tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), Int(bits=4, group=32))
    writer = NeutralWriter(tmp_path, RUN)
    assert writer.finished() == {}
    for key, layers in blocks_of(model):
        writer.enter(key, writer.write_block(key, layers, record={"tokens": 7}))
    whole = {"block-0": {"tokens": 7}, "block-1": {"tokens": 7}}
    assert NeutralWriter(tmp_path, RUN).finished() == whole
    damaged = tmp_path / "block-0.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    again = NeutralWriter(tmp_path, RUN)
    assert again.finished() == {"block-1": {"tokens": 7}}
    key, matrices = next(blocks_of(model))
    again.enter(key, again.write_block(key, matrices, record={"tokens": 7}))
    assert NeutralWriter(tmp_path, RUN).finished() == whole
    assert_same_model(NeutralCheckpoint(tmp_path, model.origin), model)


def test_another_run_is_refused(tmp_path):
    NeutralWriter(tmp_path, RUN)
    with pytest.raises(StorageError, match="was begun by another run; run it with the recipe and model"):
        NeutralWriter(tmp_path, RUN | {"recipe": "other"})


KILLED = """
import sys, torch
from pathlib import Path
from qtool.store.neutral import NeutralWriter
from qtool.formats.int import Int
from qtool.numerics.grids.bits import pack
fmt = Int(bits=4, group=32, scales="minmax")
writer = NeutralWriter(Path(sys.argv[1]), {"recipe": "abc"})
print("ready", flush=True)
for i in range(100000):
    if f"block-{i}" not in writer.finished():
        w = torch.randn(256, 256, generator=torch.Generator().manual_seed(i))
        params = fmt.fit(w)
        from qtool.formats._base import Quantized
        from qtool.residuals._base import Matrix
        matrix = Matrix(Quantized(fmt.snap(w, params), params, fmt))
        writer.enter(f"block-{i}", writer.write_block(f"block-{i}", {f"m{i}": matrix}))
        print(i, flush=True)
    if i == 30:
        break
"""


def test_killed_at_any_moment_it_continues_to_the_same_bytes(tmp_path, tree):
    command = [sys.executable, "-c", KILLED]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True, env=environment)
    folder = tmp_path / "killed"
    for after in (1, 4):
        with subprocess.Popen([*command, str(folder)], stdout=subprocess.PIPE, env=environment) as process:
            for _ in range(after):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    subprocess.run([*command, str(folder)], check=True, capture_output=True, env=environment)
    assert tree(folder) == tree(tmp_path / "whole")


def edit(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


MODULE = "model.layers.0.mlp.up_proj"
LIES = {
    "newer version": (lambda m: m.update(version=3), "no manifest of a neutral checkpoint: version"),
    "half a character": (lambda m: m.update(run={"model": "\ud800"}), "is damaged: wanted text in Unicode"),
    "unknown key": (lambda m: m.update(extra=1), "no manifest of a neutral checkpoint: extra"),
    "block without number": (
        lambda m: m["blocks"].update({"block-x": m["blocks"].pop("block-0")}),
        "impossible block name",
    ),
    "path outside": (lambda m: m["blocks"].update({"../x": m["blocks"].pop("block-0")}), "impossible block name"),
    "unknown format": (lambda m: layer(m).update(format="int9-g32"), "no format is called 'int9-g32'"),
    "another format": (lambda m: layer(m).update(format="q4_0"), "parameters of .* do not fit q4_0"),
    "wider codes": (lambda m: layer(m).update(format="int8-g32"), "codes of .*up_proj: wanted .*64"),
    "other groups": (
        lambda m: layer(m).update(format="int4-g64"),
        "scales of .*up_proj: wanted .128, 1., found .128, 2.",
    ),
    "zero points": (lambda m: layer(m).update(format="int4-g32-asym"), "parameters of .*: found 'zero'"),
    "shape": (lambda m: layer(m).update(shape=[64, 128]), "up_proj.weight does not fit config.json"),
    "missing block": (lambda m: m["blocks"].pop("block-1"), "lacks 9 of the"),
    "cache": (lambda m: m.update(kv_cache="nvint4"), "format of the KV cache: .*found nvint4"),
    "no scales": (
        lambda m: m.update(kv_cache="fp8-tensor"),
        r"KV cache of block-0: wanted \[1, 1\] for fp8-tensor, found",
    ),
    "few scales": (
        lambda m: (m.update(kv_cache={"keys": "int4-channel", "values": "fp8-head"}), scales(m, 1, 2)),
        r"KV cache of block-0: wanted \[32, 2\] for int4-channel keys and fp8-head values, found \[1, 2\]",
    ),
    "zero point": (lambda m: layer(m).update(static=[0.5, 300]), "no manifest .*static.1: .*less than or equal to 127"),
    "negative scale": (lambda m: layer(m).update(static=[-0.5, 0]), "no manifest .*static.0: .*greater than 0"),
    "scale of a cache": (
        lambda m: m["blocks"]["block-0"].update(cache=[[[0.0, 0]], [[0.5, 0]]]),
        r"no manifest .*cache.0.0.0: .*greater than 0",
    ),
    "scales of nothing": (
        lambda m: (m.update(kv_cache="int4-token"), scales(m, 1, 1)),
        r"KV cache of block-0: wanted \[0, 0\] for int4-token, found \[1, 1\]",
    ),
}


def layer(manifest):
    return manifest["blocks"]["block-0"]["layers"][MODULE]


def scales(manifest, *counts):
    manifest["blocks"]["block-0"]["cache"] = [[[0.5, 0]] * count for count in counts]


@pytest.mark.parametrize(("change", "message"), LIES.values(), ids=LIES)
def test_lies_in_the_manifest(change, message, tiny_checkpoint, tmp_path):
    Qtool().write(quantize(tiny_checkpoint("llama"), Int(bits=4, group=32)), tmp_path, {})
    edit(tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        Qtool().open(tmp_path).matrix(MODULE)


def test_missing_file(tiny_checkpoint, tmp_path):
    Qtool().write(quantize(tiny_checkpoint("llama"), Int(bits=4, group=32)), tmp_path, {})
    (tmp_path / "block-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"block-1.safetensors cannot be read: No such file"):
        Qtool().open(tmp_path)


def test_specification_tells_the_truth(tiny_checkpoint, tmp_path):
    """The manifest in the documentation has the keys of a real one, and its bytes are what is packed."""
    text = (Path(__file__).parents[2] / "docs" / "neutral-checkpoint.md").read_text()
    example = json.loads(text.split("```json")[1].split("```")[0])
    Qtool().write(quantize(tiny_checkpoint("llama"), Int(bits=4, group=32)), tmp_path, {"recipe_name": "w4a16"})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert example.keys() == manifest.keys()
    assert example["run"] == manifest["run"]
    documented, real = example["blocks"]["block-0"], manifest["blocks"]["block-0"]
    assert documented.keys() == real.keys()
    assert documented["layers"][MODULE] == real["layers"][MODULE]
    assert bytes(pack(torch.arange(8, dtype=torch.uint8), 3).tolist()) == bytes.fromhex("88c6fa")
    assert "`88 c6 fa`" in text


def test_a_cache_as_the_first_version_wrote_it(tiny_checkpoint, tmp_path):
    model = quantize(tiny_checkpoint("llama"), Int(bits=4, group=32))
    model.cache = Cache(parse_cache("int8-tensor-asym"), {i: ((Static(0.5, i),), (Static(0.25, 3),)) for i in range(2)})
    Qtool().write(model, tmp_path, {})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for i in range(2):
        assert manifest["blocks"][f"block-{i}"]["cache"] == [[[0.5, i]], [[0.25, 3]]]
        manifest["blocks"][f"block-{i}"]["cache"] = [[0.5, i], [0.25, 3]]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert Qtool().open(tmp_path).cache == model.cache
