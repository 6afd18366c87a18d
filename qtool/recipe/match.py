"""Layer patterns: globs on module names, regular expressions for whole names, or roles.

In a glob `*` crosses dots; an expression comes after `re:`, roles come after `role:`. Roles are the same words in every
family: q, k, v, o, gate, up, down, embedding, head.
"""

from __future__ import annotations

import fnmatch
import re
import warnings
from functools import lru_cache
from typing import Protocol

EVERY_LINEAR = "*"
ROLES = re.compile(r"role:(\w+(?:,\w+)*)")


class Named(Protocol):
    """What a pattern is held against; `qtool.checkpoint._base.Module` is one."""

    @property
    def name(self) -> str:
        """Module path."""

    @property
    def aliases(self) -> tuple[str, ...]:
        """Other names of the same matrix."""

    @property
    def kind(self) -> str:
        """One of "linear", "embedding", "router"."""

    @property
    def role(self) -> str:
        """What it does: q, k, v, o, gate, up, down, router, embedding, head."""

    @property
    def block(self) -> int | None:
        """Index of its decoder block; None outside of them."""


@lru_cache(maxsize=4096)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """The regular expression that a pattern stands for.

    Raises:
        ValueError: the text after `re:` is not a regular expression, or that after `role:` no list of words.
    """
    if pattern.startswith("role:") and not ROLES.fullmatch(pattern):
        raise ValueError(f"{pattern!r} names no roles: wanted words and commas, as in role:gate,up")
    if not pattern.startswith("re:"):
        return re.compile(fnmatch.translate(pattern))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what Python only warns about means something else in its next version
            return re.compile(pattern[3:])
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None


def matches(pattern: str, module: Named) -> bool:
    """True if the pattern names the module, by its name or an alias.

    `*` alone means every linear layer: the token embedding is only reached by a pattern that says more, such as
    `model.embed_tokens`, or `lm_head` where the output layer is tied to it. What sends tokens to experts is reached by
    patterns that end in its own name, such as `*.mlp.gate`, and by `role:router`: `*.mlp.*` does not mean it.
    """
    if pattern == EVERY_LINEAR:
        return module.kind == "linear"
    if roles := ROLES.fullmatch(pattern):
        return module.role in roles[1].split(",")
    if module.kind == "router" and not pattern.removesuffix("$").endswith(module.name.rpartition(".")[2]):
        return False
    expression = compile_pattern(pattern)
    return any(expression.fullmatch(name) for name in (module.name, *module.aliases))
