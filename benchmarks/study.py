"""Integers against floats with as many bits and scales, on the demo model: what docs/study.md shows.

In miniature the tables of https://arxiv.org/abs/2510.25602 (INT v.s. FP), https://arxiv.org/abs/2303.17951 (FP8 versus
INT8) and https://arxiv.org/abs/2509.23202 (Bridging the Gap ... FP4): KL divergence of SmolLM2-135M off any grid, as it
is and with outliers in its activations, weights only and weights with inputs; and decibels of single tensors.

Everything runs in this process. A model's weights are rounded once for all the ways its inputs are, the unquantized
model is walked once, and every number is kept as soon as it is known, so that a run that was cut off goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import yaml
from torch import Tensor

from benchmarks import models, tensors
from benchmarks.comparisons import FORMATS, METHODS, PAIRS, VARIANTS, Run, runs, tensor_formats
from qtool.calibrate.tokens import load_tokens
from qtool.calibrate.walker import Walker
from qtool.checkpoint._base import Checkpoint, Layer, Module, QuantizedCheckpoint, TensorInfo
from qtool.checkpoint.modules import modules
from qtool.checkpoint.open import open_checkpoint
from qtool.evaluate.divergence import Scores
from qtool.evaluate.run import Logits, Steps, chunked, encode, walk
from qtool.formats._base import Format
from qtool.formats._spelling import parse_format
from qtool.methods.rtn import RTN
from qtool.models import open_artifact
from qtool.pipeline.quantize import QuantizeOptions
from qtool.pipeline.quantize import run as quantize
from qtool.pipeline.solve import informed
from qtool.pipeline.solver import with_static
from qtool.plan import LayerPlan
from qtool.recipe.schema import Calibration
from qtool.stats._base import InputStats
from qtool.stats.values import Values
from qtool.store.files import new_file

CONTEXT = 512
CALIBRATION = {"data": "builtin", "samples": 16, "length": 512}
SAMPLE = 2
"""Chunks of text whose tokens single tensors are measured on."""


class Rounded(QuantizedCheckpoint):
    """A model with some matrices replaced by what a runtime would multiply with.

    Args:
        origin: gives everything else.
        matrices: by module, float32 [N, K].
        layers: by module.
    """

    has_codes: ClassVar[bool] = False

    def __init__(self, origin: Checkpoint, matrices: Mapping[str, Tensor], layers: Mapping[str, Layer]) -> None:
        self.origin, self.matrices, self.layers = origin, matrices, layers
        self.source, self.config, self.family, self.files = origin.source, origin.config, origin.family, origin.files

    def names(self) -> list[str]:
        """See `Checkpoint.names`."""
        return self.origin.names()

    def info(self, name: str) -> TensorInfo:
        """See `Checkpoint.info`."""
        return self.origin.info(name)

    def tensor(self, name: str) -> Tensor:
        """See `Checkpoint.tensor`."""
        found = self.matrices.get(name.removesuffix(".weight"))
        return self.origin.tensor(name) if found is None else found

    def fingerprint(self) -> str:
        """See `Checkpoint.fingerprint`."""
        return self.origin.fingerprint()

    def matrix(self, module: str) -> Any:
        """Only decoded matrices are kept."""
        raise NotImplementedError(module)


class Bench:
    """One variant of the model, ready to be compared with.

    Args:
        path: its folder.
        text: to evaluate on.
        chunks: of it.
        device: where.
        work: for GPTQ's runs.
        context: tokens of a chunk.
    """

    def __init__(
        self, path: Path, text: Path, chunks: int, device: torch.device, work: Path, context: int = CONTEXT
    ) -> None:
        self.path, self.device, self.work = path, device, work
        self.checkpoint = open_checkpoint(str(path))
        self.tokens, self.first = chunked(*encode(text, self.checkpoint), context, chunks), context // 2
        self.linears = [m for m in modules(self.checkpoint) if m.block is not None]

    def logits(self, model: Checkpoint) -> Logits:
        """Of the second half of every chunk."""
        return walk(model, self.tokens, self.first, self.device, torch.float32, Steps(lambda *_: None, 0))

    @cached_property
    def baseline(self) -> Logits:
        """Of the unquantized model."""
        return self.logits(self.checkpoint)

    @cached_property
    def inputs(self) -> dict[str, InputStats]:
        """How inputs of the unquantized model are distributed on calibration tokens, by name."""
        walker = Walker(self.checkpoint, self.device, torch.float32)
        found: dict[str, InputStats] = {}
        hidden = walker.embed(load_tokens(Calibration.model_validate(CALIBRATION), self.checkpoint))
        for i in range(len(walker.blocks)):
            found |= walker.collect(walker.load_block(i), i, hidden, frozenset({Values}))
        return found

    def matrices(self, weights: str, method: str) -> dict[str, Tensor]:
        """All linear layers of the blocks in a format."""
        fmt = parse_format(FORMATS[weights])
        if method == "RTN":
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                found = pool.map(lambda m: self.rounded(m, fmt), self.linears)
            return {m.name: w for m, w in zip(self.linears, found, strict=True)}
        out, recipe = self.work / "study-gptq", self.work / "study-gptq.yaml"
        rule = {"match": "*", "weights": FORMATS[weights], "method": METHODS[method]}
        content = {
            "recipe": 1,
            "name": "study",
            "calibration": CALIBRATION,
            "export": [{"to": "qtool"}],
            "layers": [rule],
        }
        recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
        options = QuantizeOptions(
            str(self.path), str(recipe), out, device=self.device.type, overwrite=True, verify=False
        )
        quantize(options)
        model = open_artifact(out)
        return {m.name: model.tensor(f"{m.name}.weight").to(self.device) for m in self.linears}

    def rounded(self, module: Module, fmt: Format) -> Tensor:
        """A weight rounded to nearest, on the device."""
        merged = [m.name for m in self.linears if m.fused == module.fused] if module.fused else [module.name]
        w = self.checkpoint.tensor(f"{module.name}.weight").to(self.device, torch.float32)
        return RTN().solve(w, None, informed(fmt, self.checkpoint, merged)).quantized.decode()

    def layers(self, weights: str, inputs: str) -> dict[str, Layer]:
        """How every linear layer is quantized."""
        asked = parse_format(FORMATS[inputs]) if inputs else None
        layer = Layer(parse_format(FORMATS[weights]), asked)
        found: dict[str, Layer] = {}
        readers = {m.reads: m for m in self.linears}
        for reads, m in readers.items() if layer.unmeasured else ():
            plan = LayerPlan(m, layer.format, None, asked, "source", None, 0, 0)
            found[reads] = with_static(plan, self.inputs[reads])
        return {m.name: found.get(m.reads, layer) for m in self.linears}

    def divergence(self, matrices: Mapping[str, Tensor], layers: Mapping[str, Layer]) -> float:
        """Mean KL divergence from the unquantized model, nats per token."""
        logits, scores = self.logits(Rounded(self.checkpoint, matrices, layers)), Scores()
        for s in range(len(self.tokens)):
            scores.add(logits(s), self.tokens[s, self.first + 1 :], self.baseline(s))
        return scores.summary()["kld_mean"]


def study(work: Path, text: Path, chunks: int, device: str) -> dict[str, Any]:
    """Measures whatever is not in `work`/study.json yet.

    Returns:
        What that file holds: divergences by `Run.key`, by variant what `tensors.measure` finds, and "conditions".

    Raises:
        SystemExit: the file was begun under other conditions.
    """
    kept = work / "study.json"
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    name = torch.cuda.get_device_name() if device == "cuda" else device
    conditions = {"chunks": chunks, "device": name, "torch": torch.__version__}
    for variant, outliers in VARIANTS.items():
        missing = [run for run in runs() if run.key(variant) not in found]
        if variant in found and not missing:
            continue
        begun = found.setdefault("conditions", {}).setdefault(variant, conditions)
        if begun != conditions:
            raise SystemExit(f"{kept} was begun with {begun}, now there is {conditions}; remove it")
        off_grid = models.off_grid(models.checkpoint(work / "demo"), work / f"off-grid-{variant}", outliers=outliers)
        bench = Bench(off_grid, text, chunks, torch.device(device), work)
        for key, value in measured(bench, variant, missing, variant not in found):
            print(key, value if isinstance(value, float) else "", flush=True)
            found[key] = value
            with new_file(kept) as partial:
                partial.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return found


def measured(bench: Bench, variant: str, missing: list[Run], tensors_too: bool) -> Iterator[tuple[str, Any]]:
    """(key, value) of what is missing of a variant."""
    if tensors_too:
        yield variant, tensors.measure(bench.checkpoint, bench.tokens[:SAMPLE], bench.device, tensor_formats(), PAIRS)
    of: tuple[str, str] | None = None
    matrices: dict[str, Tensor] = {}
    for run in missing:
        if (run.weights, run.method) != of:
            of = run.weights, run.method
            matrices = bench.matrices(*of)
        yield run.key(variant), bench.divergence(matrices, bench.layers(run.weights, run.inputs))
