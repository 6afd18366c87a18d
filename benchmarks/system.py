"""The systems of the field as recipes, and what each is worth on the demo model: what docs/systems.md shows.

A system is one file of `benchmarks/systems/`: what it is called and where it is described, the recipe of it that ships,
what its paper promises, and what it is compared with. What came out is kept by `benchmarks/cells.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from benchmarks.cells import Cell, Measured, Variant, Way, known

FOLDER = Path(__file__).with_name("systems")


class System(Way):
    """A system of the field.

    Attributes:
        title: what it is called.
        paper: URL.
        what: what it is made of here, one sentence.
        against: the plain way to the same formats.
        model: what it is measured on.
        claim: what the paper says comes of it, in our words.
        ratio: seen if the divergence is below this share of the other's.
        note: what else has to be said of the outcome.
    """

    title: str
    paper: str
    what: str
    against: Way
    model: Variant = "off-grid"
    claim: str
    ratio: float = 1.0
    note: str = ""

    @property
    def cells(self) -> tuple[Cell, Cell]:
        """What is measured: the system, and what it is compared with."""
        return Cell(Way(recipe=self.recipe, set=self.set), self.model), Cell(self.against, self.model)

    def seen(self, found: Measured, against: Measured) -> str:
        """Whether the paper's direction is seen here."""
        share = found.kld / max(against.kld, 1e-9)
        return f"{'yes' if share < self.ratio else 'no'} ({share:.2f})"


def systems() -> dict[str, System]:
    """All of them by name, in the order of their titles."""
    found = {path.stem: read(path) for path in FOLDER.glob("*.yaml")}
    return dict(sorted(found.items(), key=lambda item: item[1].title.lower()))


def cells(names: Sequence[str] = ()) -> list[Cell]:
    """All cells of systems; of all systems if none is named."""
    return [cell for name, one in systems().items() if not names or name in names for cell in one.cells]


def read(path: Path) -> System:
    """One file. Raises ValueError: it does not say what a system has to say."""
    return System.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


HEADER = ("system", "recipe", "carrier", "MB", "KL divergence", "against", "what it is, what its paper says", "seen")


def rows() -> Iterator[tuple[str, ...]]:
    """What the table of docs/systems.md says."""
    cells = known()
    for system in systems().values():
        yield row(system, cells)


def row(system: System, cells: Mapping[str, Measured]) -> tuple[str, ...]:
    """The row of one system, of what is known."""
    found, rival = (cells.get(one.key) for one in system.cells)
    name, way = f"[{system.title}]({system.paper})", str(system.cells[0].way)
    what = f"{system.what} {system.claim}" + (f" {system.note}" if system.note else "")
    if found is None:
        return name, way, "", "", "", "", what, "not measured"
    sizes = (found.carrier, f"{found.megabytes:.1f}", f"{found.kld:.4g}")
    if rival is None:
        return name, way, *sizes, f"not measured, {system.against}", what, "not compared"
    against = f"{rival.kld:.4g} ({rival.megabytes:.1f} MB), {system.against}"
    return name, way, *sizes, against, what, system.seen(found, rival)
