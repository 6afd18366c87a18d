"""Writes constraints-newest.txt and qtool/tested.py: what the package index has today; run it with `make newest`.

torch, numba and numpy stay at what constraints.txt says: other builds weigh gigabytes, or compile everything anew.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEWEST, TESTED = ROOT / "constraints-newest.txt", ROOT / "qtool" / "tested.py"


def pins(path: Path) -> dict[str, str]:
    """Versions by package, of a file of `package==version` lines."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE))


def found(packages: list[str]) -> dict[str, str]:
    """The newest release of each package on the index."""
    asked = ["install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", "-", *packages]
    said = subprocess.run([sys.executable, "-m", "pip", *asked], check=True, capture_output=True, text=True).stdout
    chosen = {item["metadata"]["name"]: item["metadata"]["version"] for item in json.loads(said)["install"]}
    plain = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in chosen.items()}
    return {name: plain[re.sub(r"[-_.]+", "-", name).lower()] for name in packages}


def main() -> None:
    """Looks the packages of constraints-newest.txt up, and writes both files."""
    newest = found(list(pins(NEWEST)))
    title = NEWEST.read_text(encoding="utf-8").splitlines()[0]
    lines = [title, *(f"{name}=={version}" for name, version in newest.items())]
    NEWEST.write_text("\n".join(lines) + "\n", encoding="utf-8")
    known = pins(ROOT / "constraints.txt") | newest
    source = re.sub(r'"(\w+)": "[^"]+"', lambda line: f'"{line[1]}": "{known[line[1]]}"', TESTED.read_text("utf-8"))
    TESTED.write_text(source, encoding="utf-8")


if __name__ == "__main__":
    main()
