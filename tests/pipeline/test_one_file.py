"""`-o NAME.gguf`: the file, its folder, what cannot become one file, and files that are in the way."""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import replace

import pytest

from qtool.errors import StorageError, UsageError
from qtool.pipeline import compare
from qtool.pipeline.one_file import described, folder_of, same
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.pipeline.update import result_of
from qtool.store.files import damaged_file


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_and_what_is_said_about_it(tiny_checkpoint, recipes, tmp_path):
    out = tmp_path / "model.Q8_0.gguf"
    options = QuantizeOptions(str(tiny_checkpoint("qwen3")), recipes["gguf"], out, device="cpu")
    report = run(options)
    folder = tmp_path / "model.Q8_0.report"
    assert folder_of(out) == folder
    assert sorted(p.name for p in tmp_path.iterdir()) == [out.name, folder.name]
    (entry,) = [f for f in report.artifacts[0].files if f.name.endswith(".gguf")]
    assert digest(out) == entry.sha256
    assert damaged_file(folder) is None
    assert (folder / "report.html").is_file()
    assert described(out) == result_of(out) == folder
    assert compare.entry(str(out), "m").kind == "tiny-gguf"
    other = tmp_path / "model.gguf"
    other.write_bytes(out.read_bytes()[:-1])
    shutil.copytree(folder, tmp_path / "model.report")
    assert described(other) == other
    assert [described(place) for place in (folder, tmp_path / "no.gguf")] == [folder, tmp_path / "no.gguf"]
    shutil.rmtree(tmp_path / "model.report")
    other.unlink()
    run(replace(options, out=tmp_path / "folder"))
    assert digest(next((tmp_path / "folder").glob("*.gguf"))) == digest(out)
    with pytest.raises(StorageError, match="the output folder holds an earlier output"):
        run(options)
    before = out.stat().st_ino
    run(replace(options, overwrite=True))
    assert digest(out) == entry.sha256
    assert out.stat().st_ino != before


def test_a_file_that_is_in_the_way(tiny_checkpoint, recipes, tmp_path):
    out = tmp_path / "model.gguf"
    out.write_text("mine")
    options = QuantizeOptions(str(tiny_checkpoint("qwen3")), recipes["gguf"], out, device="cpu")
    with pytest.raises(StorageError, match=r"the output is occupied: found .*model\.gguf; pass --overwrite"):
        run(options)
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]
    assert out.read_text() == "mine"
    run(replace(options, overwrite=True))
    assert out.read_bytes()[:4] == b"GGUF"


def test_files_are_the_same_by_their_bytes(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    content = bytes(range(256)) * 6000  # more than is read at a time
    one.write_bytes(content)
    two.write_bytes(content)
    assert same(one, two)
    for at in (0, 1 << 20, len(content) - 1):
        two.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert not same(one, two)
    two.write_bytes(content[:-1])
    assert not same(one, two)
    two.unlink()
    two.hardlink_to(one)
    assert same(one, two)


def test_what_is_no_single_file(tiny_checkpoint, recipes, tmp_path):
    options = QuantizeOptions(str(tiny_checkpoint("qwen3")), recipes["compressed"], tmp_path / "m.gguf", device="cpu")
    with pytest.raises(UsageError, match=r"--out m\.gguf: wanted a recipe that exports one GGUF file, or a folder"):
        run(options)
    with pytest.raises(UsageError, match="found several files"):
        run(replace(options, recipe=recipes["gguf"], options={"split_max_size": 100_000}))
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_not_written_over_itself(tiny_checkpoint, recipes, tmp_path):
    out = tmp_path / "model.gguf"
    options = QuantizeOptions(str(tiny_checkpoint("qwen3")), recipes["gguf"], out, device="cpu")
    run(options)
    with pytest.raises(StorageError, match="holds what the result is made from"):
        run(replace(options, model=str(out), overwrite=True))
