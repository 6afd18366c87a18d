"""What the neutral checkpoint's manifest.json says, and how a quantized matrix becomes tensors.

docs/neutral-checkpoint.md is the specification.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from torch import Tensor

from qtool.checkpoint._base import Cache, Layer, Static
from qtool.checkpoint.config import read_json
from qtool.errors import CheckpointError, NumericsError
from qtool.formats._base import Format, Quantized
from qtool.numerics.grids.bits import pack
from qtool.recipe.cache import parse_cache
from qtool.recipe.parse import dump_format, parse_format
from qtool.store.files import new_file

MANIFEST = "manifest.json"
BLOCK = "block-"
"""What keys of decoder blocks begin with."""
Stored = tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], Annotated[int, Field(ge=-128, le=127)]]
"""A `Static`."""

KEY = re.compile(rf"{BLOCK}[0-9]{{1,9}}|(?!{BLOCK})[A-Za-z0-9_-][A-Za-z0-9_.-]*")


def _listed(sides: Any) -> Any:
    """Scales of keys and values as lists; qtool 0.1.0, which had one for each side, wrote it without a list."""
    bare = isinstance(sides, list) and all(isinstance(s, list) and s and isinstance(s[0], float | int) for s in sides)
    return [[side] for side in sides] if bare else sides


class Entry(BaseModel):
    """Part of a manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LayerEntry(Entry):
    """A quantized module: its formats as recipes spell them, (N, K), and scale and zero point of static inputs."""

    format: str | dict[str, Any]
    activations: str | dict[str, Any] | None
    shape: tuple[int, int]
    static: Stored | None = None

    @classmethod
    def of(cls, q: Quantized, layer: Layer) -> LayerEntry:
        """The entry of a matrix."""
        inputs = None if layer.activations is None else dump_format(layer.activations)
        shape = (q.codes.shape[0], q.codes.shape[1])
        return cls(format=dump_format(q.format), activations=inputs, shape=shape, static=layer.static)

    def layer(self, module: str) -> Layer:
        """As checkpoints describe it. Raises CheckpointError: no such format."""
        try:
            inputs = None if self.activations is None else parse_format(self.activations)
            static = None if self.static is None else Static(*self.static)
            if (static is None) == (inputs is not None and inputs.static):
                raise ValueError("inputs with one scale for all tokens, and no others, have `static`")
            return Layer(parse_format(self.format), inputs, static)
        except ValueError as error:
            raise CheckpointError(f"{MANIFEST}: format of {module}: {error}") from error


class BlockEntry(Entry):
    """A file of the folder, `<key>.safetensors`: its modules, the writer's `record`, scales of its keys and values.

    Attributes:
        seal: hash of all else in the entry, by which a run that continues knows that it is as it was written; None
            where the folder stands alone.
    """

    nbytes: int
    sha256: str
    layers: dict[str, LayerEntry]
    record: Any = None
    cache: Annotated[tuple[tuple[Stored, ...], tuple[Stored, ...]] | None, BeforeValidator(_listed)] = None
    seal: str | None = None

    def sealed(self, key: str) -> BlockEntry:
        """The entry with its seal."""
        content = json.dumps([key, self.model_dump(exclude={"seal"})], sort_keys=True)
        return self.model_copy(update={"seal": hashlib.sha256(content.encode()).hexdigest()})


class Manifest(Entry):
    """What manifest.json holds.

    Attributes:
        version: of this layout.
        run: what identifies the run that made it: fingerprints, versions.
        keep: module -> type that its kept weight is cast to: "f32", "f16", "bf16".
        blocks: by key, in the order of writing.
        kv_cache: format of the KV cache; None: left alone.
    """

    version: Literal[1] = 1
    run: dict[str, Any]
    keep: dict[str, Literal["f32", "f16", "bf16"]]
    blocks: dict[str, BlockEntry]
    kv_cache: str | dict[str, Any] | None = None

    def save(self, folder: Path) -> None:
        """Writes manifest.json, whole or not at all. Raises StorageError."""
        content = self.model_dump()
        for block in content["blocks"].values():
            if block["seal"] is None:
                del block["seal"]
        with new_file(folder / MANIFEST) as partial:
            partial.write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Reads manifest.json. Raises CheckpointError: damaged, or of a newer version."""
        return cls._of(read_json(folder / MANIFEST), folder / MANIFEST)

    @classmethod
    def salvage(cls, folder: Path) -> tuple[Manifest, dict[str, str]]:
        """Reads manifest.json of a work folder, of which nothing is believed that has no valid seal.

        Returns:
            What it holds without the blocks whose entries are not as they were written; what is wrong with these.

        Raises:
            CheckpointError: damaged elsewhere, or of a newer version.
        """
        path, damaged = folder / MANIFEST, {}
        content = read_json(path)
        blocks = content.get("blocks")
        for key, block in list(blocks.items()) if isinstance(blocks, dict) else []:
            try:
                entry = BlockEntry.model_validate(block)
                if entry == entry.sealed(key):
                    continue
            except ValidationError:
                pass
            damaged[key] = f"its entry in {MANIFEST} is damaged"
            del content["blocks"][key]
        return cls._of(content, path), damaged

    @classmethod
    def _of(cls, content: dict[str, Any], path: Path) -> Manifest:
        try:
            manifest = cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"{path} is no manifest of a neutral checkpoint: {where}: {first['msg']}") from error
        for key in manifest.blocks:
            if not KEY.fullmatch(key):
                wanted = "block-I, or letters, digits, _.-"
                raise CheckpointError(f"{path}: impossible block name", wanted=wanted, found=repr(key))
        return manifest


def cache_of(manifest: Manifest, heads: int, width: int) -> Cache | None:
    """How the KV cache is rounded.

    Args:
        manifest: what says it.
        heads: of keys and values.
        width: numbers of one.

    Raises:
        CheckpointError: no such format, or scales of another one.
    """
    if manifest.kv_cache is None:
        return None
    try:
        fmt = parse_cache(manifest.kv_cache)
    except ValueError as error:
        raise CheckpointError(f"{MANIFEST}: format of the KV cache: {error}") from error
    counts = {"tensor": 1, "head": heads, "channel": heads * width, "token": 0}
    wanted = [counts[str(side.granularity)] for side in (fmt.keys, fmt.values)]
    statics = {}
    for key, entry in manifest.blocks.items():
        if key.startswith(BLOCK):
            keys, values = entry.cache or ((), ())
            if [len(keys), len(values)] != wanted:
                what = f"{MANIFEST}: scales of the KV cache of {key}"
                raise CheckpointError(what, wanted=f"{wanted} for {fmt.label}", found=[len(keys), len(values)])
            statics[int(key.removeprefix(BLOCK))] = tuple(Static(*s) for s in keys), tuple(Static(*s) for s in values)
    return Cache(fmt, statics if fmt.static else {})


def code_bits(fmt: Format) -> int:
    """Bits that the neutral checkpoint stores per code."""
    return max(1, (len(fmt.levels()) - 1).bit_length())


def packed(q: Quantized) -> dict[str, Tensor]:
    """The tensors that hold a matrix, by name below "<module>.weight."."""
    return {"codes": pack(q.codes, code_bits(q.format)), **q.params}


def checked(q: Quantized, module: str, path: Path) -> Quantized:
    """Returns a matrix that was read.

    Raises:
        CheckpointError: its parts do not fit together.
        NumericsError: its scales are not finite.
    """
    n, k = q.codes.shape
    try:
        scale, offset = q.format.affine(q.params)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path}: parameters of {module} do not fit {q.format.label}", found=error) from error
    groups = k // (q.format.group_columns or k)
    if q.format.misfit(k) or {tuple(scale.shape), tuple(offset.shape)} - {(n, groups)}:
        raise CheckpointError(f"{path}: scales of {module}", wanted=[n, groups], found=list(scale.shape))
    if not bool(scale.isfinite().all() and offset.isfinite().all()):
        raise NumericsError(f"tensor {module}.weight is not finite", found=f"NaN or infinite scales in {path}")
    if int(q.codes.max()) >= len(q.format.levels()):
        raise CheckpointError(f"{path}: codes of {module}", wanted=f"below {len(q.format.levels())}", found="larger")
    return q
