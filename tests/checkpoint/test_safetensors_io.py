from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from qtool.checkpoint._base import TensorInfo
from qtool.checkpoint.safetensors_header import DTYPES
from qtool.checkpoint.safetensors_io import SafetensorsFile, SafetensorsWriter
from qtool.errors import CheckpointError, StorageError


def tensors() -> dict[str, torch.Tensor]:
    """One tensor of every type that the format and torch share, of odd sizes, and the edge cases of shape."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, dtype in DTYPES.items():
        raw = torch.randint(0, 2 if dtype is torch.bool else 256, (15 * dtype.itemsize,), generator=generator)
        found[f"some.{name}"] = raw.to(torch.uint8).view(dtype).view(5, 3)
    return found | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "Ünïcode": torch.ones(3)}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def write(path: Path, content: dict[str, torch.Tensor]) -> None:
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in content.items()}
    with SafetensorsWriter(path, infos) as writer:
        for name in reversed(content):  # any order will do
            writer.add(name, content[name])


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "x", {"format": "pt", "by": "library"})
    file = SafetensorsFile(tmp_path / "x")
    assert file.metadata == {"format": "pt", "by": "library"}
    assert set(file.entries) == set(tensors())
    for name, tensor in tensors().items():
        assert same(file.read(name), tensor)
        assert file.info(name) == TensorInfo(tuple(tensor.shape), tensor.dtype)
        if name.startswith("some."):
            assert same(file.read(name, 1, 3), tensor[1:3])


def test_the_library_reads_what_was_written(tmp_path: Path) -> None:
    write(tmp_path / "x", tensors())
    loaded = load_file(tmp_path / "x")
    assert set(loaded) == set(tensors())
    assert all(same(loaded[name], tensor) for name, tensor in tensors().items())
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_bytes_on_disk(tmp_path: Path) -> None:
    write(tmp_path / "x", {"b": torch.tensor([1], dtype=torch.uint8), "a": torch.tensor([[1.0, -2.0]])})
    header = (
        b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
        b'"b":{"dtype":"U8","shape":[1],"data_offsets":[8,9]}}'
    )
    header += b" " * (-len(header) % 8)
    data = bytes.fromhex("0000803f 000000c0 01")
    assert (tmp_path / "x").read_bytes() == len(header).to_bytes(8, "little") + header + data


def test_rows_arrive_one_after_the_other(tmp_path: Path) -> None:
    matrix = torch.randn(10, 7).bfloat16()
    with SafetensorsWriter(tmp_path / "x", {"m": TensorInfo((10, 7), torch.bfloat16)}) as writer:
        writer.add("m", matrix[6:], start=6)
        writer.add("m", matrix[:6])
    assert same(load_file(tmp_path / "x")["m"], matrix)


def test_an_unfinished_file_is_noticed(tmp_path: Path) -> None:
    infos = {"a": TensorInfo((2,), torch.float32), "b": TensorInfo((2,), torch.float32)}
    writer = SafetensorsWriter(tmp_path / "x", infos)
    writer.add("a", torch.zeros(2))
    with pytest.raises(ValueError, match=r"announced.*float64"):
        writer.add("b", torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"before these were written: b"):
        writer.close()


def test_full_disk() -> None:
    with pytest.raises(StorageError, match=r"cannot write /dev/full: No space left on device; free some space"):
        SafetensorsWriter(Path("/dev/full"), {"a": TensorInfo((2,), torch.float32)})


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"No such file or directory"):
        SafetensorsWriter(tmp_path / "none" / "x", {})


def header(**claims: Any) -> bytes:
    raw = json.dumps(claims).encode()
    return len(raw).to_bytes(8, "little") + raw


def claim(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


EIGHT, SIXTEEN = b"\0" * 8, b"\0" * 16
HOSTILE = {
    "empty": (b"", "ends inside its header"),
    "truncated-length": (b"\x08\0\0", "ends inside its header"),
    "length-behind-end": ((100).to_bytes(8, "little") + b"{}", r"header length.*at most 2, found 100"),
    "length-huge": (b"\xff" * 8 + b"{}", "impossible header length"),
    "not-utf8": ((4).to_bytes(8, "little") + b'{"\xff"', "not valid JSON"),
    "not-json": ((4).to_bytes(8, "little") + b"{{{{", "not valid JSON"),
    "deep-json": ((10**5).to_bytes(8, "little") + b"[" * 10**5, "not valid JSON"),
    "not-an-object": ((2).to_bytes(8, "little") + b"[]", "wanted a JSON object, found list"),
    "name-twice": ((17).to_bytes(8, "little") + b'{"a": 1, "a": 2 }', "a name occurs twice"),
    "metadata-no-strings": (header(__metadata__={"a": 1}), "wrong __metadata__"),
    "claim-no-object": (header(a=3), r"tensor 'a' is described wrongly"),
    "claim-incomplete": (header(a={"dtype": "F32"}), r"tensor 'a' is described wrongly"),
    "unknown-dtype": (header(a=claim("F31")) + EIGHT, r"tensor 'a' has an unknown dtype: .*found 'F31'"),
    "dtype-no-string": (header(a=claim(["F32"])) + EIGHT, r"tensor 'a' has an unknown dtype"),
    "negative-shape": (header(a=claim(shape=(-2, -1))) + EIGHT, "impossible shape"),
    "fractional-shape": (header(a=claim(shape=(2.0,))) + EIGHT, "impossible shape"),
    "boolean-shape": (header(a=claim(shape=(True, 2))) + EIGHT, "impossible shape"),
    "overflowing-shape": (header(a=claim(shape=(2**62, 2**62))) + EIGHT, r"wrong size"),
    "overflowing-extent": (header(a=claim(shape=(2**64 + 2,))) + EIGHT, r"impossible shape"),
    "three-offsets": (header(a=claim(offsets=(0, 4, 8))) + EIGHT, "impossible shape or offsets"),
    "offsets-backward": (header(a=claim(offsets=(8, 0))) + EIGHT, r"wrong size: wanted 8 bytes, found -8"),
    "size-lies": (header(a=claim(offsets=(0, 4))) + EIGHT, r"wrong size: wanted 8 bytes, found 4"),
    "overlap": (header(a=claim(), b=claim(offsets=(4, 12))) + SIXTEEN, r"tensor 'b' leaves a gap or overlaps"),
    "same-place": (header(a=claim(), b=claim()) + EIGHT, r"tensor 'b' leaves a gap or overlaps: wanted 8, found 0"),
    "gap": (header(a=claim(offsets=(8, 16))) + SIXTEEN, r"tensor 'a' leaves a gap or overlaps: wanted 0, found 8"),
    "truncated": (header(a=claim()) + b"\0" * 7, r"truncated or too long"),
    "trailing": (header(a=claim()) + b"\0" * 9, r"truncated or too long"),
    "empty-name": (header(**{"": claim()}) + EIGHT, "impossible name"),
    "control-character": (header(**{"a\x1b[31m": claim()}) + EIGHT, r"impossible name"),
    "endless-name": (header(**{"a" * 600: claim()}) + EIGHT, "impossible name"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile(case: str, tmp_path: Path) -> None:
    content, message = HOSTILE[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_what_only_the_library_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, framework: str) -> None:
        raise SafetensorError(f"not in {framework}\nat all")

    monkeypatch.setattr("qtool.checkpoint.safetensors_io.safe_open", refuse)
    (tmp_path / "x").write_bytes(header(a=claim()) + EIGHT)
    with pytest.raises(CheckpointError, match=r"x is no safetensors file: not in pt at all$"):
        SafetensorsFile(tmp_path / "x")


def test_parts_of_a_large_tensor_and_of_a_stack(tmp_path: Path) -> None:
    stack = torch.arange(3 * 11 * 5).view(3, 11, 5).half()
    save_file({"stack": stack, "flat": stack.flatten().clone(), "none": stack[:, :0].clone()}, tmp_path / "x")
    file = SafetensorsFile(tmp_path / "x")
    assert same(file.read("stack"), stack)
    assert same(file.read("flat", 2, 160), stack.flatten()[2:160])
    assert same(file.read("stack", 3, 9, index=2), stack[2, 3:9])
    assert same(file.read("stack", 1, 1), stack[1:1])
    assert same(file.read("none"), stack[:, :0])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [(Path.unlink, "No such file or directory"), (truncate, r"ends inside 'a': wanted 8 bytes, found 7")],
    ids=["vanished", "truncated"],
)
def test_changed_after_opening(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(header(a=claim()) + EIGHT)
    file = SafetensorsFile(path)
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        file.read("a")


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (1, 0), (0, 3)])
def test_rows_that_are_not_there(start: int, stop: int, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(header(a=claim()) + EIGHT)
    with pytest.raises(CheckpointError, match=r"tensor 'a' has 2 rows"):
        SafetensorsFile(path).read("a", start, stop)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    count, size = 32, 2**23
    claims = {f"t{i}": claim("U8", (1, size), (i * size, (i + 1) * size)) for i in range(count)}
    with (tmp_path / "x").open("wb") as sparse:
        sparse.write(header(**claims))
        sparse.truncate(sparse.tell() + count * size)
    program = f"""
import resource
from pathlib import Path
from qtool.checkpoint.safetensors_io import SafetensorsFile
file = SafetensorsFile(Path({str(tmp_path / "x")!r}))
file.read("t0")
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
print(sum(file.read(name).shape[1] for name in file.entries), peak() - before)
"""
    read, grown = map(int, subprocess.check_output([sys.executable, "-c", program]).split())
    assert read == count * size
    assert grown * 1024 < 8 * size  # of 32; what the allocator keeps differs from run to run
