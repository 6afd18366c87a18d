"""Asks llama.cpp which biases it reads of each architecture, and writes qtool/checkpoint/families/_biases.py.

To a tiny model of each kind one bias of every block is added that the file did not have. Either llama.cpp says that
there are too many tensors, or it reads the bias; and if it also adds it, logits are others. And each bias that the file
has is left out once: llama.cpp then does not load it, or computes nothing, or it can do without.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import tiny
from qtool import registry
from qtool.artifact.gguf import GGUF
from qtool.checkpoint._base import QuantizedCheckpoint
from qtool.checkpoint.config import FAMILIES
from qtool.checkpoint.families._gguf import kind_of
from qtool.checkpoint.gguf_io import GGUFFile
from qtool.checkpoint.hf import HFCheckpoint
from qtool.errors import CheckpointError
from qtool.evaluate.llamacpp import try_file
from qtool.models import fit
from qtool.store.gguf_writer import Container, Value
from tests.artifact.conftest import InMemory
from tests.conftest import make_tokenizer

TARGET = Path(__file__).parents[1] / "qtool/checkpoint/families/_biases.py"
TOKENS = [(7 * i * i + 3 * i) % 500 for i in range(8)]
HEADER = '''"""Biases that llama.cpp adds, and those that it wants, as it told `benchmarks/gguf_biases.py`."""

from __future__ import annotations

from collections.abc import Mapping

READ: Mapping[str, str] = {
'''
BETWEEN = '''}
"""Architecture -> what GGUF calls the tensors that may have a bias there, below their block."""

WANTED: Mapping[str, str] = {
'''
FOOTER = '''}
"""The same of tensors that must have one: of others llama.cpp does without, or their models always have it."""
'''


def save(path: Path, metadata: dict[str, Value], tensors: dict[str, Tensor]) -> None:
    """A GGUF file in float32."""
    with Container(path, metadata, {name: tuple(x.shape) for name, x in tensors.items()}) as out:
        for name, x in tensors.items():
            out.add(name, 0, [x])


def logits(path: Path) -> Tensor | None:
    """What llama.cpp computes, [T, V]; None: it does not load the file."""
    try:
        return try_file(path, TOKENS)
    except CheckpointError:
        return None


def added(metadata: dict[str, Value], tensors: dict[str, Tensor], kind: str, folder: Path) -> bool:
    """Whether llama.cpp adds biases of one kind of tensor that has none in a file."""
    path, more = folder / "probe.gguf", {}
    for name, x in tensors.items():
        if name.endswith(".weight") and kind_of(name) == kind:
            shape = x.shape[:1] if x.ndim < 3 else x.shape[:2]
            more[name.removesuffix("weight") + "bias"] = torch.linspace(-1, 1, shape.numel()).view(shape)
    found = []
    for held in (tensors, tensors | more):
        save(path, metadata, held)
        found.append(logits(path))
    plain, other = found
    assert plain is not None
    return other is not None and not torch.allclose(plain, other, atol=1e-4)


def content(model: QuantizedCheckpoint, folder: Path) -> tuple[str, dict[str, Value], dict[str, Tensor]]:
    """Architecture, metadata and tensors of a model's GGUF file, in float32."""
    writer = GGUF()._writer(model, folder, {})
    (path,) = writer.write()
    file = GGUFFile(path)
    return writer.family.gguf_arch, writer.metadata, {there: file.read(there).float() for there in file.tensors}


def wanted(metadata: dict[str, Value], tensors: dict[str, Tensor], kind: str, folder: Path) -> bool:
    """Whether llama.cpp computes nothing without the biases of one kind of tensor."""
    path = folder / "probe.gguf"
    save(
        path, metadata, {name: x for name, x in tensors.items() if not name.endswith(".bias") or kind_of(name) != kind}
    )
    found = logits(path)
    return found is None or not bool(torch.isfinite(found).all())


def asked(model: QuantizedCheckpoint, folder: Path) -> tuple[str, set[str], set[str]]:
    """Architecture; kinds of tensors that may have a bias: those which have one, and others; those that must."""
    arch, metadata, tensors = content(model, folder)
    there = {kind_of(name) for name in tensors if name.endswith(".bias")}
    others = {kind_of(name) for name in tensors if name.endswith(".weight")} - there
    may = there | {kind for kind in sorted(others) if added(metadata, tensors, kind, folder)}
    return arch, may, {kind for kind in sorted(there) if wanted(metadata, tensors, kind, folder)}


def table(found: dict[str, set[str]]) -> str:
    """Lines of a mapping."""
    return "".join(f'    "{arch}": "{" ".join(sorted(kinds))}",\n' for arch, kinds in sorted(found.items()))


def kinds() -> Iterator[tuple[str, dict[str, Any]]]:
    """(model_type, what a tiny model of it needs) of everything that is written as GGUF."""
    from tests.checkpoint.test_conversions import KINDS, PARTICULAR

    whole = {kind: {"sliding_window": None} for kind in ("phi3", "mistral", "mixtral")}
    gemma = {kind: {"query_pre_attn_scalar": 16} for kind in ("gemma2", "gemma3_text")}
    whole |= {"qwen3_moe": {"norm_topk_prob": True}}
    for kind in (*KINDS, *registry.names(FAMILIES)):
        yield kind, PARTICULAR.get(kind, {}) | whole.get(kind, {}) | gemma.get(kind, {})


def tiny_models(chosen: Collection[str] = ()) -> Iterator[tuple[str, QuantizedCheckpoint, Path]]:
    """(model_type, tiny random model, folder that is there until the next) of these kinds; none: of all."""
    for kind, fields in kinds():
        if chosen and kind not in chosen:
            continue
        tiny.PARTICULAR[kind] = tiny.PARTICULAR.get(kind, {}) | fields
        with tempfile.TemporaryDirectory() as name:
            tiny.save_tiny(kind, folder := Path(name))
            make_tokenizer().save_pretrained(folder)
            yield kind, InMemory(fit(HFCheckpoint(folder), ["gguf"]), lambda module: None), folder


def main() -> None:
    """Asks about every kind, which takes some minutes."""
    may: dict[str, set[str]] = {}
    must: dict[str, set[str]] = {}
    for _, model, folder in tiny_models():
        arch, read, needed = asked(model, folder)
        may.setdefault(arch, set()).update(read)
        must[arch] = must.get(arch, needed) & needed
        print(arch, *sorted(read), "wants", *sorted(needed), flush=True)
    found = table(may), table({arch: kinds for arch, kinds in must.items() if kinds})
    TARGET.write_text(HEADER + found[0] + BETWEEN + found[1] + FOOTER, encoding="utf-8")


if __name__ == "__main__":
    main()
