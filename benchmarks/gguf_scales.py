"""Asks llama.cpp which matrix scales it reads of each architecture, and writes qtool/checkpoint/families/_scales.py.

NVFP4 keeps one number of a matrix in a tensor of its own. To a tiny model of each kind such tensors are added to one
kind of matrix, with a number that is none. Either llama.cpp says that there are too many tensors, or it loads them; and
if it multiplies with them, logits are no numbers either.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gguf_biases import content, logits, save, tiny_models
from qtool.checkpoint.families._gguf import kind_of
from qtool.checkpoint.gguf_checkpoint import scale_name
from qtool.store.gguf_writer import Value

TARGET = Path(__file__).parents[1] / "qtool/checkpoint/families/_scales.py"
HEADER = '''"""Matrices that llama.cpp multiplies with a scale of their own, as it told `benchmarks/gguf_scales.py`."""

from __future__ import annotations

from collections.abc import Mapping

SCALED: Mapping[str, str] = {
'''
FOOTER = '''}
"""Architecture -> what GGUF calls the tensors whose scale it applies, below their block."""
'''


def applied(metadata: dict[str, Value], tensors: dict[str, Tensor], kind: str, folder: Path) -> bool:
    """Whether llama.cpp multiplies one kind of matrix with scales that are tensors of their own."""
    scales = {
        scale_name(name): torch.full((len(x) if x.ndim == 3 else 1,), torch.nan)
        for name, x in tensors.items()
        if name.endswith(".weight") and kind_of(name) == kind
    }
    save(path := folder / "probe.gguf", metadata, tensors | scales)
    found = logits(path)
    return found is not None and not bool(torch.isfinite(found).all())


def table(found: dict[str, set[str]]) -> str:
    """Lines of a mapping."""
    lines = []
    for arch, names in sorted(found.items()):
        parts = textwrap.wrap(" ".join(sorted(names)), 90)
        joined = " ".join(f'"{part} "' for part in parts[:-1]) + f' "{parts[-1]}"'
        lines.append(f'    "{arch}": ({joined.strip()}),\n')
    return "".join(lines)


def main() -> None:
    """Asks about every kind, which takes some minutes."""
    found: dict[str, set[str]] = {}
    for _, model, folder in tiny_models():
        arch, metadata, tensors = content(model, folder)
        matrices = {kind_of(there) for there, x in tensors.items() if there.endswith(".weight") and x.ndim > 1}
        here = {kind for kind in sorted(matrices) if applied(metadata, tensors, kind, folder)}
        found.setdefault(arch, set()).update(here)
        print(arch, *sorted(here), "and not", *sorted(matrices - here), flush=True)
    TARGET.write_text(HEADER + table(found) + FOOTER, encoding="utf-8")


if __name__ == "__main__":
    main()
