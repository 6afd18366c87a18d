"""How configurations list modules: those that are not quantized by name, others by regular expressions."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection

from qtool.checkpoint._base import Checkpoint, Module, QuantizedCheckpoint
from qtool.checkpoint.modules import BESIDE, modules

LANGUAGE = "model.language_model."
"""What transformers' names of a language model begin with that is one of several parts."""
NUMBER = r"\d+"
"""Of a block beside the model."""


def kept_linears(model: QuantizedCheckpoint) -> list[str]:
    """Linear modules that stay as they are, routers and a tied output layer among them.

    A model without a family file may have some that no rule can name: of a vision tower, or before the output layer.
    """
    found = list(modules(model))
    linears = [module.name for module in found if module.kind != "embedding"]
    linears += [model.family.head] if model.tied else []
    if model.family.derived:
        known = {f"{module.name}.weight" for module in found}
        others = [name for name in model.names() if name.endswith(".weight") and name not in known]
        linears += [name.removesuffix(".weight") for name in others if len(model.info(name).shape) == 2]
    kept = [name for name in linears if name not in model.layers]
    if model.family.derived:  # transformers looks for its own names, other runtimes for those of checkpoints
        kept += [own for name in kept if (own := model.family.class_path(name)) not in kept]
    return kept


def patterns(members: Collection[str], model: Checkpoint, merged: bool = False) -> list[str]:
    """Anchored expressions; one for all blocks that have the same modules, and one for all experts of them.

    Where runtimes call modules otherwise than checkpoints do, there are expressions for these names as well.

    Args:
        members: names of modules.
        model: that they belong to.
        merged: sets that runtimes merge get one expression, which matches the merged matrix as well; `members` holds
            such sets as a whole.
    """
    blocks: dict[tuple[str, tuple[str, ...]], list[str]] = defaultdict(list)
    sets: dict[str, list[Module]] = defaultdict(list)
    split = {module.stack for module in modules(model) if module.name not in members}
    chosen = [module for module in modules(model) if module.name in members]
    for module in chosen:
        sets[module.fused or module.name].append(module)
    found = []
    for module in chosen:
        last = _last_part(module, sets[module.fused or module.name] if merged else [module])
        numbered = NUMBER if module.kind == BESIDE else module.block
        places: dict[str, list[str]] = defaultdict(list)
        number = ""
        for name in _names(module, model):
            path = re.escape(name.removesuffix(_last(name))) + (last or re.escape(_last(name)))
            if module.stack not in split:
                path = re.sub(r"(\\\.experts\\\.)\d+", r"\1\\d+", path)
            place = re.match(rf"(.*?\.)({numbered})(?=\.)", name)
            if place and numbered is not None:
                number = place[2]
                places[path.removeprefix(re.escape(place[0]))].append(re.escape(place[1]))
            else:
                found.append(f"^{path}$")
        for path, starts in places.items():
            blocks[path, tuple(starts)].append(number)
    for (path, before), numbers in blocks.items():
        start = before[0] if len(before) == 1 else f"(?:{'|'.join(before)})"
        found.append(f"^{start}(?:{'|'.join(dict.fromkeys(numbers))}){path}$")
    return sorted(dict.fromkeys(found))


def _names(module: Module, model: Checkpoint) -> list[str]:
    """What checkpoints, transformers and vLLM call a module, where it is part of a model of several parts."""
    own, family = module.name, model.family
    if not family.derived or family.model_free:
        return [own]
    known = family.class_path(own)
    if not family.blocks_path.startswith(LANGUAGE):
        return list(dict.fromkeys((own, known)))
    if known.startswith(LANGUAGE):
        served = f"language_model.model.{known.removeprefix(LANGUAGE)}"
    else:
        served = f"language_model.{own}" if module.role == "head" else known.removeprefix("model.")
    return list(dict.fromkeys((own, known, served)))


def _last_part(module: Module, parts: list[Module]) -> str:
    """An expression for the parts of a merged matrix and for itself ("qkv" is called `qkv_proj`); empty: not merged."""
    if len(parts) == 1:
        return ""
    assert module.fused is not None
    names = [_last(part.name) for part in parts]
    if module.expert is None:
        names.append(f"{_last(module.fused)}_proj")
    return f"(?:{'|'.join(map(re.escape, names))})"


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def target_pattern(target: str) -> re.Pattern[str] | None:
    """What a target of compressed-tensors matches from its beginning on; None: it is the class of all linear layers."""
    if target == "Linear":
        return None
    return re.compile(target[3:] if target.startswith("re:") else re.escape(target) + r"\Z")
