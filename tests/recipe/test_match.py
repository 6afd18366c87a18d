"""Which modules a pattern names."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from qtool.recipe.match import compile_pattern, matches


@dataclass
class Named:
    name: str
    aliases: tuple[str, ...] = ()
    kind: str = "linear"
    role: str = "down"
    block: int | None = None


DOWN = Named("model.layers.12.mlp.down_proj")
TIED = Named("model.embed_tokens", ("lm_head",), "embedding")
UNTIED = Named("model.embed_tokens", (), "embedding")
HEAD = Named("lm_head")
ROUTER = Named("model.layers.3.mlp.gate", (), "router", "router")


@pytest.mark.parametrize(
    ("pattern", "module", "expected"),
    [
        ("*", DOWN, True),
        ("*", HEAD, True),
        ("*", TIED, False),
        ("*", UNTIED, False),
        ("**", UNTIED, True),
        ("re:.*", UNTIED, True),
        ("*.down_proj", DOWN, True),
        ("*.mlp.*", DOWN, True),
        ("model.layers.1?.mlp.down_proj", DOWN, True),
        ("model.layers.1.*", DOWN, False),
        ("model.layers.[01]2.*", DOWN, True),
        ("*DOWN_proj", DOWN, False),
        ("down_proj", DOWN, False),
        ("model.layers.12", DOWN, False),
        ("modelxlayersx12xmlpxdown_proj", DOWN, False),
        (r"re:.*\.(up|down)_proj", DOWN, True),
        ("re:down", DOWN, False),
        ("re:model.layers.12", DOWN, False),
        ("lm_head", TIED, True),
        ("lm_head", UNTIED, False),
        ("lm_head", HEAD, True),
        ("model.embed_tokens", TIED, True),
        ("re:lm_head|.*embed_tokens", UNTIED, True),
        ("role:down", DOWN, True),
        ("role:up,down", DOWN, True),
        ("role:up,gate", DOWN, False),
        ("role:dow", DOWN, False),
        ("role:down_proj", DOWN, False),
        ("*", ROUTER, False),
        ("**", ROUTER, False),
        ("*.mlp.*", ROUTER, False),
        ("re:.*gate.*", ROUTER, False),
        ("*gate_proj", ROUTER, False),
        ("*.mlp.gate", ROUTER, True),
        ("*.up_proj.gate", ROUTER, False),
        ("re:.*mlp.gate$", ROUTER, True),
        ("model.layers.3.mlp.gate", ROUTER, True),
        ("role:router", ROUTER, True),
        ("role:gate", ROUTER, False),
    ],
)
def test_matches(pattern, module, expected):
    assert matches(pattern, module) is expected


@pytest.mark.parametrize("pattern", ["re:(", "re:*", "re:a{99999999999}", "re:" + "(" * 5000, "re:[[a]", "re:a(?i)b"])
def test_what_is_no_regular_expression_is_said(pattern):
    with pytest.raises(ValueError, match="is not a regular expression: "):
        compile_pattern(pattern)


@pytest.mark.parametrize("pattern", ["role:", "role:q,", "role: q", "role:q k", "role:*"])
def test_what_is_no_list_of_roles_is_said(pattern):
    with pytest.raises(ValueError, match="names no roles: wanted words and commas, as in role:gate,up"):
        compile_pattern(pattern)
