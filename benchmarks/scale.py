"""What several CUDA devices of one host gain: runs of one process and of several, one after the other.

    python -m benchmarks.scale --work /tmp/scale --processes 2                  everything, about ten minutes
    python -m benchmarks.scale --work /tmp/scale --processes 2 --only dense,eval

Models are synthetic, as in `benchmarks.gpu`. Each row names its command; times are those of the whole command, imports
included, and of its stages. Kernels and Python's modules are compiled before, by a command that quantizes one block;
evaluation compiles its own. docs/scale.md says what may differ between runs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu


class Memory:
    """Largest use of each device while the context lasts, MiB, as the driver sees it."""

    def __enter__(self) -> Memory:
        self.peaks: dict[str, int] = defaultdict(int)
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        ask = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits"]
        while not self.over.wait(0.5):
            for line in subprocess.run(ask, capture_output=True, text=True, check=False).stdout.splitlines():
                index, used = line.split(",")
                self.peaks[index] = max(self.peaks[index], int(used))

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()


def launched(processes: int, *arguments: str) -> list[str]:
    """The command for so many processes, started by torchrun."""
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *(several if processes > 1 else []), "-m", "qtool", *arguments]


def environment(work: Path, processes: int) -> dict[str, str]:
    """Cores are shared out as well, those that this process may use; compiled modules stay."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    threads = str(max(1, len(os.sched_getaffinity(0)) // processes))
    return kept | {"OMP_NUM_THREADS": threads, "PYTHONPYCACHEPREFIX": str(work / "compiled")}


def run(work: Path, processes: int, *arguments: str) -> tuple[float, dict[str, int], str]:
    """Runs a command, in several processes that it starts itself: (seconds, MiB by device, its output)."""
    command = [*launched(1, *arguments), *(["--jobs", str(processes)] if processes > 1 else [])]
    print("$", " ".join(command[1:]), flush=True)
    begin, place = time.perf_counter(), environment(work, processes)
    with Memory() as memory:
        found = subprocess.run(command, env=place, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begin
    if found.returncode:
        raise SystemExit(f"exit code {found.returncode}\n{found.stdout}\n{found.stderr[-6000:]}")
    print(f"  {seconds:.1f} s; MiB by device: {dict(memory.peaks)}", flush=True)
    return seconds, dict(memory.peaks), found.stdout


def quantized(name: str, source: Path, recipe: Path, work: Path, processes: int) -> dict[str, Any]:
    """Quantizes with one process and with several, and compares times and results."""
    folders, walls, stages, blocks = {}, {}, {}, {}
    for count in sorted({1, processes}):
        out = folders[count] = work / f"{name}-{count}"
        arguments = ("quantize", str(source), "-r", str(recipe), "-o", str(out), "--overwrite", "--keep", "-q")
        walls[count], *_ = run(work, count, *arguments)
        blocks[count] = steady(work / f"{name}-{count}.work")
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        stages[count] = {s["name"]: round(s["seconds"], 2) for s in report["stages"]}
        print(f"  stages: {stages[count]}", flush=True)
    found = compared(folders[1], folders[processes])
    gains = {n: round(stages[1][n] / s, 2) for n, s in stages[processes].items() if stages[1].get(n, 0) > 1}
    found |= {"wall": walls, "gain": round(walls[1] / walls[processes], 2), "gain by stage": gains, "block": blocks}
    found["gain of a block"] = round(blocks[1] / blocks[processes], 2)
    print(f"{name}: {json.dumps(found)}", flush=True)
    return found


def warm(source: Path, recipe: Path, work: Path) -> None:
    """Has kernels and modules compiled, with a model of one block."""
    out = str(work / "warm")
    run(work, 1, "quantize", str(source), "-r", str(recipe), "-o", out, "--overwrite", "-q", "--no-verify")


def steady(folder: Path) -> float:
    """Seconds of a block behind the first, which compiles kernels: by when files of a kept work folder were written."""
    times = sorted(path.stat().st_mtime for path in folder.glob("block-*.safetensors"))
    shutil.rmtree(folder)
    return round((times[-1] - times[0]) / (len(times) - 1), 3) if len(times) > 1 else math.nan


def compared(one: Path, two: Path) -> dict[str, Any]:
    """How much two results of the same recipe have in common."""
    from qtool.models import open_artifact

    reports = [json.loads((folder / "report.json").read_text(encoding="utf-8")) for folder in (one, two)]
    errors = [[e["output_error_db"] or e["weight_error_db"] for e in r["layers"] if e["format"]] for r in reports]
    tensors = [{f.name: f.read_bytes() for f in folder.glob("*.safetensors")} for folder in (one, two)]
    first, second = open_artifact(one), open_artifact(two)
    modules = [m for m in first.layers if m.startswith("model.layers.0.self_attn.") and m[-6] in "qkv"]
    same = [torch.eq(first.matrix(m).quantized.codes, second.matrix(m).quantized.codes) for m in modules]
    return {
        "same bytes": tensors[0] == tensors[1],
        "same codes behind the first input": round(sum(float(e.float().mean()) for e in same) / max(1, len(same)), 6),
        "mean error, dB": [round(sum(e) / len(e), 4) for e in errors],
        **counted(*reports),
    }


def counted(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """Whether as many tokens came to every layer, and which share of visits to experts was to other ones."""
    pairs = [(a["tokens"], b["tokens"], a["expert"]) for a, b in zip(one["layers"], two["layers"], strict=True)]
    of_experts = [(a, b) for a, b, expert in pairs if expert is not None]
    moved = sum(abs(a - b) for a, b in of_experts) / 2 / max(1, sum(a for a, _ in of_experts))
    return {"same tokens": all(a == b for a, b, expert in pairs if expert is None), "other experts": round(moved, 6)}


def killed(source: Path, recipe: Path, work: Path, processes: int) -> dict[str, Any]:
    """Kills the last process of a run when two blocks are finished, and continues it."""
    out = work / "killed"
    arguments = ("quantize", str(source), "-r", str(recipe), "-o", str(out), "--overwrite")
    with (work / "killed.log").open("w", encoding="utf-8") as log:
        command = launched(processes, *arguments)
        child = subprocess.Popen(command, env=environment(work, processes), stdout=log, stderr=log)
        while not (work / "killed.work" / "block-1.safetensors").exists():
            if child.poll() is not None:
                raise SystemExit((work / "killed.log").read_text(encoding="utf-8"))
            time.sleep(0.05)
        victim = next(pid for pid in descendants(child.pid) if environ(pid).get("RANK") == str(processes - 1))
        begin = time.perf_counter()
        os.kill(victim, signal.SIGKILL)
        code = child.wait()
        seconds = time.perf_counter() - begin
    lines = [line for line in (work / "killed.log").read_text(encoding="utf-8").splitlines() if "error:" in line]
    wall, _, _ = run(work, processes, *arguments, "-v")
    found = {"exit code": code, "seconds until all had ended": round(seconds, 2), "lines": lines, "continued": wall}
    print(f"killed: {json.dumps(found)}", flush=True)
    return found


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those that these did."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
    return [found for child in map(int, children) for found in (child, *descendants(child))]


def environ(pid: int) -> dict[str, str]:
    """The environment that a process was started with."""
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def evaluated(source: Path, artifact: Path, text: Path, work: Path, processes: int) -> dict[str, Any]:
    """Evaluates with one process and with several."""
    shared = ("eval", str(artifact), "--baseline", str(source), "--text", str(text), "--context", "2048")
    walls, results = {}, []
    for count in sorted({1, processes}):
        walls[count], _, told = run(work, count, *shared, "--chunks", "64", "--dtype", "bf16", "--json", "-q")
        results.append(json.loads(told[told.index("{") :]))
    differ = {key: (results[0][key], results[-1][key]) for key in results[0] if results[0][key] != results[-1][key]}
    found = {"wall": walls, "gain": round(walls[1] / walls[processes], 2), "differs": differ}
    print(f"eval: {json.dumps(found)}", flush=True)
    return found


def recipe(method: str, words: Path, work: Path) -> Path:
    """Of INT4 in groups of 128, as it ships."""
    content = gpu.recipe_of("int4-g128", method, words, 256, "[]", "compressed-tensors")
    path = work / f"{method}.yaml"
    path.write_text(content, encoding="utf-8")
    return path


def main() -> None:
    """Measures the rows that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--processes", type=int, default=2, help="how many, a device each")
    parser.add_argument("--only", default="dense,eval,mixture,rtn,killed", help="rows, divided by commas")
    parser.add_argument("--blocks", type=int, default=32, help="of the dense model")
    options = parser.parse_args()
    work, count, rows = options.work, options.processes, options.only.split(",")
    work.mkdir(parents=True, exist_ok=True)
    words = gpu.text(work / "text.txt")
    recipes = {name: recipe(name, words, work) for name in ("gptq", "rtn")}
    found = {}
    dense = gpu.model(work / f"dense-{options.blocks}", options.blocks) if {"dense", "eval", "rtn"} & {*rows} else work
    if {"dense", "rtn"} & {*rows}:
        warm(gpu.model(work / "one-block-dense", 1), recipes["gptq"], work)
    if "dense" in rows:
        found["dense"] = quantized("dense", dense, recipes["gptq"], work, count)
    if "eval" in rows:
        found["eval"] = evaluated(dense, work / f"dense-{count}", words, work, count)
    if "mixture" in rows:
        warm(gpu.mixture(work / "one-block-mixture", 1), recipes["gptq"], work)
        found["mixture"] = quantized("mixture", gpu.mixture(work / "mixture-5", 5), recipes["gptq"], work, count)
    if "rtn" in rows:
        found["rtn"] = quantized("rtn", dense, recipes["rtn"], work, count)
    if "killed" in rows:
        found["killed"] = killed(gpu.model(work / "dense-5", 5), recipes["gptq"], work, count)
    (work / "scale.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
