"""Models without a class: what names and shapes of stored tensors say, which is enough to quantize without data.

Matrices of numbered blocks are linear layers, unless their names say otherwise. What reads the same input is guessed
from usual names, and only so that runtimes which merge such layers find one format in them.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from qtool.checkpoint.derived.chain import Streams
from qtool.checkpoint.derived.facts import Facts
from qtool.checkpoint.derived.family import Derived, family_of
from qtool.checkpoint.derived.roles import ROUTERS, merged, role_of
from qtool.checkpoint.families._parts import EXPERT, Linear
from qtool.errors import CheckpointError

FREE = "qtool_model_free"
"""What config.json of such a model says beside what it said before, once it is quantized."""
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "embeddings", "embed")
HEADS = ("lm_head", "embed_out", "output")
OTHER_PARTS = ("visual", "vision", "audio", "projector", "merger", "mtp", "nextn", "eagle", "draft")
"""In names of what is beside the language model."""
NO_LINEAR = ("norm", "embed", "conv", "rotary", "position", "bias", "A_log")
"""In last parts of names of what is no linear layer."""
MOST_EXPERTS = 1024
"""Rows of a router at most."""
BLOCK = re.compile(r"(?P<before>.*?)\.(?P<number>\d+)\.")
PARTS = (
    *("weight_scale", "weight_scale_inv", "weight_shape", "weight_global_scale", "weight_zero_point", "weight_g_idx"),
    *("input_scale", "input_global_scale", "input_zero_point"),
)
"""What packed matrices have beside their codes."""


def free_family(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Derived:
    """The family of a model whose class nobody knows.

    Args:
        config: config.json.
        shapes: of all tensors, by name.

    Raises:
        CheckpointError: no numbered blocks, or no token embedding.
    """
    embedding = ending(shapes, EMBEDDINGS)
    found = (template_of(name) for name, shape in shapes.items() if is_matrix(name, shape))
    templates = Counter(template for template in found if template)
    if embedding is None or not templates:
        wanted = "a token embedding, and matrices in numbered blocks, by usual names"
        raise CheckpointError("these tensors do not look like a language model", wanted=wanted, found=first(shapes))
    prefix = templates.most_common(1)[0][0]
    blocks: dict[int, list[str]] = defaultdict(list)
    for name in sorted(shapes, key=natural):
        if template_of(name) == prefix and is_matrix(name, shapes[name]):
            blocks[int(BLOCK.match(name)["number"])].append(name)  # type: ignore[index]
    linears = tuple(tuple(block(prefix.format(i=i), blocks[i], shapes)) for i in range(max(blocks) + 1))
    order = sorted(shapes, key=lambda name: (name != f"{embedding}.weight", natural(name)))
    classes = config.get("architectures")
    facts = Facts(
        architecture=str(classes[0]) if isinstance(classes, list) and classes else str(config.get("model_type")),
        blocks_path="",
        block_prefix=prefix,
        embedding=embedding,
        head=ending(shapes, HEADS) or "lm_head",
        head_bias=None,
        streams=Streams(),
        shapes={name: shapes[name] for name in order},
        linears=linears,
        paths={},
        around={},
        slices={},
        experts=1 + max((x.expert for own in linears for x in own if x.expert is not None), default=-1),
        separate=True,
        outputs=(),
    )
    return family_of(facts, model_free=True)


def ending(shapes: Mapping[str, tuple[int, ...]], names: tuple[str, ...]) -> str | None:
    """The matrix outside of blocks and other parts whose name ends in one of these."""
    for last in names:
        for name, shape in shapes.items():
            module = name.removesuffix(".weight")
            outside = not BLOCK.match(name) and not any(part in name for part in OTHER_PARTS)
            if len(shape) == 2 and outside and name.endswith(".weight") and module.rpartition(".")[2] == last:
                return module
    return None


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of a block is the weight of a linear layer."""
    module, _, kind = name.rpartition(".")
    last = module.rpartition(".")[2]
    other = any(part in name for part in OTHER_PARTS) or any(part in last for part in NO_LINEAR)
    return kind == "weight" and len(shape) == 2 and (min(shape) > 1 or last in ROUTERS) and not other


def template_of(name: str) -> str | None:
    """What a name of block 3 begins with, with "{i}": "model.layers.{i}." of "model.layers.3.mlp.up_proj.weight"."""
    found = BLOCK.match(name)
    return found and f"{found['before']}.{{i}}."


def block(before: str, names: list[str], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Linear]:
    """The linear layers of a block."""
    paths = [name.removeprefix(before).removesuffix(".weight") for name in names]
    fused = dict(merged(paths))
    for path in paths:
        expert = EXPERT.search(f".{path}.")
        last, rows = path.rpartition(".")[2], shapes[f"{before}{path}.weight"][0]
        router = last in ROUTERS and rows <= MOST_EXPERTS and expert is None
        reads = f"{fused[path]}.in" if path in fused else f"{path}.in"
        index = int(expert[1]) if expert else None
        role = "router" if router else role_of(path)
        yield Linear(path, role, reads, fused.get(path), index, "router" if router else "linear")


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts block 10 behind block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def first(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What there is instead, for a message."""
    return f"{next(iter(shapes))} and {len(shapes) - 1} more" if shapes else "none"
