"""Runs many batches through the same code in step: all of them wait at a place before any goes on.

That is how a decoder block is quantized in a single pass. When every batch has reached the input of q, k and v, these
three are solved; then the batches go on, through the quantized layers, to the next input. Between two places batches
run side by side, each on one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from greenlet import getcurrent, greenlet

from qtool.numerics.threads.marks import marked
from qtool.numerics.threads.parallel import AHEAD, in_order, lanes
from qtool.numerics.threads.ranks import ALONE, Ranks

Stop = tuple[str, Any]
"""A place, and what a batch hands over there."""

Go = Callable[[], Stop | None]


class Reached(Exception):
    """Leaves a run at the place where it has to wait.

    Args:
        stop: what a suspended run would tell.
    """

    def __init__(self, stop: Stop) -> None:
        super().__init__(stop[0])
        self.stop = stop


class InStep:
    """Batches that go through `run` in step; iterating gives each place once every batch that comes by has reached it.

    Args:
        run: takes one batch through, and calls `wait` at places not `passed` yet; several at a time.
        batches: what to take through, as slices of a common store.
        places: where batches may wait, in the order they come by; a batch may come by some of them only.
        arrive: called with a place, what a batch hands over there, and the batch, in the order of batches, by whoever
            iterates.
        shares: see `numerics.parallel.shares`; 1 thread is that of whoever iterates.
        suspend: waiting batches keep what they have computed. False: they let go of it and start anew, which takes
            less memory, more time, and gives the same results, as long as `run` has no effects before the last place.
        ranks: who takes other batches through, and stops at the same places.
    """

    def __init__(
        self,
        run: Callable[[slice], None],
        batches: Sequence[slice],
        places: Sequence[str],
        arrive: Callable[[str, Any, slice], None],
        shares: tuple[int, int] = (1, 1),
        suspend: bool = True,
        ranks: Ranks = ALONE,
    ) -> None:
        self.run, self.batches, self.arrive, self.shares, self.suspend = run, batches, arrive, shares, suspend
        self.ranks = ranks
        self.order = {place: i for i, place in enumerate(places)}
        self.passed: set[str] = set()

    def wait(self, place: str, seen: object = None) -> None:
        """Called by `run` in front of a place."""
        if not self.suspend:
            raise Reached((place, seen))
        parent = getcurrent().parent
        assert parent is not None
        parent.switch((place, seen))

    def __iter__(self) -> Iterator[str]:
        goes = [self._suspended(batch) if self.suspend else self._repeated(batch) for batch in self.batches]
        used, each = self.shares
        with ExitStack() as stack:
            threads = [stack.enter_context(lane) for lane in lanes(used, each)] if used > 1 else []

            def advance(which: Sequence[int]) -> dict[int, str]:
                """Takes some batches to their next place: where they are; those that are through are left out."""
                pieces = ((threads[i % used], goes[i]) for i in which)
                stops = in_order(pieces, AHEAD * used) if threads else (goes[i]() for i in which)
                at = {}
                # suspended batches keep what they hand over, so it can be counted when no thread needs the processor
                for i, stop in zip(which, list(stops) if self.suspend else stops, strict=True):
                    if stop is not None:
                        at[i], seen = stop
                        self.arrive(at[i], seen, self.batches[i])
                return at

            at, places = advance(range(len(goes))), list(self.order)
            while (place := self._next(at, places)) is not None:
                yield place
                self.passed.add(place)
                here = [i for i in at if at[i] == place]
                at = {i: at[i] for i in at if at[i] != place} | advance(here)

    def _next(self, at: Mapping[int, str], places: Sequence[str]) -> str | None:
        """The first place where a batch waits, in whatever process; None: all are through."""
        mine = min((self.order[place] for place in at.values()), default=len(places))
        first = self.ranks.minimum(mine)
        return places[first] if first < len(places) else None

    def _suspended(self, batch: slice) -> Go:
        """What takes a batch to its next place (None: through) when called, always by the same thread."""
        begun: list[greenlet] = []

        @torch.inference_mode()
        def go() -> Stop | None:
            if not begun:
                begun.append(greenlet(lambda: self.run(batch)))
            with marked("forward passes"):
                stop: Stop | None = begun[0].switch()
            return stop

        return go

    def _repeated(self, batch: slice) -> Go:
        @torch.inference_mode()
        def go() -> Stop | None:
            try:
                with marked("forward passes"):
                    self.run(batch)
            except Reached as reached:
                return reached.stop
            return None

        return go
