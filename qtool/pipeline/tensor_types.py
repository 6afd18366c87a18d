"""`--tensor-type PATTERN=TYPE`, as llama-quantize has it: rules before all others, by names of tensors in GGUF.

https://github.com/ggml-org/llama.cpp/tree/master/tools/quantize
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qtool.checkpoint._base import Checkpoint, modules
from qtool.errors import UsageError
from qtool.recipe.parse import parse_format
from qtool.recipe.schema import Recipe, Rule

FLAG = "--tensor-type"
PLAIN = ("f32", "f16", "bf16")


def with_tensor_types(recipe: Recipe, checkpoint: Checkpoint, given: Sequence[str]) -> Recipe:
    """The recipe with a rule for each pattern, in this order, before its own.

    Args:
        recipe: what else to do.
        checkpoint: the model; only names are looked at.
        given: PATTERN=TYPE each; the regular expression is searched for in GGUF names such as blk.0.attn_v.weight, case
            aside.

    Raises:
        UsageError: one is not of that form, names no type, or matches nothing.
        CheckpointError: GGUF does not know the model's family.
    """
    if not given:
        return recipe
    names = checkpoint.family.gguf_names(checkpoint.config)
    known: dict[str, list[str]] = {}
    for m in modules(checkpoint):  # the experts of a layer are one tensor
        known.setdefault(names[f"{m.name}.weight"], []).append(m.name)
    rules = tuple(rule_of(text, known) for text in given)
    return recipe.model_copy(update={"layers": (*rules, *recipe.layers)})


def rule_of(text: str, known: dict[str, list[str]]) -> Rule:
    """The rule that one PATTERN=TYPE stands for; `known` has modules by GGUF name. Raises UsageError."""
    pattern, equals, kind = text.rpartition("=")
    if not equals or not pattern or not kind:
        raise UsageError(FLAG, wanted="PATTERN=TYPE, as in attn_v=q6_k", found=repr(text))
    try:
        expression = re.compile(pattern, re.IGNORECASE)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"{FLAG} {text}", wanted="a regular expression", found=error) from None
    hits = [module for there, own in known.items() if expression.search(there) for module in own]
    if not hits:
        raise UsageError(f"{FLAG} {text}", wanted=f"a part of a name such as {min(known)}", found="none that has it")
    match, kind = "re:" + "|".join(map(re.escape, hits)), kind.lower()
    try:
        fields = {"keep": kind} if kind in PLAIN else {"weights": parse_format(kind)}
        rule = Rule.model_validate({"match": match, **fields})
    except ValueError as error:
        raise UsageError(f"{FLAG} {text}", found=error) from None
    rule.place(f"{FLAG} {text}")
    return rule
