"""The family of a model that has no file of its own: what `derive` finds, as other families say it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from torch import Tensor

from qtool.checkpoint.conversions._base import Conversion, conversion_of, filled
from qtool.checkpoint.conversions._refused import REFUSED
from qtool.checkpoint.derived.derive import derive
from qtool.checkpoint.derived.edges import proven_edges
from qtool.checkpoint.derived.facts import Facts
from qtool.checkpoint.derived.heads import heads_of
from qtool.checkpoint.families._base import Family, Value
from qtool.checkpoint.families._edges import Edge
from qtool.checkpoint.families._gguf import Form
from qtool.checkpoint.families._parts import Linear, Slice
from qtool.errors import CheckpointError


class Derived(Family):
    """See the module; `derived_family` makes one for a config."""

    facts: ClassVar[Facts]
    naming: ClassVar[Conversion | None] = None
    derived = True

    def blocks(self, config: dict[str, Any]) -> int:
        """See `Family.blocks`."""
        return len(self.facts.linears)

    def heads(self, config: dict[str, Any]) -> tuple[int, int, int]:
        """See `Family.heads`; 1 where config.json does not say."""
        return heads_of(config, self.facts.shapes[f"{self.embedding}.weight"][1])

    def experts(self, config: dict[str, Any]) -> int:
        """See `Family.experts`."""
        return self.facts.experts

    def shapes(self, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """See `Family.shapes`."""
        return dict(self.facts.shapes)

    def block_linears(self, config: dict[str, Any], i: int) -> tuple[Linear, ...]:
        """See `Family.block_linears`."""
        return self.facts.linears[i]

    def block_shapes(self, config: dict[str, Any], i: int) -> dict[str, tuple[int, ...]]:
        """See `Family.block_shapes`."""
        prefix = self.block_prefix.format(i=i)
        shapes = self.facts.shapes.items()
        return {name.removeprefix(prefix): shape for name, shape in shapes if name.startswith(prefix)}

    def edges(self, config: dict[str, Any], i: int | None) -> tuple[Edge, ...]:
        """See `Family.edges`."""
        return () if self.model_free else proven_edges(self.facts, config, i)

    def slices(self, config: dict[str, Any], stored: Collection[str]) -> dict[str, Slice]:
        """See `Family.slices`."""
        found = self.facts.slices.items()
        return {name: part for name, part in found if part.tensor in stored and name not in stored}

    def submodule(self, path: str) -> str:
        """See `Family.submodule`."""
        return self.facts.paths.get(path, path)

    def class_path(self, module: str) -> str:
        """See `Family.class_path`."""
        before, _, _ = self.block_prefix.partition("{i}")
        number, _, path = module.removeprefix(before).partition(".")
        if module.startswith(before) and number.isdigit():
            return f"{self.blocks_path}.{number}.{self.submodule(path)}"
        name = f"{module}.weight"
        return self.facts.around.get(name, self.facts.outside.get(name, name)).removesuffix(".weight")

    def unread(self, names: Collection[str]) -> set[str]:
        """Those of the class's tensors that no text needs."""
        if self.model_free:
            return set()
        blocks = tuple(self.block_prefix.format(i=i) for i in range(len(self.facts.linears)))
        return {name for name in names if name not in self.facts.around and not name.startswith(blocks)}

    def linear_outside(self, name: str) -> bool | None:
        """See `Family.linear_outside`."""
        if self.model_free or name not in self.facts.shapes:
            return None
        return name in self.facts.outside

    def conversion(self, config: Mapping[str, Any]) -> Conversion:
        """What GGUF calls such models. Raises CheckpointError: nothing says so."""
        found = conversion_of(config["model_type"])
        if found is None:
            kind = config["model_type"]
            if kind in REFUSED:
                raise CheckpointError(f"{kind} models are not written as GGUF: {REFUSED[kind]}")
            raise CheckpointError(f"nothing says what GGUF calls the tensors of {kind} models")
        return found

    def rotary_dim(self, config: dict[str, Any]) -> int:
        """See `Family.rotary_dim`."""
        return self.conversion(config).rotary_dim(filled(config))

    def gguf_names(self, config: dict[str, Any]) -> dict[str, str]:
        """See `Family.gguf_names`."""
        return self.conversion(config).tensor_names(config, self.facts.shapes, f"{self.head}.weight")

    def gguf_metadata(self, config: dict[str, Any]) -> dict[str, Value]:
        """See `Family.gguf_metadata`."""
        return {f"{self.gguf_arch}.{key}": value for key, value in self.conversion(config).metadata(config).items()}

    def gguf_extra_tensors(self, config: dict[str, Any]) -> dict[str, Tensor]:
        """See `Family.gguf_extra_tensors`."""
        return self.conversion(config).extra_tensors(config)

    def gguf_rows(self, config: dict[str, Any], role: str) -> Tensor | None:
        """See `Family.gguf_rows`."""
        return self.conversion(config).rows(config, role)

    def gguf_offset(self, name: str) -> float:
        """See `Family.gguf_offset`."""
        return self.naming.offset(name) if self.naming else 0.0

    def gguf_form(self, config: dict[str, Any], name: str) -> Form | None:
        """See `Family.gguf_form`."""
        shape = self.facts.shapes.get(name)
        return self.naming.form(filled(config), name, shape) if self.naming and shape else None

    def gguf_window(self, config: dict[str, Any]) -> int | None:
        """See `Family.gguf_window`."""
        if not self.naming or not self.naming.window:
            return None
        slides = any("sliding" in kind for kind in filled(config).get("layer_types") or ["sliding"])
        return config.get("sliding_window") or None if slides else None


def derived_family(config: Mapping[str, Any]) -> Derived:
    """The family of a model. Raises CheckpointError: see `derive`."""
    family = family_of(derive(config))
    if naming := conversion_of(config["model_type"]):
        type(family).naming, type(family).gguf_arch = naming, naming.gguf_arch
        type(family).gguf_untied = naming.gguf_untied
    return family


def family_of(facts: Facts, model_free: bool = False) -> Derived:
    """The family that facts describe.

    Args:
        facts: what it says.
        model_free: whether they come from names of tensors, so that the model cannot be run.
    """
    attributes = {
        "facts": facts,
        "architecture": facts.architecture,
        "linears": (),
        "norms": {},
        "block_prefix": facts.block_prefix,
        "blocks_path": facts.blocks_path,
        "embedding": facts.embedding,
        "head": facts.head,
        "mixture": facts.experts > 0,
        "separate_experts": facts.separate,
        "model_free": model_free,
    }
    family: type[Derived] = type("Derived", (Derived,), attributes)
    return family()
