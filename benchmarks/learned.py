"""Learned rounding and scales on the demo model off any grid, against GPTQ with the same bytes and the same tokens.

A trial is a recipe in a process of its own, several of them side by side on one device. Its model is evaluated on two
texts, then with scales and norms distilled in each of some ways, so that the blocks are learned only once for all of
them. Every number is written as soon as it is known; what has not come to an end at the deadline is missing.

    python -m benchmarks.learned TRIAL --work DIR ...       one trial, in this process
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from qtool.calibrate.tokens import load_tokens
from qtool.checkpoint._base import Checkpoint, QuantizedCheckpoint
from qtool.models import open_artifact
from qtool.pipeline import evaluate
from qtool.pipeline.prepare import prepare
from qtool.pipeline.quantize import QuantizeOptions, run
from qtool.report.model import Report
from qtool.stages._base import StageTask
from qtool.stages.distill import Distill
from qtool.store.overlay import Overlaid

LENGTH = 512
"""Tokens of a sample."""
WIDE = ("q3_k_m", "q2_k", "q4_k_m")
"""Mixtures of GGUF types, which want the model whose rows are whole super-blocks."""
ROOT = {"power": 0.5}
"""Tokens weighed by the root of squared gradients."""


@dataclass(frozen=True)
class Trial:
    """One recipe.

    Attributes:
        weights: format of all linear layers of the blocks; empty: `recipe` says it.
        method: of the recipe.
        calibration: settings of it.
        distilled: settings of distillation, each on its own behind this recipe.
        recipe: one that ships, without its stages; `weights` and `method` are not asked for.
        wide: on the model whose rows are whole super-blocks.
        finish: stages of the recipe itself.
    """

    weights: str = ""
    method: Any = "gptq"
    calibration: dict[str, Any] = field(default_factory=dict)
    distilled: tuple[dict[str, Any], ...] = ()
    recipe: str = ""
    wide: bool = False
    finish: tuple[Any, ...] = ()

    def content(self, data: str, samples: int) -> dict[str, Any]:
        """The recipe."""
        calibration = {"data": data, "samples": samples, "length": LENGTH, **self.calibration}
        common: dict[str, Any] = {"recipe": 1, "name": "trial", "calibration": calibration}
        if self.recipe:
            return common | {"extends": self.recipe, "export": [{"to": "qtool"}], "finish": []}
        layers = [{"match": "lm_head", "keep": True}, {"match": "*", "weights": self.weights}]
        return common | {"layers": layers, "method": self.method, "export": [{"to": "qtool"}], "finish": [*self.finish]}


def described(name: str) -> str:
    """What a trial is, in the words of a recipe."""
    if name in PEERS:
        return f"AutoRound, int{name.split('-')[1][1:]}-g64, {name.split('-')[2]} steps"
    trial = trials()[name]
    parts = {"recipe": trial.recipe} if trial.recipe else {"weights": trial.weights, "method": trial.method}
    rest = {"calibration": trial.calibration, "finish": [*trial.finish]}
    found = parts | {key: value for key, value in rest.items() if value}
    return yaml.safe_dump(found, default_flow_style=True, sort_keys=False, width=10_000).strip()[1:-1]


def learned(**settings: Any) -> dict[str, Any]:
    """A method."""
    return {"learned": settings}


def trials() -> dict[str, Trial]:
    """All of them by name, what decides most first."""
    last, slow = {"epochs": 8, "rate": 0.002}, ({"epochs": 8, "rate": 0.001}, {"epochs": 8, "rate": 0.0003})
    integers, others = [f"w{bits}a16" for bits in (2, 3)], [*(f"gguf-{mix}" for mix in WIDE), "nvfp4", "mxfp4"]
    names = [*integers, "w4a16", *others]
    best = dict.fromkeys(integers, (last,)) | dict.fromkeys(others, slow)
    best["w4a16"] = ({"epochs": 12, "rate": 0.002}, {"epochs": 12, "rate": 0.003})
    found = {f"{n}-best": Trial(recipe=f"{n}-best", distilled=best[n], wide="gguf" in n) for n in names}
    found |= {f"{n}-base": Trial(recipe=n, wide="gguf" in n) for n in others}
    rates = dict.fromkeys(others, 0.001) | dict.fromkeys(("gguf-q4_k_m", "nvfp4"), 0.0003)
    for name in others:
        few, more = {"epochs": 3, "rate": rates[name]}, {"continued": 3}
        kind = Trial(recipe=f"{name}-best", calibration=more, distilled=(few,), wide="gguf" in name)
        found[f"{name}-continued"] = kind
    plain = {"epochs": 4, "rate": 0.001}
    codes = {"epochs": 8, "rate": 0.001, "rounding": "gumbel"}
    for bits in (2, 3, 4):
        weights, rate = f"int{bits}-g64", 0.002 if bits > 2 else 0.004
        scales = {"scales": True, "scale_rate": rate}
        ways = [plain, {"epochs": 8, "rate": 0.003}] + [{**codes, "rounding_rate": r} for r in (0.01, 0.03)]
        adam = learned(**scales, optimizer="adam", rate=0.01)
        behind = (*ways[:1], *ways[2:4], {**codes, "epochs": 24, "rounding_rate": 0.01})
        soft = {"rounding": "gumbel", "scales": True, "optimizer": "adam"}
        some = {
            "gptq": Trial(weights, distilled=tuple(ways)),
            "gumbel": Trial(weights, learned(**soft, rate=0.05), distilled=behind),
            "scales": Trial(weights, learned(**scales), distilled=behind[:3]),
            "continued": Trial(weights, learned(**scales), {"continued": 3}, distilled=({"epochs": 3, "rate": 0.002},)),
            "gumbel-slow": Trial(weights, learned(**soft, rate=0.02)),
            "gumbel-weighed": Trial(weights, learned(**soft, rate=0.05), {"token_weights": ROOT}),
            "gumbel-long": Trial(weights, learned(**soft, rate=0.03, steps=600), distilled=behind[:1]),
            "gumbel-lion": Trial(weights, learned(**soft | {"optimizer": "lion"}, rate=0.01)),
            "gumbel-plain": Trial(weights, learned(**soft, rate=0.05, loss="plain")),
            "absorb": Trial(weights, finish=("absorb",)),
            "rounding": Trial(weights, learned()),
            "quick": Trial(weights, learned(**scales, steps=100, batch=4), distilled=({"epochs": 1},)),
            "adam": Trial(weights, adam),
            "weighed": Trial(weights, learned(**scales), {"token_weights": ROOT}, distilled=(last,)),
            "fast": Trial(weights, learned(**scales, rate=0.01)),
            "long": Trial(weights, learned(**scales | {"scale_rate": rate / 2}, steps=600), distilled=(last,)),
            "signround": Trial(weights, learned(start={"rtn": {"importance": True}}, scales=True, scale_rate=0.005)),
        }
        found |= {f"w{bits}-{name}": trial for name, trial in some.items()}
    order = [name.partition("-")[2] for name in found if name.startswith("w2-")]
    return dict(sorted(found.items(), key=lambda item: place_of(item[0].partition("-")[2], order)))


def place_of(kind: str, order: list[str]) -> int:
    """Where a kind of trial comes; those that are not in the order come first."""
    return order.index(kind) if kind in order else -1


def distances(model: str | Checkpoint, options: argparse.Namespace, source: Path) -> dict[str, float]:
    """Mean KL divergence from the original model, by text."""
    found = {}
    for text in (options.evaluation, options.topics):
        asked = evaluate.EvaluateOptions(model, str(source), text, chunks=options.chunks, device=options.device)
        kld = evaluate.run(asked).kld_mean
        assert kld is not None
        found[text.stem] = kld
    return found


def losses(report: Report) -> dict[str, Any]:
    """What blocks measured: every loss, and by how much its mean over blocks fell."""
    names = list(dict.fromkeys(name for block in report.blocks for name in block.losses))
    found: dict[str, Any] = {name: [block.losses.get(name) for block in report.blocks] for name in names}
    for what in ("training", "held out"):
        pairs = [(b.losses.get(f"{what} before"), b.losses.get(f"{what} after")) for b in report.blocks]
        shares = [after / before for before, after in pairs if before and after is not None]
        if shares:
            found[f"{what} left"] = sum(shares) / len(shares)
    return found


def attempt(name: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """(what, found) of one trial, as it goes on."""
    trial, work = trials()[name], options.work / "trials" / name
    source = options.work / ("wide" if trial.wide else "off-grid")
    work.mkdir(parents=True, exist_ok=True)
    recipe = work / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(trial.content(options.calibration, options.samples)), encoding="utf-8")
    begun, out = time.monotonic(), work / "out"
    report = run(QuantizeOptions(str(source), str(recipe), out, device=options.device, overwrite=True, verify=False))
    yield "seconds", time.monotonic() - begun
    if options.device == "cuda":
        yield "device_mib", torch.cuda.max_memory_allocated() >> 20
    if report.blocks:
        yield "losses", losses(report)
    yield "kld", distances(str(out), options, source)
    if not trial.distilled:
        return
    job = prepare(str(source), str(recipe), device=options.device)
    tokens, model = load_tokens(job.plan.recipe.calibration, job.original, device=job.device), open_artifact(str(out))
    task = StageTask(job.original, job.checkpoint, model, job.plan, tokens, job.device, job.dtype, lambda *_: None)
    for settings in trial.distilled:
        begun = time.monotonic()
        finished, about = distilled(model, Distill(**settings), task)
        took = time.monotonic() - begun
        found = {"seconds": took, **about, "kld": distances(finished, options, source)}
        yield " ".join(f"{key}={value}" for key, value in settings.items()), found


def distilled(
    model: QuantizedCheckpoint, stage: Distill, task: StageTask
) -> tuple[QuantizedCheckpoint, dict[str, float | str]]:
    """A model behind a stage, and what that measured."""
    found = stage.run(task)
    params = {module: {name: t.cpu() for name, t in own.items()} for module, own in found.params.items()}
    tensors = {name: t.cpu() for name, t in found.tensors.items()}
    return Overlaid(model, params, tensors, "distill"), dict(found.about)


def peer(name: str, options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """(what, found) of AutoRound, name "autoround-w4-200": bits, steps."""
    _, bits, steps = name.split("-")
    source, out = options.work / "off-grid", options.work / "trials" / name
    script, begun = Path(__file__).with_name("peer_autoround.py"), time.monotonic()
    tokens = options.work / "tokens.safetensors"
    command = [options.peer, script, source, tokens, out, bits[1:], steps, options.device]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    yield "seconds", time.monotonic() - begun
    yield "kld", distances(str(out), options, source)


PEERS = ("autoround-w2-200", "autoround-w3-200", "autoround-w4-200")


def all_together(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Runs trials side by side until the deadline; what each found, by name."""
    known = (*PEERS[: len(PEERS) * bool(options.with_peer)], *trials())
    names = [*dict.fromkeys(name for prefix in options.trial or [""] for name in known if name.startswith(prefix))]
    begun, running, files = time.monotonic(), dict[str, subprocess.Popen[bytes]](), options.work / "trials"
    files.mkdir(parents=True, exist_ok=True)
    waiting = iter(names)
    shown = set[str]()
    while time.monotonic() < begun + options.seconds:
        while len(running) < options.processes and (name := next(waiting, None)):
            log = (files / f"{name}.log").open("wb")
            running[name] = subprocess.Popen([*command(name, options)], stdout=log, stderr=log)
        running = {name: process for name, process in running.items() if process.poll() is None}
        for name in names:
            if name not in running and name not in shown and (files / f"{name}.json").exists():
                shown.add(name)
                print(line(name, json.loads((files / f"{name}.json").read_text(encoding="utf-8"))), flush=True)
        if not running and len(shown) == len(names):
            break
        time.sleep(0.5)
    for process in running.values():
        process.kill()
    found = {name: files / f"{name}.json" for name in names}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items() if path.exists()}


def command(name: str, options: argparse.Namespace) -> list[str]:
    """What runs one trial."""
    flags = ("work", "calibration", "evaluation", "topics", "samples", "chunks", "device", "peer")
    values = [text for flag in flags for text in (f"--{flag}", str(getattr(options, flag)))]
    return [sys.executable, "-m", "benchmarks.learned", name, *values]


def line(name: str, found: dict[str, Any]) -> str:
    """What is printed of a trial."""
    parts = [f"{name:18} {found.get('seconds', 0):6.0f} s"]
    for key, value in {"": found, **found}.items():
        if isinstance(value, dict) and "kld" in value:
            parts.append(f"{key} " + " / ".join(f"{kld:.4f}" for kld in value["kld"].values()))
    shares = found.get("losses", {})
    parts += [f"{what} left {shares[f'{what} left']:.3f}" for what in ("training", "held out") if shares]
    return " | ".join(parts)


def main() -> None:
    """Runs one trial, and writes what it finds as it goes on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial")
    for flag in ("work", "evaluation", "topics", "peer"):
        parser.add_argument(f"--{flag}", type=Path, required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--samples", type=int, required=True)
    parser.add_argument("--chunks", type=int, required=True)
    parser.add_argument("--device", required=True)
    options = parser.parse_args()
    path, found = options.work / "trials" / f"{options.trial}.json", dict[str, Any]()
    torch.set_num_threads(min(torch.get_num_threads(), 2))
    for key, value in (peer if options.trial in PEERS else attempt)(options.trial, options):
        found[key] = value
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(found, indent=1), encoding="utf-8")
        partial.replace(path)


if __name__ == "__main__":
    main()
