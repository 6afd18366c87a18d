"""Keeps what benchmarks of budgets measured in a file, and makes the tables of docs/budgets.md of that."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import budgets, scores

KEPT = Path(__file__).with_name("divided.json")
SIBLINGS = ("mix", "bytes", "text", "the mix", "its `-fit` sibling", "ratio")
WAYS = ("way", "KL divergence", "plans measured")


def known() -> dict[str, Any]:
    """Everything that is kept."""
    found: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    return {"siblings": {}, "ways": []} | found


def keep_row(row: budgets.Row) -> None:
    """Adds a mix on a text, or replaces what was measured of it before."""
    found = known()
    klds = [round(row.mix_kld, 4), round(row.fit_kld, 4)]
    found["siblings"].setdefault(row.mix, {"bytes": row.mix_bytes})["bytes"] = row.mix_bytes
    found["siblings"][row.mix][row.text] = klds
    write(found)


def keep_ways(lines: Sequence[scores.Line]) -> None:
    """Replaces the table of ways."""
    ways = [[x.way, round(x.kld, 4), round(x.error, 4), x.measured] for x in lines]
    write(known() | {"ways": ways})


def write(found: dict[str, Any]) -> None:
    """Replaces the file."""
    KEPT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def sibling_rows() -> Iterator[tuple[str, ...]]:
    """Lines of the table of mixes."""
    found = known()["siblings"]
    for mix in budgets.MIXES:
        for text in (key for key in found.get(mix, {}) if key != "bytes"):
            own, fit = found[mix][text]
            name = f"`gguf-{mix}`", f"{found[mix]['bytes']:,}", text
            yield *name, f"{own:.4f}", f"{fit:.4f}", f"{fit / own:.2f}"


def way_rows() -> Iterator[tuple[str, ...]]:
    """Lines of the table of ways."""
    for way, kld, error, plans in known()["ways"]:
        yield way, f"{kld:.4f} ± {error:.4f}", str(plans)
