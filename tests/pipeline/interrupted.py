"""Runs `qtool quantize` over and over and ends it at chosen moments; a program of its own, for test_interruption.py.

It forks one child per run, so that imports are paid once. A moment is an operation that changes files below the folder
of the output (an audit event: rename, remove, ...), so the narrow windows around a rename are met like the wide ones.
Prints JSON: {"events": n, "wanted": {file: sha256}, "runs": [{"moment": i, "codes": [...], "found": {...}}]}.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod"}
TIMED = {"report.json", "report.html", "report.md", "SHA256SUMS"}  # these hold times, or hashes of times


def hashes(out):
    """SHA-256 of every artifact file."""
    files = (p for p in sorted(out.rglob("*")) if p.is_file() and p.name not in TIMED)
    return {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def run(arguments, folder, moment=None, number=signal.SIGKILL):
    """Runs the command in a child that gets a signal at a moment: (exit code or -signal, events seen)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        with os.fdopen(reader) as pipe:
            seen = len(pipe.read())
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), seen
    count = 0

    def hook(event, values):
        nonlocal count
        writes = event in EVENTS and (event != "open" or "w" in str(values[1]))
        if writes and str(values[0]).startswith(str(folder)):
            count += 1
            os.write(writer, b".")
            if count == moment:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)
    sys.argv = ["qtool", *arguments]
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    os._exit(code)


def until_done(arguments, folder, out, moments, number):
    """Ends runs at each of the moments in turn, then lets one finish."""
    codes = []
    for moment in moments:
        before = out.exists()
        code, _ = run(arguments, folder, moment, number)
        codes.append(code)
        if out.exists() and not before:
            assert (out / "report.json").exists(), "a final name appeared before its content was whole"
        if (out / "report.json").exists() and not out.with_name(f"{out.name}.work").exists():
            break
    else:
        codes.append(run(arguments, folder)[0])
    return {"moments": moments, "codes": codes, "found": hashes(out), "left": sorted(os.listdir(folder))}


def experiments(arguments, folder, out, count, seed):
    """Undisturbed, then `count` runs that are killed twice each and one that is interrupted as by Ctrl-C."""
    code, events = run(arguments, folder)
    assert code == 0, code
    wanted = hashes(out)
    rng = random.Random(seed)
    runs = []
    for i in range(count):
        shutil.rmtree(out)
        moments = [rng.randint(2, events // 2), rng.randint(2, events)]
        number = signal.SIGINT if i == count - 1 else signal.SIGKILL
        runs.append(until_done(arguments, folder, out, moments, number))
    return {"events": events, "wanted": wanted, "runs": runs}


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is born deaf to it
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401 (paid once, before the forks, as is the next)
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    import qtool.pipeline.quantize  # noqa: F401
    from qtool.cli.app import main

    model, recipe, place, number, seed = sys.argv[1:]
    target = Path(place) / "out"
    command = ["quantize", model, "--recipe", recipe, "-o", str(target), "--quiet"]
    stdout = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    result = experiments(command, place, target, int(number), int(seed))
    os.write(stdout, json.dumps(result).encode())
