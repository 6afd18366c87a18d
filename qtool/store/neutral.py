"""The neutral checkpoint's files: packed codes and parameters in safetensors, a manifest that says what they mean.

docs/neutral-checkpoint.md is the specification. The writer is made for work folders, block by block; the reader reads
those together with the source model, or a folder that stands alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.checkpoint._base import CacheScales, Checkpoint, Layer, QuantizedCheckpoint, TensorInfo
from qtool.checkpoint.config import read_config
from qtool.checkpoint.modules import verify
from qtool.checkpoint.parts import Parts, parts_of
from qtool.checkpoint.safetensors_io import SafetensorsFile, SafetensorsWriter
from qtool.checkpoint.side_files import side_files
from qtool.errors import CheckpointError, StorageError
from qtool.formats._base import Quantized
from qtool.numerics.checks import finite
from qtool.numerics.grids.bits import unpack
from qtool.recipe.cache import KVCache, dump_cache
from qtool.residuals._base import Correction, Matrix
from qtool.store.files import new_file, sha256
from qtool.store.inputs import op_prefix, op_tensors, read_ops
from qtool.store.manifest import (
    MANIFEST,
    WEIGHT,
    Manifest,
    StoredBlock,
    StoredLayer,
    cache_of,
    checked,
    checked_correction,
    packed,
    residual_prefix,
)
from qtool.store.tight import loosened

KEEP = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
"""Types that kept weights can be cast to, as recipes call them."""
METADATA = {"qtool": "neutral"}
"""What headers of its files say."""


class NeutralWriter:
    """Writes a work folder, one block at a time; each block is whole or absent, whatever happens to the process.

    Args:
        folder: created if missing. Blocks that the same run wrote before are kept.
        run: JSON data that identifies the run: fingerprints of recipe, source, calibration, program version.
        keep: module -> "source", or the type that its kept weight is cast to: "f32", "f16", "bf16".
        cache: format of the KV cache.

    Attributes:
        damaged: blocks of an earlier process that are not as it wrote them, and what is wrong with each.

    Raises:
        StorageError: the folder belongs to another run, or cannot be written.
        CheckpointError: its manifest is damaged.
    """

    def __init__(
        self,
        folder: Path,
        run: Mapping[str, Any],
        keep: Mapping[str, str] | None = None,
        cache: KVCache | None = None,
    ) -> None:
        self.folder = folder
        self.damaged: dict[str, str] = {}
        casts = {module: dtype for module, dtype in (keep or {}).items() if dtype != "source"}
        self.manifest = Manifest.model_validate({"run": json.loads(json.dumps(run)), "keep": casts, "blocks": {}})
        if cache:
            self.manifest = self.manifest.model_copy(update={"kv_cache": dump_cache(cache)})
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / MANIFEST).exists():
            found, self.damaged = Manifest.salvage(folder)
            if found.run != self.manifest.run:
                hint = "run it with the recipe and model it was begun with, or remove it"
                raise StorageError(f"{folder} was begun by another run", hint=hint)
            self.manifest = self.manifest.model_copy(update={"blocks": found.blocks})
        else:
            self.manifest.save(folder)

    def finished(self) -> dict[str, Any]:
        """Records of the blocks that are whole on disk, by key. Damaged blocks are forgotten, see `damaged`."""
        whole = {key: entry for key, entry in self.manifest.blocks.items() if self._whole(key, entry)}
        for key in self.manifest.blocks.keys() - whole.keys():
            self.damaged[key] = f"{self._path(key).name} is missing or damaged"
        self.manifest = self.manifest.model_copy(update={"blocks": whole})
        if self.damaged:
            self.manifest.save(self.folder)
        return {key: entry.record for key, entry in whole.items()}

    def enter(self, key: str, block: StoredBlock, save: bool = True) -> None:
        """Enters a block that is stored in the manifest, which makes it count once saved. Raises StorageError."""
        self.manifest = self.manifest.model_copy(update={"blocks": self.manifest.blocks | {key: block}})
        if save:
            self.manifest.save(self.folder)

    def write_block(
        self,
        key: str,
        matrices: Mapping[str, Matrix],
        record: Any = None,
        kept: Sequence[str] = (),
        source: Checkpoint | None = None,
        layers: Mapping[str, Layer] | None = None,
        cache: CacheScales | None = None,
        taken: Mapping[str, StoredLayer] | None = None,
    ) -> StoredBlock:
        """Writes one block; it counts when what this returns is entered.

        Args:
            key: file stem: "block-3".
            matrices: codes, parameters and corrections by module.
            record: JSON data that `finished` gives back.
            kept: tensors of `source` to store along, as they are.
            source: where they are read from, one at a time.
            layers: what is done to inputs and how they are rounded, by module; None: nothing.
            cache: scales of keys and values, where the cache's format has some for all tokens.
            taken: entries of modules whose matrices stay in the source.

        Raises:
            StorageError: the disk is full or not writable.
        """
        tensors = {f"{m}.{name}": t for m, matrix in matrices.items() for name, t in packed(matrix).items()}
        layers = layers or {m: Layer(matrix.quantized.format) for m, matrix in matrices.items()}
        tensors |= {f"{m}.{name}": t for m in matrices for name, t in op_tensors(layers[m].input_ops).items()}
        infos = {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in tensors.items()}
        if source is not None:
            infos |= {name: source.info(name) for name in kept}
        with new_file(self._path(key)) as partial:
            with SafetensorsWriter(partial, infos, METADATA, sync=False) as writer:
                for name, tensor in tensors.items():
                    writer.add(name, tensor)
                if source is not None:
                    for name in kept:
                        writer.add(name, source.tensor(name))
            nbytes, digest = partial.stat().st_size, sha256(partial)
        entries = {m: StoredLayer.of(matrix, layers[m]) for m, matrix in matrices.items()} | dict(taken or {})
        plain = json.loads(json.dumps(record))
        block = StoredBlock(nbytes=nbytes, sha256=digest, layers=entries, record=plain, cache=cache)
        return block if record is None else block.sealed(key)

    def _whole(self, key: str, entry: StoredBlock) -> bool:
        path = self._path(key)
        return path.is_file() and path.stat().st_size == entry.nbytes and sha256(path) == entry.sha256

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


class NeutralCheckpoint(QuantizedCheckpoint):
    """Reads a neutral checkpoint.

    Args:
        folder: where it is.
        source: gives every tensor that the folder does not hold, the configuration and the side files. None: the
            folder has all of them.

    Raises:
        CheckpointError: something is missing or damaged.
    """

    def __init__(self, folder: Path, source: Checkpoint | None = None) -> None:
        self._origin, self._manifest = source, Manifest.load(folder)
        if source is None:
            self.source, self.files = str(folder), side_files(folder)
            self.config, self.family = read_config(folder / "config.json")
        else:
            self.source, self.config = source.source, source.config
            self.family, self.files = source.family, source.files
        self.layers: dict[str, Layer] = {}
        self._shapes: dict[str, tuple[int, int]] = {}
        self._stored: dict[str, SafetensorsFile] = {}
        self._taken: dict[str, QuantizedCheckpoint] = {}
        self._parts, known = dict[str, list[str]](), dict[str, Layer]()  # layers are read once, as experts are alike
        for key, block in self._manifest.blocks.items():
            file = SafetensorsFile(folder / f"{key}.safetensors")
            self._stored.update(dict.fromkeys(file.entries, file))
            for name in file.entries:
                self._parts.setdefault(name.rpartition(f".{WEIGHT}")[0], []).append(name)
            for module, entry in block.layers.items():
                ops = read_ops(entry.input_ops, file, module, entry.shape[1])
                alike = entry.model_dump_json(include={"format", "activations", "static", "residuals"})
                known[alike] = known.get(alike) or entry.layer(module)
                self.layers[module] = replace(known[alike], input_ops=ops)
                self._shapes[module] = entry.shape
                if entry.taken:
                    if not isinstance(source, QuantizedCheckpoint):
                        raise CheckpointError(f"{folder}: {module}", wanted="its codes", found="none")
                    self._taken[module] = source
        self.cache = cache_of(self._manifest, *self.family.heads(self.config)[1:])
        self._names = source.names() if source else self._own_names()
        verify(self)

    def _own_names(self) -> list[str]:
        prefixes = {f"{module}.{WEIGHT}" for module in self.layers}
        for module, layer in self.layers.items():
            prefixes |= {f"{module}.{residual_prefix(i)}" for i in range(len(layer.residuals))}
            prefixes |= {f"{module}.{op_prefix(i)}" for i in range(len(layer.input_ops))}
        kept = {name for name in self._stored if name.rpartition(".")[0] + "." not in prefixes}
        present = kept | {f"{module}.weight" for module in self.layers}
        order = [name for name in self.family.shapes(self.config) if name in present]
        return order + sorted(present.difference(order))

    def names(self) -> list[str]:
        """See `Checkpoint.names`."""
        return self._names

    def info(self, name: str) -> TensorInfo:
        """See `Checkpoint.info`. A cast that the manifest declares is already made."""
        module = name.removesuffix(".weight")
        if module in self.layers:
            return TensorInfo(self._shapes[module], torch.float32)
        info = self._origin.info(name) if self._origin else self._file(name).info(name)
        return TensorInfo(info.shape, self._cast(name) or info.dtype)

    def tensor(self, name: str) -> Tensor:
        """See `Checkpoint.tensor`. Raises NumericsError: a declared cast overflows."""
        module = name.removesuffix(".weight")
        if module in self.layers:
            return self.matrix(module).decode()
        tensor = self._origin.tensor(name) if self._origin else self._file(name).read(name)
        dtype = self._cast(name)
        return tensor if dtype in (None, tensor.dtype) else finite(tensor.to(dtype), name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """See `Checkpoint.rows`."""
        module = name.removesuffix(".weight")
        if module in self.layers:
            return self._matrix(module, start, stop).decode()
        if self._cast(name):
            return super().rows(name, start, stop)
        return self._origin.rows(name, start, stop) if self._origin else self._file(name).read(name, start, stop)

    def matrix(self, module: str) -> Matrix:
        """See `QuantizedCheckpoint.matrix`."""
        return self._matrix(module, 0, self._shapes[module][0])

    def as_stored(self, module: str) -> Parts | None:
        """See `HasParts.as_stored`: of matrices that stayed in the source."""
        return parts_of(self._taken[module], module) if module in self._taken else None

    def _matrix(self, module: str, start: int, stop: int) -> Matrix:
        """Some rows of a matrix."""
        if module in self._taken:
            return self._taken[module].matrix(module).rows(start, stop)
        residuals = self.layers[module].residuals
        corrections = tuple(self._correction(module, i, start, stop) for i in range(len(residuals)))
        return Matrix(self._quantized_rows(module, start, stop), corrections)

    def _correction(self, module: str, i: int, start: int, stop: int) -> Correction:
        """The i-th correction of some rows."""
        residual, (n, k) = self.layers[module].residuals[i], self._shapes[module]
        tensors = {}
        for part, (shape, dtype) in residual.infos(n, k).items():
            name = f"{module}.{residual_prefix(i)}{part}"
            file, wanted = self._file(name), TensorInfo(shape, dtype)
            if (found := file.info(name)) != wanted:
                raise CheckpointError(f"{file.path}: {name}", wanted=wanted, found=found)
            tensors[part] = file.read(name)
        correction = checked_correction(Correction(residual, tensors), n, k, module, Path(self.source))
        return correction if (start, stop) == (0, n) else correction.rows(start, stop)

    def _quantized_rows(self, module: str, start: int, stop: int) -> Quantized:
        """Codes and parameters of some rows."""
        layer, (n, k) = self.layers[module], self._shapes[module]
        prefix, bits = f"{module}.{WEIGHT}", layer.format.code_bits
        file = self._file(prefix + "codes")
        expected = TensorInfo((n, (k * bits + 7) // 8), torch.uint8)
        if file.info(prefix + "codes") != expected:
            raise CheckpointError(f"{file.path}: codes of {module}", wanted=expected, found=file.info(prefix + "codes"))
        codes = unpack(file.read(prefix + "codes", start, stop), bits, k)
        names = [name.removeprefix(prefix) for name in self._parts.get(module, ())]
        params = {p: loosened(file, prefix + p, layer.format, start, stop, k) for p in names if p != "codes"}
        return checked(Quantized(codes, params, layer.format), module, file.path)

    def fingerprint(self) -> str:
        """See `Checkpoint.fingerprint`: of the manifest, which has the hashes of the blocks, and of the source."""
        text = self._manifest.model_dump_json() + (self._origin.fingerprint() if self._origin else "")
        return hashlib.sha256(text.encode()).hexdigest()

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._stored:
            raise CheckpointError(f"{self.source} holds no tensor {name!r}")
        return self._stored[name]

    def _cast(self, name: str) -> torch.dtype | None:
        keep = self._manifest.keep.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        return KEEP[keep] if keep else None
