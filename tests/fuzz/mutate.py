"""Damage to a file: to bytes anywhere, to numbers in headers, to the structure of JSON, wherever that stands."""

from __future__ import annotations

import json
import random
import struct
from typing import Any

NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    31,
    32,
    255,
    256,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**48,
    2**63,
    2**64 - 1,
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, "", [], {}, [[]], [None], {"": None}, 0, -1, 1, 2, 3, 16, 2**31, 2**63, 2**64, 10**400),
    *(0.5, -0.0, 1e-320, 1e308, float("inf"), float("-inf"), float("nan"), "x" * 300, "\0", "../x", "/dev/zero", "a/b"),
    *("bfloat16", "F32", "F16", "BF16", "U8", "I64", "int8", "\ud800", "é\u202e", "re:(", "*", "-1", "1e9"),
    *(["x"] * 70, list(range(70)), {str(i): i for i in range(70)}),
)
HEADER = 4096
"""Bytes at the beginning of a file that are damaged more often than others."""


def damaged(rng: random.Random, name: str, data: bytes) -> bytes:
    """A file's content with one to three things wrong."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if name.endswith(".safetensors") and rng.random() < 0.6:
            data = in_safetensors(rng, data)
        elif name.endswith(".json") and rng.random() < 0.85:
            data = in_json(rng, data)
        else:
            data = rng.choice((flipped, overwritten, counted, counted, cut, doubled, zeroed))(rng, data)
    return data


def place(rng: random.Random, data: bytes) -> int:
    """An offset; in the header half of the time."""
    return rng.randrange(max(1, min(len(data), HEADER) if rng.random() < 0.5 else len(data)))


def flipped(rng: random.Random, data: bytes) -> bytes:
    """Some bits."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8) if data else 0):
        changed[place(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def overwritten(rng: random.Random, data: bytes) -> bytes:
    """Some bytes in a row."""
    at = place(rng, data)
    noise = rng.choice((rng.randbytes(rng.randint(1, 16)), b"\xff" * rng.randint(1, 64), b"\0" * rng.randint(1, 64)))
    return data[:at] + noise + data[at + len(noise) :]


def counted(rng: random.Random, data: bytes) -> bytes:
    """A number of 4 or 8 bytes, at an even place."""
    at = place(rng, data) // 4 * 4
    code, size = rng.choice((("<I", 4), ("<Q", 8)))
    return data[:at] + struct.pack(code, rng.choice(NUMBERS) % 2 ** (8 * size)) + data[at + size :]


def cut(rng: random.Random, data: bytes) -> bytes:
    """The end is missing, or something follows it."""
    return data[: place(rng, data)] if rng.random() < 0.8 else data + rng.randbytes(rng.randint(1, 100))


def doubled(rng: random.Random, data: bytes) -> bytes:
    """A stretch stands there twice."""
    at = place(rng, data)
    return data[: at + rng.randint(1, 64)] + data[at:]


def zeroed(rng: random.Random, data: bytes) -> bytes:
    """A stretch is zeros, or of the largest numbers."""
    at, count = place(rng, data), rng.randint(1, 4096)
    return data[:at] + rng.choice((b"\0", b"\xff", b"\x7f")) * len(data[at : at + count]) + data[at + count :]


def in_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Its header says something else, and is as long as it says."""
    length = int.from_bytes(data[:8], "little")
    header = in_json(rng, data[8 : 8 + length])
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def in_json(rng: random.Random, data: bytes) -> bytes:
    """One value is another, is gone, or has another name."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return flipped(rng, data)
    if rng.random() < 0.01:
        return b"[" * 100_000
    places = list(containers(tree))
    if not places:
        return json.dumps(rng.choice(VALUES)).encode()
    holder = rng.choice(places)
    key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    what = rng.random()
    if what < 0.2:
        del holder[key]
    elif what < 0.3 and isinstance(holder, dict):
        holder[rng.choice(("", "x", "\0", "x" * 300, key + "x", "../" + key))] = holder.pop(key)
    elif what < 0.5 and isinstance(holder[key], int) and not isinstance(holder[key], bool):
        holder[key] = rng.choice((holder[key] + 1, holder[key] - 1, holder[key] * 2, -holder[key], holder[key] * 10**9))
    elif what < 0.6:
        other = rng.choice(places)
        holder[key] = other[rng.choice(list(other) if isinstance(other, dict) else range(len(other)))]
    else:
        holder[key] = rng.choice(VALUES)
    try:
        return json.dumps(tree).encode()
    except (ValueError, RecursionError):  # it holds itself now
        return b"{}"


def containers(tree: Any) -> list[Any]:
    """Everything in a JSON value that holds something."""
    found, waiting = [], [tree]
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict | list) and here:
            found.append(here)
            waiting += list(here.values() if isinstance(here, dict) else here)[:200]
    return found
