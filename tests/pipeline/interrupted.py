"""Runs `qtool quantize` over and over and ends it at chosen moments; a program of its own, for test_interruption.py.

It runs the command once itself and then forks one child per run, so that imports and kernels are paid once. A moment is
an operation that changes files below the folder of the output (an audit event: rename, exchange, remove, ...), so the
narrow windows around a rename are met like the wide ones: every rename has a moment before it, and the next operation
is the moment after it.
Prints JSON: {"kinds": [...], "wanted": {file: sha256}, "runs": [{"moments": [i], "codes": [...], "found": {...}}]}.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path

EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "qtool.exchange"}
NAMED = {"os.rename", "qtool.exchange"}
"""What gives a name."""
TIMED = {"report.json", "report.html", "report.md", "SHA256SUMS"}  # these hold times, or hashes of times


def hashes(out):
    """SHA-256 of every artifact file."""
    files = (p for p in sorted(out.rglob("*")) if p.is_file() and p.name not in TIMED)
    return {p.relative_to(out).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def run(arguments, folder, moment=None, number=signal.SIGKILL):
    """Runs the command in a child that gets a signal at a moment: (exit code or -signal, kinds of events seen)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        with os.fdopen(reader) as pipe:
            seen = pipe.read().split()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), seen
    count = 0

    def hook(event, values):
        nonlocal count
        writes = event in EVENTS and (event != "open" or "w" in str(values[1]))
        if writes and str(values[0]).startswith(str(folder)):
            count += 1
            os.write(writer, f"{event}\n".encode())
            if count == moment:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)
    os._exit(command_line(arguments))


def command_line(arguments):
    """Runs the command here: its exit code."""
    sys.argv = ["qtool", *arguments]
    try:
        main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def until_done(arguments, folder, out, moments, number):
    """Ends runs at each of the moments in turn, then lets one finish."""
    codes = []
    for moment in moments:
        before = out.exists()
        code, _ = run(arguments, folder, moment, number)
        codes.append(code)
        if out.exists() and not before:
            assert (out / "report.json").exists(), "a final name appeared before its content was whole"
        if before:
            assert recoverable(out), "an older result is lost"
        if (out / "report.json").exists() and not before and not out.with_name(f"{out.name}.work").exists():
            break
    else:
        codes.append(run(arguments, folder)[0])
    return {"moments": moments, "codes": codes, "found": hashes(out), "left": sorted(os.listdir(folder))}


def recoverable(out):
    """Whether a whole result stands under its name, or where the next run finds it."""
    return (out / "SHA256SUMS").exists() or (out.with_name(f".{out.name}.superseded.partial") / "SHA256SUMS").exists()


def named_moments(kinds):
    """Before and after each event that gives a name, and before the very last one."""
    here = [i for i, kind in enumerate(kinds, 1) if kind in NAMED]
    return sorted({*here, *(i + 1 for i in here if i < len(kinds)), len(kinds)})


def experiments(arguments, folder, out, part, parts, turn=None):
    """Undisturbed; then a run killed at each named moment, of which this process takes every `parts`th.

    A result of this process stands there already. Every third run finds an older result to replace; every fifth is
    ended by SIGTERM, which lets it tidy up. With a turn, every moment is taken, and those are others in each turn.
    """
    first = hashes(out)
    shutil.rmtree(out)
    code, kinds = run(arguments, folder)
    assert code == 0, code
    wanted = hashes(out)
    assert wanted == first, "undisturbed runs differ"
    older = out.with_name("older")
    out.rename(older)
    runs = []
    moments = named_moments(kinds) if turn is None else range(1, len(kinds) + 1)
    for i, moment in enumerate(moments, turn or 0):
        if i % parts != part:
            continue
        replaces = i % 3 == 0
        if replaces:
            shutil.copytree(older, out)
        command = [*arguments, "--overwrite"] if replaces else arguments
        number = signal.SIGTERM if i % 5 == 4 else signal.SIGKILL
        runs.append(until_done(command, folder, out, [moment], number))
        shutil.rmtree(out)
    shutil.rmtree(older)
    return {"kinds": kinds, "wanted": wanted, "runs": runs}


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    from qtool.cli.app import main
    from qtool.pipeline import publish

    model, recipe, place, part, parts, *turn = sys.argv[1:]
    target = Path(place) / "out"
    command = ["quantize", model, "--recipe", recipe, "-o", str(target), "--quiet"]
    stdout = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if not turn:  # other programs run artifacts between two moments; that is half of the time
        publish.run_apart = lambda *_: None
    assert command_line(command) == 0
    result = experiments(command, place, target, int(part), int(parts), *map(int, turn))
    os.write(stdout, json.dumps(result).encode())
