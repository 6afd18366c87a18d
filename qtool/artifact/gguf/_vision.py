"""Vision tower and projector as a file beside a language model, which llama.cpp's mtmd loads with it (mmproj).

Names and keys are those of the gguf package (`MODEL_ARCH.MMPROJ`, `Keys.ClipVision`). What is proven is that mtmd makes
of a picture what transformers makes of it.
Source: https://github.com/ggml-org/llama.cpp/blob/master/tools/mtmd/README.md

Shape letters: N rows and K columns of a matrix, C channels of a picture, T pictures in time, P size of a patch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.checkpoint.config import read_json, read_own
from qtool.checkpoint.conversions._base import filled
from qtool.checkpoint.families._gguf import check_fixed
from qtool.checkpoint.gguf_io import GGUFFile
from qtool.checkpoint.hf import locate
from qtool.checkpoint.safetensors_io import SafetensorsFile
from qtool.errors import CheckpointError, VerifyError
from qtool.store.gguf_writer import Container, Value

PLAIN = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
"""GGUF's numbers of types."""
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
"""Side files that say how pictures become numbers."""
SPELLINGS = {
    "_projection_weight": "_projection.weight",
    "vision_tower.vision_model.": "vision_tower.",
    "vision_tower.": "vision_tower.vision_model.",
}
"""Parts of names -> what the gguf package knows; towers are one level deeper in checkpoints of transformers 4."""
Parts = Mapping[str, Callable[[Tensor], Tensor]]
"""Name in GGUF's table -> what of a tensor it is."""


@dataclass(frozen=True)
class Tower:
    """What one `model_type` has.

    Attributes:
        projector: `clip.projector_type`.
        prefixes: what names of its tensors begin with.
        numbers: key below "clip.vision." -> field of `vision_config`.
        fixed: fields of `vision_config` that llama.cpp takes for granted.
        epsilon: of its norms, if `vision_config` does not say it.
        mean, std: of pictures, where no side file says them.
        flags: further key-values.
        more: config.json -> key-values below "clip.vision.".
        cuts: end of a name -> the parts that GGUF wants, by what they are called in the place of that end.
        offsets: end of a name -> what GGUF adds to every number.
    """

    projector: str
    prefixes: tuple[str, ...]
    numbers: Mapping[str, str]
    fixed: Mapping[str, Any]
    epsilon: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flags: Mapping[str, bool]
    more: Callable[[dict[str, Any]], dict[str, Value]]
    cuts: Mapping[str, Parts] = field(default_factory=dict)
    offsets: Mapping[str, float] = field(default_factory=dict)


def gemma3_more(config: dict[str, Any]) -> dict[str, Value]:
    """Pictures have one size, and so many patches of each become one token."""
    vision = config["vision_config"]
    side, tokens = int(vision["image_size"]) // int(vision["patch_size"]), int(config.get("mm_tokens_per_image", 256))
    merged = side // max(1, round(tokens**0.5))
    if merged * merged * tokens != side * side:
        raise CheckpointError("pictures cannot be cut so", wanted=f"{side * side} patches over a square", found=tokens)
    return {
        "image_size": int(vision["image_size"]),
        "projection_dim": int(config["text_config"]["hidden_size"]),
        "projector.scale_factor": merged,
    }


def qwen25_more(config: dict[str, Any]) -> dict[str, Value]:
    """Every n-th block sees all of a picture, the others a window."""
    vision = config["vision_config"]
    found = [int(i) for i in vision["fullatt_block_indexes"]]
    every = found[0] + 1 if found and found[0] else 8  # of published models
    wanted = list(range(every - 1, int(vision["depth"]), every))
    check_fixed("qwen2.5vl_merger", {"fullatt_block_indexes": found}, {"fullatt_block_indexes": wanted})
    return {
        "image_size": 560,  # pictures have any size; llama.cpp wants to be told one
        "n_wa_pattern": every,
        "window_size": int(vision["window_size"]),
        "projection_dim": int(vision["out_hidden_size"]),
    }


def third(i: int) -> Callable[[Tensor], Tensor]:
    """The i-th third of the rows."""
    return lambda x: x.chunk(3)[i]


def moment(i: int) -> Callable[[Tensor], Tensor]:
    """The kernel for the i-th of T pictures: [N, C, T, P, P] -> [N, C, P, P]."""
    return lambda x: x[:, :, i]


QKV: Parts = {".q": third(0), ".k": third(1), ".v": third(2)}
TOWERS: Mapping[str, Tower] = {
    "gemma3": Tower(
        "gemma3",
        ("vision_tower.", "multi_modal_projector."),
        {
            "patch_size": "patch_size",
            "embedding_length": "hidden_size",
            "feed_forward_length": "intermediate_size",
            "block_count": "num_hidden_layers",
            "attention.head_count": "num_attention_heads",
        },
        {"hidden_act": "gelu_pytorch_tanh", "num_channels": 3},
        1e-6,
        (0.5,) * 3,
        (0.5,) * 3,
        {"clip.use_gelu": True},
        gemma3_more,
        offsets={"mm_soft_emb_norm.weight": 1.0},
    ),
    "qwen2_5_vl": Tower(
        "qwen2.5vl_merger",
        ("visual.",),
        {
            "patch_size": "patch_size",
            "embedding_length": "hidden_size",
            "feed_forward_length": "intermediate_size",
            "block_count": "depth",
            "attention.head_count": "num_heads",
            "spatial_merge_size": "spatial_merge_size",
        },
        {
            "hidden_act": "silu",
            "window_size": 112,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "in_channels": 3,
            "in_chans": 3,
        },
        1e-6,
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
        {"clip.use_silu": True},
        qwen25_more,
        {".qkv": QKV, "patch_embed.proj": {"patch_embed.proj": moment(0), "patch_embed.proj.1": moment(1)}},
    ),
}
"""By `model_type`."""


class VisionFile:
    """The vision tower of a folder, to be written.

    Args:
        folder: a checkpoint as it was published.

    Raises:
        CheckpointError: it has none that llama.cpp is known to compute rightly.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, filled_config(folder)
        kind = self.config.get("model_type")
        if kind not in TOWERS:
            known = ", ".join(TOWERS)
            raise CheckpointError(
                f"{folder} has no vision tower that is written for llama.cpp", wanted=known, found=kind
            )
        self.tower, self.vision = TOWERS[str(kind)], self.config["vision_config"]
        check_fixed(self.tower.projector, self.vision, dict(self.tower.fixed))
        self.parts = dict(self._parts(locate(folder)))
        self.metadata("")
        if not self.parts:
            raise CheckpointError(f"{folder} holds no tensors of a vision tower", wanted=self.tower.prefixes[0])

    def metadata(self, name: str) -> dict[str, Value]:
        """Key-values; `name` is the model's."""
        tower = self.tower
        processor = next((read_json(p) for p in map(self.folder.joinpath, PROCESSORS) if p.is_file()), {})
        processor = processor.get("image_processor", processor)
        about: dict[str, Value] = {key: int(self.vision[field]) for key, field in tower.numbers.items()}
        about["attention.layer_norm_epsilon"] = float(self.vision.get("layer_norm_eps", tower.epsilon))
        for key, usual in (("image_mean", tower.mean), ("image_std", tower.std)):
            about[key] = [float(x) for x in processor.get(key) or usual]
        about |= tower.more(self.config)
        return {
            "general.architecture": "clip",
            "general.type": "mmproj",
            "general.name": name,
            "general.file_type": 0,
            "general.quantization_version": 2,
            "clip.has_vision_encoder": True,
            "clip.projector_type": tower.projector,
            **tower.flags,
            **{f"clip.vision.{key}": value for key, value in about.items()},
        }

    def write(self, path: Path, name: str) -> Path:
        """Writes the file: matrices in their own type, all else in F32.

        Raises:
            VerifyError: it reads back differently.
        """
        tensors = {there: self.info(there) for there in self.parts}
        with Container(path, self.metadata(name), {there: shape for there, (shape, _) in tensors.items()}) as out:
            for there, (_, dtype) in tensors.items():
                out.add(there, PLAIN[dtype], [self.read(there).to(dtype)])
        file = GGUFFile(path)
        if differing := [t for t in self.parts if not torch.equal(file.read(t).float(), self.read(t).float())]:
            raise VerifyError(f"{path}: tensor {differing[0]} reads back differently")
        return path

    def info(self, there: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and type in the file."""
        here, file, cut = self.parts[there]
        info = file.info(here)
        shape = tuple(cut(torch.empty(info.shape, device="meta")).shape)
        plain = len(shape) == 2 and "embd" not in there and info.dtype in PLAIN
        return shape, info.dtype if plain else torch.float32

    def read(self, there: str) -> Tensor:
        """A tensor as the file holds it, in its own type; float32 where something is added."""
        here, file, cut = self.parts[there]
        found: Tensor = cut(file.read(here)).contiguous()
        offset = next((add for end, add in self.tower.offsets.items() if here.endswith(end)), 0.0)
        return found.float() + offset if offset else found

    def _parts(self, stored: Mapping[str, SafetensorsFile]) -> Iterator[tuple[str, tuple[str, SafetensorsFile, Any]]]:
        """(name in GGUF, (tensor, file, what of it)) of everything but the language model."""
        table = vision_names(int(self.vision[self.tower.numbers["block_count"]]))
        for here in sorted(stored):
            name = here.removeprefix("model.")
            for part, other in SPELLINGS.items():
                name = name.replace(part, other)
            if not name.startswith(self.tower.prefixes):
                continue
            module, _, kind = name.rpartition(".")
            module, kind = (module, f".{kind}") if kind in ("weight", "bias") else (name, ".weight")
            end = next((end for end in self.tower.cuts if module.endswith(end)), "")
            for other, cut in self.tower.cuts[end].items() if end else (("", whole),):
                asked = module.removesuffix(end) + other
                number = re.search(r"proj(\.\d+)$", asked)
                found = table.get_name(asked.removesuffix(number[1]) if number else asked)
                if found is None:
                    raise CheckpointError(f"the gguf package has no name for tensor {here} of a vision tower")
                yield f"{found}{kind}{number[1] if number else ''}", (here, stored[here], cut)


def whole(x: Tensor) -> Tensor:
    """x."""
    return x


@cache
def vision_names(blocks: int) -> Any:
    """The gguf package's names of the tensors of vision towers."""
    import gguf

    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, blocks)


def filled_config(folder: Path) -> dict[str, Any]:
    """config.json of a model of several parts, with what transformers assumes where it says nothing."""
    config = read_own(folder / "config.json")
    return filled(config) if config.get("model_type") in TOWERS else config
