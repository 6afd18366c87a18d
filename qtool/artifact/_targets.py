"""How configurations list modules: those that are not quantized by name, others by regular expressions."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection

from qtool.checkpoint._base import Checkpoint, Module, QuantizedCheckpoint, modules


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

    Args:
        members: names of modules.
        model: that they belong to.
        merged: sets that runtimes merge get one expression, which matches the merged matrix as well; `members` holds
            such sets as a whole.
    """
    before = model.family.block_prefix.split("{i}")[0]
    blocks: dict[str, list[str]] = defaultdict(list)
    sets: dict[str, list[Module]] = defaultdict(list)
    split = {module.stack for module in modules(model) if module.name not in members}
    chosen = [module for module in modules(model) if module.name in members]
    for module in chosen:
        sets[module.fused or module.name].append(module)
    found = []
    for module in chosen:
        path = _path(module, sets[module.fused or module.name] if merged else [module])
        if module.stack not in split:
            path = re.sub(r"(\\\.experts\\\.)\d+", r"\1\\d+", path)
        if module.block is None:
            found.append(f"^{path}$")
        else:
            blocks[path.removeprefix(re.escape(f"{before}{module.block}"))].append(str(module.block))
    for path, numbers in blocks.items():
        found.append(f"^{re.escape(before)}(?:{'|'.join(dict.fromkeys(numbers))}){path}$")
    return sorted(found)


def _path(module: Module, parts: list[Module]) -> str:
    """An expression for the parts of a merged matrix and for itself ("qkv" is called `qkv_proj`), or for one module."""
    if len(parts) == 1:
        return re.escape(module.name)
    assert module.fused is not None
    names = [_last(part.name) for part in parts]
    if module.expert is None:
        names.append(f"{_last(module.fused)}_proj")
    return re.escape(module.name.removesuffix(_last(module.name))) + f"(?:{'|'.join(map(re.escape, names))})"


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def target_pattern(target: str) -> re.Pattern[str] | None:
    """What a target of compressed-tensors matches from its beginning on; None: it is the class of all linear layers."""
    if target == "Linear":
        return None
    return re.compile(target[3:] if target.startswith("re:") else re.escape(target) + r"\Z")
