"""The matrices of a model that recipes can give formats to: its own, and those that are beside it.

Draft layers, vision towers and projectors are beside a model without a family file: outside of its blocks, whether its
class knows them or not. They are copied as they are, unless a rule names them or their file has them quantized.
"""

from __future__ import annotations

from collections.abc import Iterator

from qtool.checkpoint._base import Checkpoint, Module, QuantizedCheckpoint, TensorInfo
from qtool.checkpoint.derived.free import BLOCK, MOST_EXPERTS, NO_LINEAR
from qtool.checkpoint.derived.roles import ROUTERS, merged
from qtool.checkpoint.families._base import OUTPUT
from qtool.checkpoint.families._parts import EXPERT
from qtool.errors import CheckpointError

BESIDE = "beside"
"""Kind and role of matrices that are beside the model."""


def modules(checkpoint: Checkpoint) -> Iterator[Module]:
    """The model's own matrices, in the order of `checkpoint.names()`, and those beside it that are quantized.

    Raises:
        CheckpointError: a tensor is missing, has another shape than config.json says, or belongs to no such model.
    """
    yield from own_modules(checkpoint)
    if isinstance(checkpoint, QuantizedCheckpoint):
        yield from (module for module in beside(checkpoint) if module.name in checkpoint.layers)


def own_modules(checkpoint: Checkpoint) -> Iterator[Module]:
    """Token embedding, linear layers of the blocks, and output layer; see `modules`.

    Raises:
        CheckpointError: a tensor is missing, has another shape than config.json says, or belongs to no such model.
    """
    verify(checkpoint)
    family, config = checkpoint.family, checkpoint.config
    others = () if family.head == OUTPUT else (OUTPUT,)
    aliases = (family.head, *others) if checkpoint.tied else ()
    shape = _matrix(checkpoint, family.embedding)
    reads = "head_in" if checkpoint.tied else "tokens"
    yield Module(family.embedding, aliases, "embedding", "embedding", None, reads, None, shape)
    for i in range(family.blocks(config)):
        prefix = family.block_prefix.format(i=i)
        for linear in family.block_linears(config, i):
            name = prefix + linear.path
            fused = prefix + linear.fused if linear.fused else None
            shape = _matrix(checkpoint, name)
            yield Module(name, (), linear.kind, linear.role, i, prefix + linear.reads, fused, shape, linear.expert)
    if not checkpoint.tied:
        yield Module(family.head, others, "linear", "head", None, "head_in", None, _matrix(checkpoint, family.head))


def beside(checkpoint: Checkpoint) -> Iterator[Module]:
    """Matrices beside the model that are linear layers by their names, in the order of `checkpoint.names()`."""
    family = checkpoint.family
    if not family.derived:
        return
    own = {module.name for module in own_modules(checkpoint)}
    blocks = {family.block_prefix.format(i=i) for i in range(family.blocks(checkpoint.config))}
    before = len(family.block_prefix.partition("{i}")[0])
    shapes = {}
    for name in checkpoint.names():
        module, _, part = name.rpartition(".")
        if part != "weight" or module in own or name[: name.find(".", before) + 1] in blocks:
            continue
        if is_linear(module, info := checkpoint.info(name)) and family.linear_outside(name) is not False:
            n, k = info.shape
            shapes[module] = n, k
    fused = dict(merged(shapes))
    for name, shape in shapes.items():
        expert = EXPERT.search(name)
        index = int(expert[1]) if expert else None
        yield Module(name, (), BESIDE, BESIDE, None, f"{fused.get(name, name)}.in", fused.get(name), shape, index)


def is_linear(module: str, info: TensorInfo) -> bool:
    """Whether a tensor is the weight of a linear layer that routes no tokens, as far as its name tells."""
    last = module.rpartition(".")[2]
    if len(info.shape) != 2 or min(info.shape) < 2 or not info.dtype.is_floating_point or info.dtype.itemsize < 2:
        return False
    return not any(part in last for part in NO_LINEAR) and (last not in ROUTERS or info.shape[0] > MOST_EXPERTS)


def place_of(module: str) -> str:
    """What stands beside the model in one place: "mtp.layers.0" of "mtp.layers.0.mlp.up_proj"."""
    found = BLOCK.match(module)
    return found[0].removesuffix(".") if found else module


def _matrix(checkpoint: Checkpoint, module: str) -> tuple[int, int]:
    n, k = checkpoint.info(f"{module}.weight").shape
    return n, k


def verify(checkpoint: Checkpoint) -> None:
    """Compares names and shapes with what config.json implies.

    Raises:
        CheckpointError: a tensor is missing, superfluous or of another shape.
    """
    expected, found = checkpoint.family.shapes(checkpoint.config), checkpoint.names()
    kind = checkpoint.config["model_type"]
    if missing := expected.keys() - set(found):
        first = next(name for name in expected if name in missing)
        raise CheckpointError(
            f"{checkpoint.source} lacks {len(missing)} of the {len(expected)} tensors of a {kind} model",
            found=f"no {first}",
            hint="is config.json the one that belongs to these weights?",
        )
    if unknown := [name for name in found if name not in expected and not checkpoint.family.derived]:
        raise CheckpointError(
            f"{checkpoint.source} holds a tensor that {kind} models do not have",
            found=unknown[0],
            hint="only the plain architectures are supported, not variants that reuse their model_type",
        )
    for name, shape in expected.items():
        if checkpoint.info(name).shape != shape:
            raise CheckpointError(
                f"{checkpoint.source}: tensor {name} does not fit config.json",
                wanted=list(shape),
                found=list(checkpoint.info(name).shape),
            )
