"""`--tensor-type PATTERN=TYPE`, as llama-quantize has it: rules before all others, by names of tensors in GGUF.

https://github.com/ggml-org/llama.cpp/tree/master/tools/quantize
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qtool.checkpoint._base import Checkpoint
from qtool.checkpoint.modules import modules
from qtool.errors import UsageError
from qtool.formats._spelling import parse_format
from qtool.recipe.schema import Recipe, Rule

FLAG = "--tensor-type"
PLAIN = ("f32", "f16", "bf16")


def with_tensor_types(recipe: Recipe, checkpoint: Checkpoint, assignments: Sequence[str]) -> Recipe:
    """The recipe with a rule for each pattern, in this order, before its own.

    Args:
        recipe: what else to do.
        checkpoint: the model; only names are looked at.
        assignments: PATTERN=TYPE each; the regular expression is searched for in GGUF names such as
            blk.0.attn_v.weight, case aside.

    Raises:
        UsageError: one is not of that form, names no type, or matches nothing.
        CheckpointError: GGUF does not know the model's family.
    """
    if not assignments:
        return recipe
    names = checkpoint.family.gguf_names(checkpoint.config)
    modules_of: dict[str, list[str]] = {}
    for m in modules(checkpoint):  # the experts of a layer are one tensor
        modules_of.setdefault(names[f"{m.name}.weight"], []).append(m.name)
    rules = tuple(rule_of(text, modules_of) for text in assignments)
    return recipe.model_copy(update={"layers": (*rules, *recipe.layers)})


def rule_of(text: str, modules_of: dict[str, list[str]]) -> Rule:
    """The rule that one PATTERN=TYPE stands for; `modules_of` has them by GGUF name. Raises UsageError."""
    pattern, equals, kind = text.rpartition("=")
    if not equals or not pattern or not kind:
        raise UsageError(FLAG, wanted="PATTERN=TYPE, as in attn_v=q6_k", found=repr(text))
    try:
        expression = re.compile(pattern, re.IGNORECASE)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"{FLAG} {text}", wanted="a regular expression", found=error) from None
    hits = [module for gguf_name, names in modules_of.items() if expression.search(gguf_name) for module in names]
    if not hits:
        raise UsageError(
            f"{FLAG} {text}", wanted=f"a part of a name such as {min(modules_of)}", found="none that has it"
        )
    match, kind = "re:" + "|".join(map(re.escape, hits)), kind.lower()
    try:
        fields = {"keep": kind} if kind in PLAIN else {"weights": parse_format(kind)}
        rule = Rule.model_validate({"match": match, **fields})
    except ValueError as error:
        raise UsageError(f"{FLAG} {text}: {error}") from None
    rule.place(f"{FLAG} {text}")
    return rule
