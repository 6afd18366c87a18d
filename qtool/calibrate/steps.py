"""Runs many batches through the same code in step: all of them wait at a place before any goes on.

That is how a decoder block is quantized in a single pass. When every batch has reached the input of q, k and v, these
three are solved; then the batches go on, through the quantized layers, to the next input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from greenlet import getcurrent, greenlet


class Reached(Exception):
    """Leaves a run at the place where it has to wait."""


class InStep:
    """Batches that go through `run` in step; iterating gives each place once every batch that comes by has reached it.

    Args:
        run: takes one batch through, and calls `wait` at places not `passed` yet.
        batches: what to take through, as slices of a common store.
        places: where batches may wait, in the order they come by; a batch may come by some of them only.
        suspend: waiting batches keep what they have computed. False: they let go of it and start anew, which takes
            less memory, more time, and gives the same results, as long as `run` has no effects before the last place.
    """

    def __init__(
        self, run: Callable[[slice], None], batches: Sequence[slice], places: Sequence[str], suspend: bool = True
    ) -> None:
        self.run, self.batches, self.suspend = run, batches, suspend
        self.order = {place: i for i, place in enumerate(places)}
        self.passed: set[str] = set()

    def wait(self, place: str) -> None:
        """Called by `run` in front of a place."""
        if not self.suspend:
            raise Reached(place)
        parent = getcurrent().parent
        assert parent is not None
        parent.switch(place)

    def __iter__(self) -> Iterator[str]:
        resume = [self._suspended(batch) if self.suspend else self._repeated(batch) for batch in self.batches]
        at = [go() for go in resume]
        while waiting := [place for place in at if place is not None]:
            place = min(waiting, key=self.order.__getitem__)
            yield place
            self.passed.add(place)
            at = [go() if here == place else here for go, here in zip(resume, at, strict=True)]

    def _suspended(self, batch: slice) -> Callable[[], str | None]:
        """What takes a batch to the next place (None: through) when called."""
        go: Callable[[], str | None] = greenlet(lambda: self.run(batch)).switch
        return go

    def _repeated(self, batch: slice) -> Callable[[], str | None]:
        def go() -> str | None:
            try:
                self.run(batch)
            except Reached as reached:
                return str(reached)
            return None

        return go
