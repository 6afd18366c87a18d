"""A folder as transformers saves it: config.json, one or many safetensors files, tokenizer files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.checkpoint._base import Checkpoint, TensorInfo
from qtool.checkpoint.config import complete, read_json, read_own
from qtool.checkpoint.derived.family import Derived
from qtool.checkpoint.derived.free import FREE, free_family
from qtool.checkpoint.derived.skeleton import APART
from qtool.checkpoint.families._base import Family
from qtool.checkpoint.families._parts import Slice
from qtool.checkpoint.links import own_file
from qtool.checkpoint.modules import own_modules, verify
from qtool.checkpoint.raw_bytes import read_bytes
from qtool.checkpoint.safetensors_io import SafetensorsFile
from qtool.checkpoint.shapes import stored_shapes
from qtool.checkpoint.side_files import code_of, lost, side_files
from qtool.errors import CheckpointError, reading

TEXT_PREFIXES = ("language_model.model.", "model.language_model.", "model.text_model.")
"""What names of a text model begin with, instead of "model.", where it is one of several parts."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Types of tensors that are not packed."""
SAMPLE = 4096
"""Bytes from each end and the middle of a tensor that go into the fingerprint."""


class HFCheckpoint(Checkpoint):
    """A checkpoint folder. Opening reads headers only; see `Checkpoint` for the methods.

    Args:
        folder: where it is.
        source: what the user called it, if not that.
        model_free: know the model by names and shapes of its tensors only.

    Attributes:
        left_out: whether it is only the text model of several parts.

    Raises:
        CheckpointError: something is missing, damaged, or not a model that qtool knows.
    """

    def __init__(self, folder: Path, source: str | None = None, model_free: bool = False) -> None:
        self.source = source or str(folder)
        self.config, self.family = described(folder, model_free)
        self.files = side_files(folder)
        code = code_of(self.config, self.files)
        if lost(self.config, self.files):
            del self.config["auto_map"]
        self.notes = (code,) if code else ()
        stored = self._weights(folder)
        ignored = {name for name in stored if name.endswith(".rotary_emb.inv_freq")}  # a constant that old files keep
        separate = self.family.derived or any(name.endswith(f"{self.family.head}.weight") for name in stored)
        if not separate and read_own(folder / "config.json").get("tie_word_embeddings"):
            self.config["tie_word_embeddings"] = True  # said of the whole, whatever is said of its text model
        self._shapes = self.family.shapes(self.config)
        self._drop_tied_copy(stored, ignored)
        self._slices = self.family.slices(self.config, stored)
        self.left_out = False
        if parts := self._text_slices(stored):
            self.left_out = True
            self._slices = parts
            others = stored.keys() - {part.tensor for part in parts.values()} - self._shapes.keys()
            ignored |= others
            kinds = ", ".join(sorted({name.removeprefix("model.").partition(".")[0] for name in others}))
            left = f"only the text model of {self.source} is read, and what else it has left out: {kinds:.100}"
            self.notes = (left, *self.notes)
        if self.family.derived and (strange := sorted(stored.keys() - ignored - self._own())):
            kinds = ", ".join(dict.fromkeys(".".join(name.split(".")[:2]) for name in strange))
            count = "1 tensor" if len(strange) == 1 else f"{len(strange)} tensors"
            copied = f"beside {self.family.architecture}, copied into safetensors unless rules name them"
            self.notes = (f"{count} {copied}: {kinds:.100}", *self.notes)
        order = {name: place for place, name in enumerate(self._shapes)}

        def place(name: str) -> tuple[int, str]:
            return order.get(name, len(order)), name

        self._stored = {name: stored[name] for name in sorted(stored.keys() - ignored, key=place)}
        whole = self._check_slices()
        self._names = sorted(self._stored.keys() - whole | self._slices.keys(), key=place)
        verify(self)
        if packed := [name for name in self._names if name.endswith((".qweight", ".weight_packed"))]:
            raise CheckpointError(f"{self.source}: {packed[0]} is packed, and config.json does not say how")
        numbers = {name: dtype for name in self._names if (dtype := self.info(name).dtype) not in FLOATS}
        own = {f"{module.name}.weight" for module in own_modules(self)} if numbers else set()
        for name, dtype in numbers.items():  # what is beside a derived model may be of any type
            if name in own or not self.family.derived:
                hint = "are scales missing, or does config.json not say how it is quantized?"
                raise CheckpointError(f"{self.source}: {name} holds numbers without a scale", found=dtype, hint=hint)

    def _weights(self, folder: Path) -> dict[str, SafetensorsFile]:
        """Tensor name -> file. Readers of quantized layouts list a packed matrix under the name of its weight."""
        if (how := self.config.get("quantization_config")) is not None:
            raise CheckpointError(
                f"{self.source} is already quantized, in a way that qtool does not read",
                wanted="the original weights",
                found=how.get("quant_method") if isinstance(how, dict) else how,
                hint="start from the checkpoint that it was made from",
            )
        return locate(folder)

    def names(self) -> list[str]:
        """See `Checkpoint.names`."""
        return self._names

    def __contains__(self, name: str) -> bool:
        return name in self._slices or name in self._stored

    def info(self, name: str) -> TensorInfo:
        """See `Checkpoint.info`."""
        if part := self._slices.get(name):
            return TensorInfo(self._shapes[name], self._file(part.tensor).info(part.tensor).dtype)
        return self._file(name).info(name)

    def tensor(self, name: str) -> Tensor:
        """See `Checkpoint.tensor`."""
        return self.rows(name, 0, self._shapes[name][0]) if name in self._slices else self._file(name).read(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `Checkpoint.rows`. Of a matrix that is stored transposed, the whole is read."""
        part = self._slices.get(name)
        if part is None:
            return self._file(name).read(name, start, stop)
        file = self._file(part.tensor)
        rows = range(part.first + part.step * start, part.first + part.step * stop, part.step)
        first, last = (rows[0], rows[-1] + 1) if rows else (0, 0)
        if part.transposed:
            return file.read(part.tensor, index=part.index)[:, first : last : part.step].T.contiguous()
        return file.read(part.tensor, first, last, part.index)[:: part.step].contiguous()

    def fingerprint(self) -> str:
        """See `Checkpoint.fingerprint`. Moving the folder or cutting it into other shards changes nothing."""
        return digest(self.config, self.files, self._stored)

    def _own(self) -> set[str]:
        """Stored tensors that belong to the model, and not to what is beside it."""
        unread = self.family.unread(self._shapes) if isinstance(self.family, Derived) else set[str]()
        return (self._shapes.keys() - unread) | {part.tensor for part in self._slices.values()}

    def _text_slices(self, stored: dict[str, SafetensorsFile]) -> dict[str, Slice]:
        """Where the tensors of a text model are that is one of several parts; empty if it is the only one."""
        embedding = f"{self.family.embedding.removeprefix('model.')}.weight"
        prefix = next((prefix for prefix in TEXT_PREFIXES if prefix + embedding in stored), None)
        if prefix is None or self.family.derived:
            return {}
        found: dict[str, Slice] = {}
        for name, shape in self._shapes.items():
            places = (prefix + name.removeprefix("model."), name, f"language_model.{name}")
            if (there := next((place for place in places if place in stored), name)) != name:
                found[name] = Slice(there, shape)
        return found

    def _check_slices(self) -> set[str]:
        """Names of stored tensors that hold others. Raises CheckpointError: a wrong shape, or a tensor stored twice."""
        if twice := self._slices.keys() & self._stored.keys():
            raise CheckpointError(f"{self.source} holds {min(twice)} by itself and as part of a larger tensor")
        parts = {part.tensor: part.shape for part in self._slices.values()}
        for name, shape in parts.items():
            if (found := self._file(name).info(name).shape) != shape:
                what = f"{self.source}: tensor {name} does not fit config.json"
                raise CheckpointError(what, wanted=list(shape), found=list(found))
        return set(parts)

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._stored:
            raise CheckpointError(f"{self.source} holds no tensor {name!r}")
        return self._stored[name]

    def _drop_tied_copy(self, stored: dict[str, SafetensorsFile], ignored: set[str]) -> None:
        """Some files store the output matrix although config.json ties it to the embedding: an equal copy is dropped.

        If the copy differs, transformers 4 overwrites it with the embedding while transformers 5 and GGUF converters
        use it: the model is not well defined.
        """
        head, embedding = f"{self.family.head}.weight", f"{self.family.embedding}.weight"
        if self.family.derived and head in self._shapes:
            return
        if (
            not (self.family.derived or self.config.get("tie_word_embeddings"))
            or head not in stored
            or embedding not in stored
        ):
            return
        if not _equal(stored[head], head, stored[embedding], embedding):
            raise CheckpointError(
                f"{self.source}: config.json ties {head} to {embedding}, but the stored matrices differ",
                hint='set "tie_word_embeddings": false to use both, or delete the one that is not meant',
            )
        ignored.add(head)


def digest(config: dict[str, Any], files: dict[str, Path], stored: dict[str, SafetensorsFile]) -> str:
    """Hex digest of a folder's configuration, side files, headers, and samples of its tensors."""
    found = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, path in sorted(files.items()):
        with reading(path):
            found.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
    for name, file in stored.items():
        info, offset = file.info(name), file.entries[name].offset
        found.update(f"{name} {info.dtype} {info.shape}".encode())
        for begin, count in samples(info.nbytes):
            found.update(read_bytes(file.path, offset + begin, count, name).numpy().tobytes())
    return found.hexdigest()


def samples(nbytes: int) -> Iterator[tuple[int, int]]:
    """(begin, count) of the bytes of a tensor that its fingerprint looks at."""
    for begin in sorted({0, max(0, nbytes // 2 - SAMPLE // 2), max(0, nbytes - SAMPLE)}):
        yield begin, min(SAMPLE, nbytes - begin)


def _equal(a: SafetensorsFile, a_name: str, b: SafetensorsFile, b_name: str) -> bool:
    """Compares in slices, since output matrices are large; as values, since a copy may have another type.

    One that was rounded to its type is equal as well: it says nothing that the other does not.
    """
    if a.info(a_name).shape != b.info(b_name).shape:
        return False
    rows = a.info(a_name).shape[0]
    slices = [(start, min(start + 4096, rows)) for start in range(0, rows, 4096)]
    types = {a.info(a_name).dtype, b.info(b_name).dtype}
    return any(all(torch.equal(a.read(a_name, *s).to(t), b.read(b_name, *s).to(t)) for s in slices) for t in types)


BY_NAMES: ContextVar[bool] = ContextVar("by_names", default=False)
"""Whether folders are opened by names and shapes of their tensors only; see `open_model_free`."""
TOLD_APART: ContextVar[bool] = ContextVar("told_apart", default=False)
"""Whether linear layers are told apart that classes keep in one; see `open_apart`."""

WHOLE: ContextVar[bool] = ContextVar("whole", default=False)
"""Whether models of several parts are taken for one, where their text models have a family file; see `open_whole`."""


def described(folder: Path, model_free: bool) -> tuple[dict[str, Any], Family]:
    """Configuration and family of a folder; see `read_config`."""
    path = folder / "config.json"
    config = read_own(path)
    if not (model_free or BY_NAMES.get()) and FREE not in config:
        return complete(config | ({APART: True} if TOLD_APART.get() else {}), path, WHOLE.get())
    if not isinstance(kind := config.get("model_type"), str):
        raise CheckpointError(f"{path}: wrong model_type", wanted="a name", found=repr(kind)[:60])
    config[FREE] = True
    return config, free_family(config, stored_shapes(locate(folder)))


def locate(folder: Path) -> dict[str, SafetensorsFile]:
    """Tensor name -> file, from the one file or the index of many."""
    if own_file(folder / WEIGHTS):
        file = SafetensorsFile(folder / WEIGHTS)
        return dict.fromkeys(file.entries, file)
    if own_file(folder / INDEX):
        return _locate_shards(folder)
    if any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder} has safetensors, but no {WEIGHTS} or {INDEX}", hint="rename a single one")
    if any(folder.glob("*.gguf")):
        raise CheckpointError(f"{folder} holds no safetensors", found="a GGUF file", hint="name that file itself")
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise CheckpointError(
            f"{folder} holds pickled weights, which can run code",
            wanted=WEIGHTS,
            hint="convert it once: model.save_pretrained(folder, safe_serialization=True) in transformers",
        )
    raise CheckpointError(f"{folder} holds no weights", wanted=f"{WEIGHTS} or {INDEX}")


def _locate_shards(folder: Path) -> dict[str, SafetensorsFile]:
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: wrong weight_map", wanted="an object: tensor name -> file name")
    shards: dict[str, SafetensorsFile] = {}
    stored: dict[str, SafetensorsFile] = {}
    for shard in dict.fromkeys(map(str, weight_map.values())):
        if "/" in shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} names a file elsewhere", wanted="*.safetensors beside it", found=shard[:100]
            )
        if not own_file(folder / shard):
            raise CheckpointError(f"{folder} lacks the file {shard} that its index names", hint="download it again")
        shards[shard] = SafetensorsFile(folder / shard)
        if twice := stored.keys() & shards[shard].entries.keys():
            raise CheckpointError(f"{folder}: two files hold tensor {min(twice)!r}")
        stored.update(dict.fromkeys(shards[shard].entries, shards[shard]))
    for name, shard in weight_map.items():
        if stored.get(name) is not shards[str(shard)]:
            raise CheckpointError(f"{index}: tensor {name!r} is not in {shard}", hint="download the checkpoint again")
    if unlisted := stored.keys() - weight_map.keys():
        raise CheckpointError(f"{index} does not list tensor {min(unlisted)!r}, which a file holds")
    return stored
