"""Where a block's seconds go: torch's profiler over one unit of a run, summed up by the marked parts of the work.

The trace, in the form that chrome://tracing and Perfetto read, names every kernel. What the report keeps is one line
for each part: seconds on the host, over all its threads, and seconds that a CUDA device worked for it. Work that a part
only launched counts for that part, whenever the device came to it.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from qtool.numerics.threads.marks import PREFIX, marked
from qtool.report.model import ProfileEntry
from qtool.store.files import new_file

REST = "the rest"
"""Of the thread that solves units."""
OTHERS = "other threads"
DEVICE_WORK = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
LAUNCHES = frozenset({"cuda_runtime", "cuda_driver"})
"""Categories of a trace's events."""

Event = Mapping[str, Any]


class Profile:
    """Profiles one unit of a run.

    Args:
        file: where the trace goes, replaced.
        device: where units are solved.

    Attributes:
        entries: what parts took, the longest first; empty until a unit was profiled.
    """

    def __init__(self, file: Path, device: torch.device) -> None:
        self.file, self.device = file, device
        self.chosen: str | None = None
        self.entries: tuple[ProfileEntry, ...] = ()

    def choose(self, units: Sequence[str]) -> None:
        """Of units to be solved, by name, takes the second, since the first one compiles; or else the only one."""
        self.chosen = next(iter(units[1:2] or units), None)

    @contextmanager
    def unit(self, name: str) -> Iterator[None]:
        """Profiles what runs inside, on all threads, if it is the unit that was chosen.

        Args:
            name: of the unit.

        Raises:
            StorageError: the trace cannot be written.
        """
        if name != self.chosen:
            yield
            return
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        with torch.profiler.profile(activities=kinds, experimental_config=everywhere) as profiler, marked(REST):
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        with new_file(self.file) as partial:
            profiler.export_chrome_trace(str(partial))
            trace = json.loads(partial.read_bytes())
        self.entries = parts_of(trace["traceEvents"])


def parts_of(events: Iterable[Event]) -> tuple[ProfileEntry, ...]:
    """What each marked part took, the longest first.

    Args:
        events: of a trace; times in microseconds.
    """
    marks, launched, work = defaultdict[Any, list[Event]](list), dict[Any, Event](), list[Event]()
    for event in events:
        kind = event.get("cat")
        if kind == "user_annotation" and event["name"].startswith(PREFIX):
            marks[event["tid"]].append(event)
        elif kind in LAUNCHES:
            launched[event["args"].get("correlation")] = event
        elif kind in DEVICE_WORK:
            work.append(event)
    spans = {tid: Spans(found) for tid, found in marks.items()}
    host, device, calls = defaultdict[str, float](float), defaultdict[str, float](float), defaultdict[str, int](int)
    for span in chain.from_iterable(found.all for found in spans.values()):
        host[span.name] += span.own
        calls[span.name] += 1
    for event in work:
        launch = launched.get(event["args"].get("correlation"))
        here = spans.get(launch["tid"]) if launch else None
        device[(here.at(launch["ts"]) if here and launch else None) or OTHERS] += event["dur"]
    longest = sorted(host.keys() | device.keys(), key=lambda name: (-max(host[name], device[name]), name))
    return tuple(
        ProfileEntry(part=name, calls=calls[name], host_seconds=host[name] / 1e6, device_seconds=device[name] / 1e6)
        for name in longest
    )


@dataclass
class Span:
    """A marked part: from `start` to `stop`, of which `own` outside of parts within; microseconds."""

    name: str
    start: float
    stop: float
    own: float
    outer: Span | None


class Spans:
    """The marked parts of one thread, which lie within or beside each other.

    Args:
        marks: their events.
    """

    def __init__(self, marks: Sequence[Event]) -> None:
        self.all: list[Span] = []
        outer: Span | None = None
        for event in sorted(marks, key=lambda e: (e["ts"], -e["dur"])):
            while outer and event["ts"] >= outer.stop:
                outer = outer.outer
            name = event["name"].removeprefix(PREFIX)
            span = Span(name, event["ts"], event["ts"] + event["dur"], event["dur"], outer)
            if outer:
                outer.own -= event["dur"]
            self.all.append(span)
            outer = span
        self.starts = [span.start for span in self.all]

    def at(self, time: float) -> str | None:
        """The innermost part at a time."""
        i = bisect_right(self.starts, time) - 1
        span: Span | None = self.all[i] if i >= 0 else None
        while span and time >= span.stop:
            span = span.outer
        return span.name if span else None
