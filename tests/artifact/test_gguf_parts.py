"""GGUF models in several files: what gguf's reader and llama.cpp find in them, and parts that do not fit together."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from qtool import registry
from qtool.artifact.gguf import GGUF
from qtool.artifact.gguf._writer import candidates, cut
from qtool.checkpoint.gguf_parts import part_path
from qtool.checkpoint.open import open_checkpoint
from qtool.errors import CheckpointError
from qtool.evaluate.llamacpp import LlamaCpp
from qtool.formats.int import Int
from tests.artifact.conftest import assert_same_model, quantize
from tests.artifact.test_gguf import TOKENS

LIMIT = 20_000


@pytest.mark.parametrize(
    ("sizes", "limit", "wanted"),
    [
        ([64, 64, 64], None, ["abc"]),
        ([64, 64, 64], 128, ["ab", "c"]),
        ([64, 64, 64], 127, ["a", "b", "c"]),
        ([64, 33, 64], 127, ["a", "b", "c"]),  # 33 bytes take 64
        ([200, 64, 64], 128, ["a", "bc"]),
        ([64, 200, 64], 128, ["a", "b", "c"]),
        ([64], 1, ["a"]),
    ],
)
def test_where_parts_end(sizes, limit, wanted):
    assert cut(dict(zip("abc", sizes, strict=False)), limit) == [list(part) for part in wanted]


def test_names():
    assert part_path(Path("x/a.b.gguf"), 0, 1) == Path("x/a.b.gguf")
    assert part_path(Path("x/a.b.gguf"), 1, 12) == Path("x/a.b-00002-of-00012.gguf")


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    """Quantized in memory; not all integers fit the same block type."""
    return quantize(tiny_checkpoint("llama"), registry.load("formats", "q4_0")(), v=Int(bits=4, group=32), o=None)


@pytest.fixture(scope="module")
def parts(model, tmp_path_factory):
    """The folder of a model in parts. Read only."""
    out = tmp_path_factory.mktemp("parts")
    GGUF(split_max_size=LIMIT).write(model, out, {"base_model": "tiny"})
    return out


@pytest.fixture
def copied(parts, tmp_path):
    """(paths of the parts in order) of a copy that may be changed."""
    shutil.copytree(parts, tmp_path / "copy")
    return sorted((tmp_path / "copy").glob("*.gguf"))


def test_parts_hold_what_a_single_file_holds(model, parts, tmp_path):
    (whole,) = GGUF().write(model, tmp_path, {"base_model": "tiny"})
    single = gguf.GGUFReader(whole)
    files = sorted(parts.glob("*.gguf"))
    names = [f"tiny-{i:05}-of-{len(files):05}.gguf" for i in range(1, len(files) + 1)]
    assert [path.name for path in files] == names
    assert len(files) > 5
    tensors = []
    for index, path in enumerate(files):
        reader = gguf.GGUFReader(path)
        told = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        split = {key: (told[key].types, told.pop(key).contents()) for key in list(told) if key.startswith("split.")}
        assert split == {
            "split.no": ([gguf.GGUFValueType.UINT16], index),
            "split.count": ([gguf.GGUFValueType.UINT16], len(files)),
            "split.tensors.count": ([gguf.GGUFValueType.INT32], len(single.tensors)),
        }
        wanted = {k: f.contents() for k, f in single.fields.items() if not k.startswith("GGUF.")} if index == 0 else {}
        assert {key: field.contents() for key, field in told.items()} == wanted
        total = sum(t.n_bytes + -t.n_bytes % 32 for t in reader.tensors)
        assert total <= LIMIT or len(reader.tensors) == 1
        tensors += reader.tensors
    assert [t.name for t in tensors] == [t.name for t in single.tensors]
    for found, wanted in zip(tensors, single.tensors, strict=True):
        assert (found.tensor_type, found.shape.tolist()) == (wanted.tensor_type, wanted.shape.tolist())
        np.testing.assert_array_equal(found.data, wanted.data)


def test_our_reader_joins_them(model, parts, tmp_path):
    GGUF().write(model, tmp_path, {})
    assert GGUF.recognizes(parts)
    first = min(parts.glob("*.gguf"))
    whole = GGUF().open(tmp_path)
    for found in (GGUF().open(parts), GGUF().open(first)):
        assert_same_model(found, whole)
    plain = open_checkpoint(str(first))
    assert all((plain.tensor(name) == whole.tensor(name)).all() for name in whole.names())
    assert plain.fingerprint() != whole.fingerprint()


def test_every_part_counts_for_the_fingerprint(copied):
    before = open_checkpoint(str(copied[0])).fingerprint()
    data = bytearray(copied[-1].read_bytes())
    data[-40] ^= 1
    copied[-1].write_bytes(data)
    assert open_checkpoint(str(copied[0])).fingerprint() != before


def test_llama_cpp_joins_them(model, parts, tmp_path):
    (whole,) = GGUF().write(model, tmp_path, {})
    found = LlamaCpp(min(parts.glob("*.gguf")), 64).logits(TOKENS)
    assert (found == LlamaCpp(whole, 64).logits(TOKENS)).all()


def test_one_part_is_a_plain_file(model, tmp_path):
    (path,) = GGUF(split_max_size=10**9).write(model, tmp_path, {"base_model": "tiny"})
    assert path.name == "tiny.gguf"
    assert not any(key.startswith("split.") for key in gguf.GGUFReader(path).fields)


def test_parts_stay_below_the_limit_whatever_block_types_integers_need(tiny_checkpoint, tmp_path):
    """Before a matrix is read it is not known which of the types that may hold it will."""
    fmt = Int(bits=4, group=32, symmetric=False)
    model = quantize(tiny_checkpoint("llama"), fmt)
    blocks = [block for block in candidates(fmt) if not block.misfit(64)]
    assert len({block.storage_bits(64, 64) for block in blocks}) > 1
    larger = False
    for limit in range(4_000, 16_000, 1_000):
        out = tmp_path / str(limit)
        out.mkdir()
        GGUF(split_max_size=limit).write(model, out, {})
        for path in out.glob("*.gguf"):
            tensors = gguf.GGUFReader(path).tensors
            assert len(tensors) == 1 or sum(t.n_bytes + -t.n_bytes % 32 for t in tensors) <= limit
            larger |= any(t.name.endswith("ffn_up.weight") and t.tensor_type != blocks[0].ggml_type for t in tensors)
    assert larger


def refused(path):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(path))
    return str(caught.value)


def test_another_part_than_the_first(copied):
    assert refused(copied[1]) == f"{copied[1]} is not the first part; open {copied[0].name}"


def test_a_part_is_missing(copied):
    copied[2].unlink()
    assert refused(copied[0]) == f"{copied[0]}: a part is missing: wanted {copied[2].name}"


def test_a_first_part_under_another_name(copied):
    for name in ("other.gguf", f"tiny-00001-of-{len(copied) + 1:05}.gguf"):
        renamed = copied[0].rename(copied[0].with_name(name))
        assert "is one of" in refused(renamed) and "wanted NAME-00001-of-" in refused(renamed)
        renamed.rename(copied[0])


def test_parts_in_another_order(copied):
    copied[1].write_bytes(copied[2].read_bytes())
    count = len(copied)
    assert refused(copied[0]) == f"{copied[1]} is another part: wanted 1 of {count}, found (2, {count})"


def replaced(path, old, new):
    data = path.read_bytes()
    assert data.count(old) == 1 and len(old) == len(new)
    path.write_bytes(data.replace(old, new))


def test_a_tensor_twice(copied):
    names = [gguf.GGUFReader(path).tensors[0].name.encode() for path in copied]
    (index,) = [i for i, name in enumerate(names) if name == b"blk.1.ffn_down.weight"]
    replaced(copied[index], b"blk.1.ffn_down.weight", b"blk.0.ffn_down.weight")
    assert (
        refused(copied[0]) == f"{copied[index]} holds a tensor that an earlier part holds: found blk.0.ffn_down.weight"
    )


def test_another_number_of_tensors(copied):
    key = b"split.tensors.count" + (5).to_bytes(4, "little")
    replaced(copied[0], key + (21).to_bytes(4, "little"), key + (20).to_bytes(4, "little"))
    assert refused(copied[0]) == f"{copied[0]}: wrong number of tensors in all parts: wanted 20, found 21"
