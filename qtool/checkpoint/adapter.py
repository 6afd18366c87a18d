"""A branch of low rank beside packed matrices, as a LoRA adapter in the folder `adapter` of a model's folder.

    adapter_config.json         what PEFT and vLLM want to know
    adapter_model.safetensors   base_model.model.MODULE.lora_A.weight  [r, K]
                                base_model.model.MODULE.lora_B.weight  [N, r]

A layer then gives x W^T + (lora_alpha / r) (x A^T) B^T, where the branch reads inputs as they are before they are
rounded. Here lora_alpha is r. It has a folder of its own because transformers takes an `adapter_config.json` beside
config.json for the whole model. Only adapters that qtool wrote are part of a model: others change what it computes.
Layout: https://huggingface.co/docs/peft/developer_guides/checkpoint

Shape letters: N rows, K columns, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from qtool.checkpoint._base import TensorInfo
from qtool.checkpoint.config import read_json
from qtool.checkpoint.links import own_file
from qtool.checkpoint.safetensors_io import SafetensorsFile
from qtool.errors import CheckpointError, one_line
from qtool.formats.int import DTYPES
from qtool.numerics.checks import finite
from qtool.residuals._base import Correction
from qtool.residuals.low_rank import LowRank

FOLDER, CONFIG, WEIGHTS = "adapter", "adapter_config.json", "adapter_model.safetensors"
METADATA = {"format": "pt", "written_by": "qtool"}
PREFIX = "base_model.model."
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class AdapterSettings(BaseModel):
    """What of adapter_config.json says how much a branch adds."""

    peft_type: str
    r: int = Field(ge=1)
    lora_alpha: float
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"

    def plain(self, module: str, rank: int) -> bool:
        """Whether a branch of that rank adds the product of its matrices, and nothing else."""
        wanted, alpha = self.rank_pattern.get(module, self.r), self.alpha_pattern.get(module, self.lora_alpha)
        kind = self.peft_type == "LORA" and self.bias == "none" and not self.use_rslora and not self.use_dora
        return kind and rank == wanted == alpha


def names(module: str) -> tuple[str, str]:
    """Of B [N, r], the left, and of A [r, K], the right matrix of a branch."""
    return f"{PREFIX}{module}.lora_B.weight", f"{PREFIX}{module}.lora_A.weight"


def infos(module: str, residual: LowRank, n: int, k: int) -> dict[str, TensorInfo]:
    """The tensors of a branch beside a matrix of n rows and k columns."""
    left, right = (TensorInfo(*residual.infos(n, k)[side]) for side in ("left", "right"))
    return dict(zip(names(module), (left, right), strict=True))


def settings(residuals: Mapping[str, LowRank]) -> dict[str, Any]:
    """Content of adapter_config.json, of branches by module.

    Runtimes divide lora_alpha by r. Those that do not know patterns do so by the defaults, so that these are alike, and
    the default is the largest rank, which they make room for.
    """
    ranks = {module: residual.rank for module, residual in residuals.items()}
    largest = max(ranks.values())
    others = {module: rank for module, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_rslora": False,
        "use_dora": False,
    }


class Adapter:
    """The branches of a folder, if qtool wrote any.

    Args:
        folder: of the model.

    Attributes:
        located: tensor name -> file.

    Raises:
        CheckpointError: files that are damaged, or belong to another kind of adapter.
    """

    def __init__(self, folder: Path) -> None:
        self.located: dict[str, SafetensorsFile] = {}
        self.path = folder / FOLDER / WEIGHTS
        if self.path.parent.is_symlink():
            raise CheckpointError(f"{self.path.parent} is a link", hint="copy the folder there")
        if not own_file(self.path):
            return
        file = SafetensorsFile(self.path)
        if file.metadata.get("written_by") != METADATA["written_by"]:
            return
        config = folder / FOLDER / CONFIG
        try:
            self._settings = AdapterSettings.model_validate(read_json(config))
        except ValidationError as error:
            raise CheckpointError(f"{config}: no adapter's configuration", found=one_line(error)) from error
        self.located = dict.fromkeys(file.entries, file)

    def residuals(self, module: str, n: int, k: int) -> tuple[LowRank, ...]:
        """The branch beside a module of n rows and k columns; how it was found is not known any more.

        Raises:
            CheckpointError: one that does not fit the module, or is not added as it is.
        """
        left, right = names(module)
        if left not in self.located and right not in self.located:
            return ()
        found = self._info(right)
        if len(found.shape) != 2 or found.dtype not in NAMES or not 1 <= found.shape[0] <= min(n, k):
            raise CheckpointError(f"{self.path}: {right}", wanted=f"floats [r, {k}]", found=found)
        residual = LowRank.model_validate({"rank": found.shape[0], "dtype": NAMES[found.dtype]})
        for name, wanted in infos(module, residual, n, k).items():
            if (stored := self._info(name)) != wanted:
                raise CheckpointError(f"{self.path}: {name}", wanted=wanted, found=stored)
        if not self._settings.plain(module, residual.rank):
            wanted_text = "LoRA whose lora_alpha is its rank"
            raise CheckpointError(f"{self.path.with_name(CONFIG)}: {module}", wanted=wanted_text, found="another")
        return (residual,)

    def correction(self, module: str, residual: LowRank, start: int = 0, stop: int | None = None) -> Correction:
        """The branch, of rows `start` to `stop`. Raises NumericsError: it is not finite."""
        left, right = names(module)
        tensors = {
            "left": finite(self.located[left].read(left, start, stop), f"{self.path}: {left}"),
            "right": finite(self.located[right].read(right), f"{self.path}: {right}"),
        }
        return Correction(residual, tensors)

    def check(self, modules: Mapping[str, object]) -> None:
        """Raises CheckpointError: there is a tensor that belongs to none of these modules' branches."""
        known = {name for module in modules for name in names(module)}
        if strange := sorted(self.located.keys() - known):
            raise CheckpointError(f"{self.path}: {strange[0]}", wanted="branches of packed matrices", found="another")

    def _info(self, name: str) -> TensorInfo:
        if name not in self.located:
            raise CheckpointError(f"{self.path} lacks {name}")
        return self.located[name].info(name)
