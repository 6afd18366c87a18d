"""Damages tiny valid files and reads them: `python -m tests.fuzz.fuzz --count 100000 --seed 1`.

Whatever is in a file, reading it gives a model or one of qtool's own errors, within seconds and within bounds of
memory. Cases are read in a child, so that one that ends the process is counted like any other; each case follows from
its number and the seed alone, so `--first N --count 1` repeats one, and `--processes` share them.
With `--seconds` the rest is left when that time is over. Prints JSON: how many cases were read, the number of the one
that follows, what failed, and how often what came; exits with 1 if something failed.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path

from qtool.calibrate.store import read_stats
from qtool.calibrate.tokenizer import load_tokenizer, token_ids
from qtool.checkpoint._base import Checkpoint, QuantizedCheckpoint
from qtool.errors import PlanError, QtoolError
from qtool.models import open_model, open_model_free
from qtool.pipeline import inspect, measured
from qtool.pipeline.importance import read_importance
from qtool.report.render import html, markdown, read_report
from qtool.store.manifest import Manifest
from qtool.store.neutral import NeutralCheckpoint, NeutralWriter
from tests.fuzz.mutate import damaged
from tests.fuzz.samples import write_samples

SECONDS = 20
"""Longest that reading one damaged sample may take; they take milliseconds."""
MEMORY = 1 << 30
"""Bytes of addresses that it may ask for beyond what the process has before."""
TOKENIZER = 0.05
"""Share of models with a damaged tokenizer that load it, which takes a thousand times as long as anything else."""
BY_NAMES = 0.2
"""Share of models that are known by names and shapes of tensors only."""
CHUNK = 250
"""Cases that a child reads before another one is forked."""
ROOM = Path("/dev/shm")
"""Where files are made if it is there: in memory."""


class TooSlow(BaseException):
    """A case took longer than `SECONDS`."""


def read_model(rng: random.Random, place: Path, plain: Checkpoint, victim: str) -> None:
    """Opens a model and reads some of it as everything else does."""
    if rng.random() < 0.05:
        inspect.run(str(place))
    model = (open_model_free if rng.random() < BY_NAMES else open_model)(str(place))
    model.fingerprint()
    names = model.names()
    for name in rng.sample(names, min(3, len(names))):
        model.tensor(name)
        rows = model.info(name).shape[0]
        model.rows(name, rng.randrange(rows), rows)
    if isinstance(model, QuantizedCheckpoint) and model.layers:
        for module in rng.sample(sorted(model.layers), min(2, len(model.layers))):
            model.matrix(module).decode()
    if rng.random() < TOKENIZER and ("token" in victim or victim.endswith(".gguf")):
        token_ids(load_tokenizer(model), "What is written without effort is read without pleasure.")


def read_statistics(rng: random.Random, place: Path, plain: Checkpoint, victim: str) -> None:
    """Statistics of ours or of llama.cpp."""
    for path in sorted(place.iterdir()):
        measured.run(str(path))
        if path.suffix in (".gguf", ".dat"):
            read_importance(path, plain)
        else:
            read_stats(path)


def read_work(rng: random.Random, place: Path, plain: Checkpoint, victim: str) -> None:
    """What a run that continues does with a work folder, and what it makes of the finished blocks."""
    manifest, _ = Manifest.salvage(place)
    writer = NeutralWriter(place, manifest.run)
    writer.finished()
    model = NeutralCheckpoint(place, plain)
    for module in model.layers:
        model.matrix(module).decode()


def read_one_report(rng: random.Random, place: Path, plain: Checkpoint, victim: str) -> None:
    """report.json, and what is rendered from it."""
    report = read_report(place / "report.json")
    markdown(report)
    html(report)


Found = tuple[Counter[str], list[tuple[int, str, str]]]
READERS: dict[str, Callable[[random.Random, Path, Checkpoint, str], None]] = {
    "model": read_model,
    "stats": read_statistics,
    "work": read_work,
    "report": read_one_report,
}


def make(rng: random.Random, sample: Path, place: Path) -> str:
    """Writes a sample with one of its files damaged or gone; the name of that file. Others are links to the same."""
    files, weights, folders = content(sample)
    (victim,) = rng.choices(files, weights)
    for folder in folders:
        (place / folder).mkdir()
    for path in files:
        if path != victim:
            os.link(sample / path, place / path)
        elif rng.random() > 0.02:
            (place / path).write_bytes(damaged(rng, path, (sample / path).read_bytes()))
    return victim


@cache
def content(sample: Path) -> tuple[list[str], list[int], list[str]]:
    """Files of a sample, how often each is damaged, and folders, those that hold others first; paths within it."""
    paths = {path.relative_to(sample).as_posix(): path.is_file() for path in sorted(sample.rglob("*"))}
    files = [path for path, is_file in paths.items() if is_file]
    weights = [1 if path.endswith((".md", ".html", ".jinja")) or "token" in path else 20 for path in files]
    return files, weights, [path for path, is_file in paths.items() if not is_file]


def run_case(number: int, seed: int, samples: dict[str, Path], plain: Checkpoint, room: Path) -> tuple[str, str]:
    """(what was damaged, what came of it): "read", the class of an error of qtool's, or a failure."""
    rng = random.Random(f"{seed}-{number}")
    name = rng.choice(sorted(samples))
    place = room / f"case-{number}"
    place.mkdir()
    victim = make(rng, samples[name], place)
    what = f"{name}: {victim}"
    signal.alarm(SECONDS)
    try:
        READERS[name.partition("-")[0]](rng, place, plain, victim)
        return what, "read"
    except QtoolError as error:
        one_line = "\n" not in str(error) or isinstance(error, PlanError)
        return what, type(error).__name__ if one_line else f"failure: more than a line: {str(error)[:150]!r}"
    except BaseException as error:  # noqa: BLE001 (whatever comes is what is looked for)
        last = traceback.extract_tb(error.__traceback__)[-1]
        return what, f"failure: {type(error).__name__}: {str(error)[:150]} at {Path(last.filename).name}:{last.lineno}"
    finally:
        signal.alarm(0)
        shutil.rmtree(place, ignore_errors=True)


def in_child(cases: range, seed: int, samples: dict[str, Path], plain: Checkpoint, room: Path, told: int) -> None:
    """Reads some cases and tells of each on a pipe: a line before, and a line of JSON behind it."""

    def too_slow(*_: object) -> None:
        raise TooSlow

    faulthandler.disable()
    signal.signal(signal.SIGALRM, too_slow)
    addresses = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (addresses + MEMORY, addresses + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for number in cases:
        os.write(told, f"{number}\n".encode())
        os.write(told, json.dumps(run_case(number, seed, samples, plain, room)).encode() + b"\n")


def read_all(cases: range, seed: int, samples: dict[str, Path], room: Path) -> Found:
    """Reads some cases: how often what came, and [number, what was damaged, how it failed] of each failure."""
    outcomes: Counter[str] = Counter()
    failures: list[tuple[int, str, str]] = []
    plain, following = open_model(str(samples["model-plain"])), cases.start
    while following < cases.stop:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            in_child(range(following, cases.stop), seed, samples, plain, room, writer)
            os._exit(0)
        os.close(writer)
        begun = None
        with os.fdopen(reader) as lines:
            for line in lines:
                if line[0] != "[":
                    begun = int(line)
                    continue
                what, how = json.loads(line)
                outcomes[how.partition(":")[0]] += 1
                if how.startswith("failure"):
                    failures.append((int(begun or 0), what, how))
                following, begun = int(begun or 0) + 1, None
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if begun is not None:
            failures.append((begun, "?", f"the process ended: {status}"))
            following = begun + 1
    return outcomes, failures


def until(deadline: float, read: Callable[[range], Found], cases: range) -> Found | None:
    """What `read` finds in some cases; None if it is too late to begin with them."""
    return read(cases) if time.monotonic() < deadline else None


def fuzz(cases: range, seed: int, room: Path, processes: int = 1, seconds: float = float("inf")) -> dict[str, object]:
    """Reads all cases, or those that are begun in time: see the module for what it gives."""
    samples = write_samples(room / "samples")
    begin = time.monotonic()
    read = partial(read_all, seed=seed, samples=samples, room=room)
    chunks = [range(first, min(first + CHUNK, cases.stop)) for first in range(cases.start, cases.stop, CHUNK)]
    outcomes: Counter[str] = Counter()
    failures: list[tuple[int, str, str]] = []
    following = cases.start
    with get_context("fork").Pool(processes) as pool:
        for chunk, found in zip(chunks, pool.imap(partial(until, begin + seconds, read), chunks), strict=True):
            if found is None:
                break
            following = chunk.stop
            outcomes += found[0]
            failures += found[1]
    taken = round(time.monotonic() - begin, 1)
    counts = {"cases": following - cases.start, "following": following, "seconds": taken}
    return {**counts, "outcomes": dict(outcomes), "failures": failures}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=ROOM if ROOM.is_dir() else None) as folder:
        cases = range(asked.first, asked.first + asked.count)
        found = fuzz(cases, asked.seed, Path(folder), asked.processes, asked.seconds)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    sys.exit(bool(found["failures"]))


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)  # forked children have one thread only
    main()
