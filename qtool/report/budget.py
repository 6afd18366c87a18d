"""What a report says about how a budget was divided."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qtool.report.units import size

if TYPE_CHECKING:
    from qtool.report.model import AllocationEntry


def budget_lines(entry: AllocationEntry) -> list[str]:
    """In sentences without full stops: what was asked and what came of it, and how it compares.

    Args:
        entry: of the report.
    """
    room = "" if entry.limit is None else f" of {entry.limit:,} allowed"
    first = f"budget {entry.wanted}: {entry.nbytes:,} bytes{room}, held-out KL divergence {spelled(entry)}"
    last = f"{entry.tried} plans measured, tried rounded, on {entry.held_out} samples"
    limits = [f"{name}: {found:.4g}, at most {most:g}" for name, (found, most) in entry.beside.items()]
    last += "; two of them carried out, and compared" if entry.carried_out else ""
    return [first, *limits, compared(entry), last]


def spelled(entry: AllocationEntry) -> str:
    """Divergence with its standard error."""
    return f"{entry.kld:.4g} ± {entry.kld_error:.2g}"


def compared(entry: AllocationEntry) -> str:
    """Whether allocating won, and by how much."""
    if entry.uniform is None or entry.uniform_kld is None or entry.uniform_nbytes is None:
        return "no uniform plan is as small"
    other = f"{entry.uniform} ({size(entry.uniform_nbytes)})"
    if entry.fell_back:
        return f"fell back to {other}, which diverges least of what was measured"
    if not entry.uniform_kld:
        return f"as good as {other}"
    ratio = entry.kld / entry.uniform_kld
    return f"{ratio:.2f} of the divergence of {other}, the best uniform plan that fits: {entry.uniform_kld:.4g}"
