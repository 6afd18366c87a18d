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
from qtool.errors import CheckpointError, NumericsError, is_utf8
from qtool.formats._base import Format, Quantized
from qtool.formats._spelling import dump_format, parse_format
from qtool.numerics.grids.bits import pack
from qtool.recipe.cache import parse_cache
from qtool.residuals._base import Correction, Matrix, Residual
from qtool.store.files import new_file
from qtool.store.inputs import dump_ops
from qtool.store.tight import tightened

MANIFEST = "manifest.json"
WEIGHT = "weight."
"""What names of a matrix's codes and parameters begin with, below its module."""
BLOCK = "block-"
"""What keys of decoder blocks begin with."""
StaticPair = tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], Annotated[int, Field(ge=-128, le=127)]]
"""A `Static`."""

KEY = re.compile(rf"{BLOCK}[0-9]{{1,9}}|(?!{BLOCK})[A-Za-z0-9_-][A-Za-z0-9_.-]*")


def _read(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError: it is none, or has text that cannot be written again."""
    content = read_json(path)
    if not is_utf8(json.dumps(content, ensure_ascii=False)):
        raise CheckpointError(f"{path} is damaged", wanted="text in Unicode", found="half of a surrogate pair")
    return content


def _listed(sides: Any) -> Any:
    """Scales of keys and values as lists; qtool 0.1.0, which had one for each side, wrote it without a list."""
    bare = isinstance(sides, list) and all(isinstance(s, list) and s and isinstance(s[0], float | int) for s in sides)
    return [[side] for side in sides] if bare else sides


class ManifestPart(BaseModel):
    """Part of a manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StoredLayer(ManifestPart):
    """A quantized module.

    Attributes:
        format, activations: of weight and input, as recipes spell them.
        shape: (N, K).
        static: scale and zero point of inputs that have one for all tokens.
        residuals: what corrects the weight, in order, as recipes spell them.
        input_ops: what is done to the input, in order, as {name: plain fields}.
        taken: whether its codes and parameters are those of the source, and not in the file. Only in work folders.
    """

    format: str | dict[str, Any]
    activations: str | dict[str, Any] | None
    shape: tuple[int, int]
    static: StaticPair | None = None
    residuals: tuple[dict[str, Any], ...] = ()
    input_ops: tuple[dict[str, Any], ...] = ()
    taken: bool = False

    @classmethod
    def taken_over(cls, fmt: Format, shape: tuple[int, int], layer: Layer) -> StoredLayer:
        """The entry of a matrix that stays in the source."""
        inputs = None if layer.activations is None else dump_format(layer.activations)
        return cls(format=dump_format(fmt), activations=inputs, shape=shape, taken=True)

    @classmethod
    def of(cls, matrix: Matrix, layer: Layer) -> StoredLayer:
        """The entry of a matrix."""
        inputs = None if layer.activations is None else dump_format(layer.activations)
        n, k = matrix.quantized.codes.shape
        return cls(
            format=dump_format(matrix.quantized.format),
            activations=inputs,
            shape=(n, k),
            static=layer.static,
            residuals=tuple(correction.residual.spelled() for correction in matrix.residuals),
            input_ops=dump_ops(layer.input_ops),
        )

    def layer(self, module: str) -> Layer:
        """As checkpoints describe it, without operations on its input. Raises CheckpointError: no such format."""
        try:
            inputs = None if self.activations is None else parse_format(self.activations)
            static = None if self.static is None else Static(*self.static)
            if (static is None) == (inputs is not None and inputs.static):
                raise ValueError("inputs with one scale for all tokens, and no others, have `static`")
            residuals = tuple(Residual.of(entry) for entry in self.residuals)
            if reason := next(filter(None, (residual.misfit(*self.shape) for residual in residuals)), None):
                raise ValueError(reason)
            return Layer(parse_format(self.format), inputs, static, residuals)
        except ValueError as error:
            raise CheckpointError(f"{MANIFEST}: format of {module}: {error}") from error


class StoredBlock(ManifestPart):
    """A file of the folder, `<key>.safetensors`: its modules, the writer's `record`, scales of its keys and values.

    Attributes:
        seal: hash of all else in the entry, by which a run that continues knows that it is as it was written; None
            where the folder stands alone.
    """

    nbytes: int
    sha256: str
    layers: dict[str, StoredLayer]
    record: Any = None
    cache: Annotated[tuple[tuple[StaticPair, ...], tuple[StaticPair, ...]] | None, BeforeValidator(_listed)] = None
    seal: str | None = None

    def sealed(self, key: str) -> StoredBlock:
        """The entry with its seal."""
        content = json.dumps([key, self.model_dump(exclude={"seal"})], sort_keys=True)
        return self.model_copy(update={"seal": hashlib.sha256(content.encode()).hexdigest()})


class Manifest(ManifestPart):
    """What manifest.json holds.

    Attributes:
        version: of this layout. Version 1 had no residuals and no operations on inputs.
        run: what identifies the run that made it: fingerprints, versions.
        keep: module -> type that its kept weight is cast to: "f32", "f16", "bf16".
        blocks: by key, in the order of writing.
        kv_cache: format of the KV cache; None: left alone.
    """

    version: Literal[1, 2] = 2
    run: dict[str, Any]
    keep: dict[str, Literal["f32", "f16", "bf16"]]
    blocks: dict[str, StoredBlock]
    kv_cache: str | dict[str, Any] | None = None

    def save(self, folder: Path) -> None:
        """Writes manifest.json, whole or not at all. Raises StorageError."""
        content = self.model_dump()
        for block in content["blocks"].values():
            if block["seal"] is None:
                del block["seal"]
            for entry in block["layers"].values():
                if not entry["taken"]:  # which only work folders know
                    del entry["taken"]
        with new_file(folder / MANIFEST) as partial:
            partial.write_text(json.dumps(content) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Reads manifest.json. Raises CheckpointError: damaged, or of a newer version."""
        return cls._of(_read(folder / MANIFEST), folder / MANIFEST)

    @classmethod
    def salvage(cls, folder: Path) -> tuple[Manifest, dict[str, str]]:
        """Reads manifest.json of a work folder, of which nothing is believed that has no valid seal.

        Returns:
            What it holds without the blocks whose entries are not as they were written; what is wrong with these.

        Raises:
            CheckpointError: damaged elsewhere, or of a newer version.
        """
        path, damaged = folder / MANIFEST, {}
        content = _read(path)
        blocks = content.get("blocks")
        for key, block in list(blocks.items()) if isinstance(blocks, dict) else []:
            try:
                entry = StoredBlock.model_validate(block)
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
        for key, block in manifest.blocks.items():
            for what in ("residuals", "input_ops") if manifest.version == 1 else ():
                if any(getattr(entry, what) for entry in block.layers.values()):
                    raise CheckpointError(f"{path}: {what} in {key}", wanted="version 2", found="version 1")
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
    if reason := fmt.misfit(width):
        raise CheckpointError(f"{MANIFEST}: format of the KV cache: {reason}")
    wanted = [*fmt.counts(heads, width)]
    statics = {}
    for key, entry in manifest.blocks.items():
        if key.startswith(BLOCK):
            keys, values = entry.cache or ((), ())
            if [len(keys), len(values)] != wanted:
                what = f"{MANIFEST}: scales of the KV cache of {key}"
                raise CheckpointError(what, wanted=f"{wanted} for {fmt.label}", found=[len(keys), len(values)])
            statics[int(key.removeprefix(BLOCK))] = tuple(Static(*s) for s in keys), tuple(Static(*s) for s in values)
    return Cache(fmt, statics if fmt.static else {})


def packed(matrix: Matrix) -> dict[str, Tensor]:
    """The tensors that hold a matrix, by name below its module."""
    q = matrix.quantized
    tensors = {"codes": pack(q.codes, q.format.code_bits), **tightened(q)}
    found = {f"{WEIGHT}{name}": tensor for name, tensor in tensors.items()}
    for i, correction in enumerate(matrix.residuals):
        found |= {f"{residual_prefix(i)}{name}": tensor for name, tensor in correction.tensors.items()}
    return found


def residual_prefix(i: int) -> str:
    """What names of a residual's tensors begin with, below the module."""
    return f"residual.{i}."


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


def checked_correction(correction: Correction, n: int, k: int, module: str, path: Path) -> Correction:
    """Returns a correction of a matrix of n rows and k columns that was read with the shapes that it must have.

    Raises:
        CheckpointError: its tensors contradict each other.
        NumericsError: they are not finite.
    """
    name = correction.residual.name()
    for part, tensor in correction.tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise NumericsError(f"{part} of {name} of {module} is not finite", found=f"NaN or infinity in {path}")
    try:
        correction.residual.check(correction.tensors, n, k)
    except ValueError as error:
        raise CheckpointError(f"{path}: {name} of {module}: {error}") from error
    return correction
