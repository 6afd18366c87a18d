"""GGUF: one file with weights, metadata and tokenizer, which llama.cpp and what is built on it load and chat with.

Matrices in the formats that are GGUF block types are stored as they are. Integers of qtool's own formats are stored in
the smallest block type that holds exactly the same values: their zero points become part of the codes, or of minima.
Of Gemma 3 and Qwen2.5-VL the vision tower and projector are written as a file of their own beside the model,
unquantized (`mmproj`). Proven is that llama.cpp's mtmd makes the same embeddings of a picture as transformers; how
pictures of other sizes are made to fit, and where they are put in a prompt, is mtmd's own business.
NVFP4 has a scale of the whole matrix, which llama.cpp applies to some matrices only, as it was asked for each
architecture: NVFP4 of others is refused.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from qtool.artifact._base import Artifact, Carry, Reading
from qtool.artifact._footprint import Footprint
from qtool.artifact.gguf._options import GGUFOptions
from qtool.artifact.gguf._reader import QuantizedGGUF
from qtool.artifact.gguf._sizes import footprint
from qtool.artifact.gguf._tokenizer import tokenizer_metadata
from qtool.artifact.gguf._vision import VisionFile
from qtool.artifact.gguf._writer import ModelWriter, block_bytes, candidates
from qtool.checkpoint._base import Checkpoint, Layer, Module, QuantizedCheckpoint
from qtool.checkpoint.equal import equal_of
from qtool.checkpoint.families._gguf import kind_of, scales_applied
from qtool.checkpoint.families._rope import truncates
from qtool.checkpoint.gguf_parts import VISION, first_parts
from qtool.checkpoint.language import LanguageModel, comes_apart, language_model
from qtool.checkpoint.modules import modules
from qtool.checkpoint.open import find_model
from qtool.errors import CheckpointError
from qtool.store.files import storage_errors
from qtool.store.imatrix import about_importance

NAMES: WeakKeyDictionary[Checkpoint, Mapping[str, str]] = WeakKeyDictionary()
"""What GGUF calls the tensors of models that were asked about."""
TOWERS = "only the language model is in this file; llama.cpp wants the other parts in one of their own"
DRAFTS = "only what the model's class knows is in this file; draft layers and the like are left out"
UNTRUNCATED = "llama.cpp rounds the range of dimensions that YaRN blends, which this model does not (truncate: false)"


class GGUF(Artifact):
    """See the module."""

    Options: ClassVar[type[GGUFOptions]] = GGUFOptions
    options: GGUFOptions
    language: ClassVar[bool] = True
    fuses: ClassVar[bool] = False
    runtimes: ClassVar[tuple[str, ...]] = ("llama.cpp",)
    usage: ClassVar[str] = "`llama-cli -m FILE.gguf` chats with it."

    def holds(self, module: Module, layer: Layer | None, keep: str) -> Carry:
        """See `Artifact.holds`."""
        if layer is None:
            return Carry(True)
        if layer.activations is not None:
            return Carry(False, "GGUF cannot say how activations are quantized; llama.cpp decides that itself")
        blocks = candidates(layer.format)
        if not blocks:
            return Carry(False, f"no GGUF block type holds {layer.format.label}; q4_0 to q8_0 are some")
        block, k = blocks[0], module.shape[1]
        if block.matrix_scale and module.kind == "embedding":
            return Carry(False, f"llama.cpp knows no matrix scale of a token embedding, as {block.label} has one")
        if any(k % other.columns == 0 for other in blocks):
            return Carry(True)
        misfit = block.misfit(k) or f"rows of {k} columns are not divisible by {block.columns}"
        return Carry(False, f"{block.label}: {misfit}")

    def computed(self, model: Checkpoint, module: Module, layer: Layer | None) -> Carry:
        """See `Artifact.computed`: llama.cpp reads scales of whole matrices of some matrices, by architecture."""
        blocks = candidates(layer.format) if layer else ()
        if not blocks or not blocks[0].matrix_scale:
            return Carry(True)
        model = language_model(model)
        there, arch = names_in(model).get(f"{module.name}.weight"), model.family.gguf_arch
        if there is None or scales_applied(arch, there):
            return Carry(True)
        what = f"llama.cpp applies no matrix scale to {kind_of(there)} in {arch} models, as {blocks[0].label} has one"
        return Carry(False, f"{what}; mxfp4 has none")

    def supports(self, model: Checkpoint) -> Carry:
        """See `Artifact.supports`. Raises CheckpointError: the model has no tokenizer."""
        if not model.files.keys() & {"tokenizer.json", "tokenizer.model"}:
            raise CheckpointError(f"{model.source} has no tokenizer", wanted="tokenizer.json or tokenizer.model")
        kind = model.config["model_type"]
        if comes_apart(model):
            reason = "layers that {} models keep in one are only told apart if GGUF is all that is exported"
            return Carry(False, reason.format(kind))
        if equal := equal_of(model):
            reason = "{} models are only changed as llama.cpp wants them ({}) if GGUF is all that is exported"
            return Carry(False, reason.format(kind, equal.what))
        model = language_model(model)
        family, config = model.family, model.config
        try:
            family.gguf_names(config), family.gguf_metadata(config), family.gguf_extra_tensors(config)
            tokenizer_metadata(model.files, config, self.options.pre_tokenizer)
            self._vision()
        except CheckpointError as error:
            return Carry(False, str(error))
        return Carry(True)

    def part(self, model: QuantizedCheckpoint) -> QuantizedCheckpoint:
        """See `Artifact.part`: the language model."""
        found = language_model(model)
        assert isinstance(found, QuantizedCheckpoint)
        return found

    def caveats(self, model: Checkpoint, layers: Mapping[str, Layer]) -> list[str]:
        """See `Artifact.caveats`."""
        found = language_model(model)
        about = []
        if isinstance(found, LanguageModel) and not (found.kind and self.options.mmproj):
            about.append(TOWERS if found.kind else DRAFTS)
        if not truncates(found.config):
            about.append(UNTRUNCATED)
        window = found.family.gguf_window(found.config)
        if window is None or window >= found.config.get("max_position_embeddings", 0):
            return about
        seen = "llama.cpp lets attention see more than its window"
        return [*about, f"{seen}: results are the model's up to {window} tokens"]

    def reading(self, model: QuantizedCheckpoint) -> Reading:
        """See `Artifact.reading`."""
        return Reading("llama.cpp", rounds=True, tables=True)

    def one_format(self, module: Module) -> str | None:
        """See `Artifact.one_format`: matrices of all experts are stacked."""
        return module.stack

    def nbytes(self, model: Checkpoint, module: Module, layer: Layer | None, keep: str = "source") -> int:
        """See `Artifact.nbytes`; of several block types that may hold the integers of a matrix, the largest."""
        copies = 2 if module.kind == "embedding" and model.tied and model.family.gguf_untied else 1
        if layer is not None:
            return copies * max(block_bytes(layer.format, *module.shape), default=0)
        return copies * super().nbytes(model, module, layer, "f32" if module.kind == "router" else keep)

    def footprint(self, model: QuantizedCheckpoint, card: Mapping[str, Any] | None = None) -> Footprint:
        """See `Artifact.footprint`."""
        matrices = {m.name: self.nbytes(model, m, model.layers.get(m.name)) for m in modules(model)}
        return footprint(self._writer(model, Path(), card or {}), matrices)

    def _writer(self, model: QuantizedCheckpoint, out: Path, card: Mapping[str, Any]) -> ModelWriter:
        """Of a file that is called after the model and the recipe."""
        source = Path(str(card.get("base_model", model.source)).rstrip("/"))
        base = source.stem if source.suffix == ".gguf" else source.name
        stem = "-".join(filter(None, (base, card.get("recipe_name"))))
        part = self.part(model)
        about = {**about_importance(card.get("importance")), **(part.about if isinstance(part, LanguageModel) else {})}
        path = out / (re.sub(r"[^\w.-]+", "-", stem).strip("-.") + ".gguf")
        return ModelWriter(part, path, base, self.options, about)

    def write(self, model: QuantizedCheckpoint, out: Path, card: dict[str, Any]) -> list[Path]:
        """See `Artifact.write`."""
        with storage_errors(out):
            writer = self._writer(model, out, card)
            files, vision = writer.write(), self._vision()
            beside = writer.path.with_name(f"{VISION}{writer.path.stem}.gguf")
            return files if vision is None else [*files, vision.write(beside, writer.path.stem)]

    def _vision(self) -> VisionFile | None:
        """What is written beside the model. Raises CheckpointError: see `VisionFile`."""
        return VisionFile(find_model(self.options.mmproj)) if self.options.mmproj else None

    def open(self, path: Path) -> QuantizedGGUF:
        """See `Artifact.open`; of a folder the one model in it."""
        files = _files(path)
        if len(files) != 1:
            raise CheckpointError(f"{path} is no GGUF artifact", wanted="one .gguf model", found=len(files))
        return QuantizedGGUF(files[0])

    @classmethod
    def recognizes(cls, path: Path) -> bool:
        """See `Artifact.recognizes`."""
        files = _files(path)
        if len(files) != 1:
            return False
        with files[0].open("rb") as file:
            return file.read(4) == b"GGUF"


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else first_parts(path)


def names_in(model: Checkpoint) -> Mapping[str, str]:
    """What GGUF calls a model's tensors; nothing where it has no names for them."""
    if model not in NAMES:
        try:
            NAMES[model] = model.family.gguf_names(model.config)
        except CheckpointError:  # which `GGUF.supports` says
            NAMES[model] = {}
    return NAMES[model]
