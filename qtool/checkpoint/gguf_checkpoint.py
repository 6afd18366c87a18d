"""A GGUF file as a source: decoded weights under Hugging Face names; config.json and tokenizer from its metadata."""

from __future__ import annotations

import atexit
import hashlib
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor

from qtool import registry
from qtool.checkpoint._base import Checkpoint, TensorInfo
from qtool.checkpoint.config import FAMILIES, complete
from qtool.checkpoint.conversions._base import ROOM, Conversion
from qtool.checkpoint.derived.skeleton import APART
from qtool.checkpoint.families._base import GGUF_FIELDS, Family
from qtool.checkpoint.families._parts import stacked
from qtool.checkpoint.families._rope import ROPE_TENSORS, rope_config
from qtool.checkpoint.gguf_io import GGUFFile
from qtool.checkpoint.gguf_parts import open_gguf
from qtool.checkpoint.gguf_tokenizer import save_tokenizer
from qtool.checkpoint.hf import samples
from qtool.checkpoint.modules import own_modules, verify
from qtool.checkpoint.raw_bytes import read_bytes
from qtool.errors import CheckpointError

SPECIAL = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
FILE_TYPES: dict[object, str] = {int(kind): kind.name for kind in gguf.LlamaFileType}
SAME_TEXT = {"qwen2vl": "qwen2", "qwen3vl": "qwen3", "qwen3vlmoe": "qwen3moe"}
"""Architecture that counts positions of pictures -> the one that it is for text."""
LONG = 16
"""Entries of a list that are shown."""


class GGUFCheckpoint(Checkpoint):
    """One GGUF file, or the first of its parts. Opening reads headers only; see `Checkpoint` for the methods.

    Raises:
        CheckpointError: damaged, incomplete, or not a model that qtool knows.
    """

    def __init__(self, path: Path) -> None:
        self.source = str(path)
        self._file = open_gguf(path)
        self.config, self.family = complete(_config(self._file, _family(self._file)), path)
        self._check_rotary()
        stored = self._file.tensors
        names = self.family.gguf_names(self.config)
        known = {*names.values(), *ROPE_TENSORS, *self.family.gguf_extra_tensors(self.config)}
        known |= {scale_name(name, kind) for name in names.values() for kind in ("scale", "input_scale")}
        if unknown := [name for name in stored if name not in known]:
            raise CheckpointError(
                f"{path} holds a tensor that {self.family.gguf_arch} models do not have: {unknown[0]}"
            )
        self._names = {here: (there, stacked(here)[1]) for here, there in names.items() if there in stored}
        self._restore_extents()
        self._check_stacks()
        verify(self)
        self._roles = {module.name: module.role for module in own_modules(self)}

    @property
    def metadata(self) -> dict[str, Any]:
        """The key-values of the file."""
        return self._file.metadata

    @property
    def header(self) -> Mapping[str, object]:
        """See `Checkpoint.header`: the key-values."""
        return {key: _readable(key, value) for key, value in self.metadata.items()}

    @property
    def parts(self) -> list[Path]:
        """See `Checkpoint.parts`."""
        return list(dict.fromkeys([self._file.path, *(tensor.path for tensor in self._file.tensors.values())]))

    @cached_property
    def files(self) -> dict[str, Path]:  # type: ignore[override] # made when asked for
        """Tokenizer files, made from the metadata when first asked for; they live as long as the process."""
        folder = Path(tempfile.mkdtemp(prefix="qtool-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        save_tokenizer(self._file, folder)
        return {path.name: path for path in sorted(folder.iterdir())}

    def names(self) -> list[str]:
        """See `Checkpoint.names`."""
        return list(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def info(self, name: str) -> TensorInfo:
        """See `Checkpoint.info`."""
        stored = self._file.find(*self._stored(name))
        if form := self.family.gguf_form(self.config, name):
            form.check(stored.shape, f"{self.source}: tensor {name}")
            return TensorInfo(self.family.shapes(self.config)[name], stored.dtype)
        return TensorInfo(stored.shape, stored.dtype)

    def tensor(self, name: str) -> Tensor:
        """See `Checkpoint.tensor`."""
        there, index = self._stored(name)
        tensor, order = self._file.read(there, index=index), self._order(name)
        if form := self.family.gguf_form(self.config, name):
            return form.read(tensor).view(self.info(name).shape)
        if (scale := self._scale(name)) is not None:
            tensor = tensor * scale
        if offset := self.family.gguf_offset(name):
            return tensor - offset
        return tensor if order is None else tensor[order.argsort()]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `Checkpoint.rows`."""
        if self._order(name) is not None or self.family.gguf_offset(name) or self.family.gguf_form(self.config, name):
            return super().rows(name, start, stop)
        there, index = self._stored(name)
        rows, scale = self._file.read(there, start, stop, index), self._scale(name)
        return rows if scale is None else rows * scale

    def rounds(self, name: str) -> bool:
        """See `Checkpoint.rounds`."""
        form = self.family.gguf_form(self.config, name)
        return form.rounds if form else self.family.gguf_offset(name) != 0

    def fingerprint(self) -> str:
        """See `Checkpoint.fingerprint`."""
        digest = hashlib.sha256(self._file.header)
        for name, tensor in self._file.tensors.items():
            for begin, count in samples(tensor.nbytes):
                digest.update(read_bytes(tensor.path, tensor.offset + begin, count, name).numpy().tobytes())
        return digest.hexdigest()

    def _check_rotary(self) -> None:
        """Raises CheckpointError: another part of each head is rotated than in models of this family."""
        wanted = self.family.rotary_dim(self.config)
        if (found := self._file.metadata.get(f"{self.family.gguf_arch}.rope.dimension_count", wanted)) != wanted:
            what = f"{self.source}: wrong rope.dimension_count for a {self.family.gguf_arch} model"
            raise CheckpointError(what, wanted=wanted, found=f"{found!r:.40}")

    def _restore_extents(self) -> None:
        """What ggml writes itself has no extents of 1 in front: there, a matrix of one row is a vector."""
        shapes = self.family.shapes(self.config)
        for here, (there, index) in self._names.items():
            stored = self._file.tensors[there]
            if index is None and shapes.get(here) == (1, *stored.shape):
                self._file.tensors[there] = replace(stored, shape=(1, *stored.shape))

    def _check_stacks(self) -> None:
        """Raises CheckpointError: a tensor does not hold one matrix, or vector, for every expert."""
        counts = Counter(there for there, index in self._names.values() if index is not None)
        for there, count in counts.items():
            if (shape := self._file.tensors[there].shape)[0] != count or len(shape) < 2:
                wanted, found = f"one for each of {count} experts", list(shape)
                raise CheckpointError(f"{self.source}: tensor {there}", wanted=wanted, found=found)

    def _stored(self, name: str) -> tuple[str, int | None]:
        """Name in the file, and place in the stack of all experts' tensors; None: it is none."""
        if name not in self._names:
            raise CheckpointError(f"{self.source} holds no tensor {name!r}")
        return self._names[name]

    def _scale(self, name: str) -> float | None:
        """A number that a weight's decoded values are multiplied with; None: there is none."""
        there, index = self._stored(name)
        if not there.endswith(".weight") or (scale := scale_name(there)) not in self._file.tensors:
            return None
        numbers, count = self._file.read(scale).flatten(), 1 if index is None else self.family.experts(self.config)
        if len(numbers) != count or not bool(numbers.isfinite().all()):
            wanted = f"{count} finite numbers"
            raise CheckpointError(f"{self.source}: tensor {scale}", wanted=wanted, found=numbers.tolist()[:8])
        return float(numbers[index or 0])

    def _order(self, name: str) -> Tensor | None:
        """Order of the stored rows, if llama.cpp wants another one; see `Family.gguf_rows`."""
        return self.family.gguf_rows(self.config, self._roles.get(name.rsplit(".", 1)[0], ""))


def _readable(key: str, value: object) -> object:
    """A key-value as short as it can be read: of a long list its length, of a file type its name."""
    if isinstance(value, list) and len(value) > LONG:
        return f"{len(value)} items"
    if key == "general.file_type" and value in FILE_TYPES:
        return f"{value} ({FILE_TYPES[value]})"
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def scale_name(weight: str, kind: str = "scale") -> str:
    """Name of the tensor beside "x.weight" that holds one number per matrix."""
    return f"{weight.removesuffix('weight')}{kind}"


def _family(file: GGUFFile) -> Family | Conversion:
    """What the file's architecture is called here; of two that share it, the one whose marker is there."""
    stored = file.metadata.get("general.architecture")
    arch = SAME_TEXT.get(stored, stored) if isinstance(stored, str) else stored
    rooms = (FAMILIES, ROOM)
    families: list[Family | Conversion] = [registry.load(r, name)() for r in rooms for name in registry.names(r)]
    mixture = bool(file.metadata.get(f"{stored}.expert_count"))
    fitting = [family for family in families if family.gguf_arch == arch and family.mixture in (mixture, None)]
    if not fitting:
        known = sorted({family.gguf_arch for family in families})
        raise CheckpointError(
            f"{file.path}: unknown architecture",
            wanted=f"one of {', '.join(known)}",
            found=f"{arch!r:.60}{' with experts' if mixture else ''}",
            hint="name the language model's file beside it" if file.metadata.get("general.type") == "mmproj" else None,
        )
    marked = [family for family in fitting if _marked(file, family.gguf_marker)]
    found = (marked or [family for family in fitting if family.gguf_marker is None])[0]
    if isinstance(stored, str) and stored != arch:
        found.gguf_arch = stored  # type: ignore[misc] # of this one
    return found


def _marked(file: GGUFFile, marker: str | tuple[str, int] | None) -> bool:
    """Whether a file has a key, or a key with a value."""
    return file.metadata.get(marker[0]) == marker[1] if isinstance(marker, tuple) else marker in file.metadata


def _config(file: GGUFFile, family: Family | Conversion) -> dict[str, Any]:
    """What config.json would say, in the spelling that transformers 4 and 5 both read."""
    arch, fields = family.gguf_arch, file.metadata
    embedding = file.tensors.get("token_embd.weight")
    values = {"vocab_size": embedding.shape[0] if embedding else 0}
    numbers = family.numbers if isinstance(family, Conversion) else GGUF_FIELDS
    values |= {key: _number(file, f"{arch}.{key}") for key in numbers if key != "vocab_size"}
    config: dict[str, Any] = {field: values[key] for key, field in numbers.items()}
    plain = isinstance(family, Conversion) and (family.latent or not family.attends)
    dim = 0 if plain else _head_dim(file, arch, config)
    own = isinstance(family, Conversion) and family.own_factors
    factors = {} if own else {name: file.read(name) for name in ROPE_TENSORS if name in file.tensors}
    config |= {} if plain else {"head_dim": dim}
    config |= rope_config(fields, arch, fields.get(f"{arch}.rope.dimension_count", dim), factors)
    config |= {
        field: fields[f"tokenizer.ggml.{key}"] for key, field in SPECIAL.items() if f"tokenizer.ggml.{key}" in fields
    }
    activation, function = family.activation
    told = {activation: function} if activation else {}
    return (
        config
        | told
        | {
            "architectures": [family.architecture],
            "model_type": type(family).__module__.rpartition(".")[2],
            "tie_word_embeddings": "output.weight" not in file.tensors,
            "dtype": _dtype(file),
            **family.gguf_fields(fields, file.tensors),
        }
        | ({APART: True} if isinstance(family, Conversion) and family.apart else {})
    )


def _number(file: GGUFFile, key: str) -> Any:
    """A number of the metadata; some files repeat it for every block. float32 becomes the shortest equal decimal."""
    value = file.metadata.get(key)
    if key.endswith("head_count_kv") and value is None:
        value = file.metadata.get(key.removesuffix("_kv"))
    if isinstance(value, list):
        value = [x for x in value if x] or value  # blocks without attention have no heads
        if len(set(value)) != 1:
            raise CheckpointError(f"{file.path}: {key} differs between blocks", wanted="one number for all")
        value = value[0]
    if not isinstance(value, int | float):
        raise CheckpointError(f"{file.path}: the metadata lacks {key}", wanted="a number", found=repr(value)[:40])
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _head_dim(file: GGUFFile, arch: str, config: dict[str, Any]) -> int:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    usual = hidden // heads if heads else 0
    key, value = (file.metadata.get(f"{arch}.attention.{name}_length") for name in ("key", "value"))
    dim = usual if key is None else key
    if (value or dim) != dim or type(dim) is not int:
        what = f"{file.path}: heads with parts of different length are not supported"
        raise CheckpointError(what, wanted="key_length = value_length", found=f"{key}, {value}")
    return dim


def _dtype(file: GGUFFile) -> str:
    """The type of most weights; float32 if they are stored in blocks, since that is what blocks decode to."""
    sizes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    return sizes.most_common(1)[0][0] if sizes else "float32"
