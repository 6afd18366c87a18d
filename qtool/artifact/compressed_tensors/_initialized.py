"""Which packed layers transformers does not load: its class looks for their `weight`, to initialize it, and fails.

transformers (5.23) hands every module of a model to `_init_weights` of its class once it is loaded. Classes that ask
for `weight` there without looking whether it is, SigLIP's among them, end with an AttributeError where it is packed.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import lru_cache

import torch

from qtool.checkpoint._base import Checkpoint
from qtool.checkpoint.derived.skeleton import quiet, skeleton
from qtool.errors import CheckpointError


def looked_for(model: Checkpoint, packed: Collection[str]) -> list[str]:
    """Those of the packed modules of a model without a family file that keep it from being loaded, in order.

    Args:
        model: whose class is asked.
        packed: names of modules without a tensor `weight`.
    """
    if not packed or not model.family.derived or model.family.model_free:
        return []
    paths = {name: model.family.class_path(name) for name in packed}
    found = _failing(json.dumps(model.config, sort_keys=True), tuple(paths.values()))
    return [name for name, path in paths.items() if path in found]


@lru_cache(maxsize=8)
def _failing(config: str, paths: tuple[str, ...]) -> frozenset[str]:
    """See `looked_for`; by the class's own names."""
    from transformers import PreTrainedModel

    try:
        own = dict(skeleton(json.loads(config), torch.bfloat16).named_modules())
    except CheckpointError:
        return frozenset()
    paths = tuple(path for path in paths if path in own)
    for path in paths:
        own[path]._parameters.pop("weight", None)
    asked: dict[tuple[type, type], bool] = {}

    def fails(path: str) -> bool:
        """Whether initializing a module ends so, as it does for all of its class."""
        owner = next(m for up in _above(path) if isinstance(m := own[up], PreTrainedModel))
        key = type(owner), type(own[path])
        if key not in asked:
            asked[key] = False
            try:
                with quiet(), torch.no_grad():
                    owner._init_weights(own[path])
            except Exception as error:  # noqa: BLE001 (code of others, without numbers to initialize)
                asked[key] = "no attribute 'weight'" in str(error)
        return asked[key]

    return frozenset(path for path in paths if fails(path) or fails(path.rpartition(".")[0]))


def _above(path: str) -> list[str]:
    """A path and what is above it, the nearest first; "" is all."""
    parts = path.split(".") if path else []
    return [".".join(parts[:i]) for i in range(len(parts), -1, -1)]
