"""Hadamard matrices, and products with them in about n log n steps.

A Hadamard matrix of order n has entries 1 and -1 and orthogonal rows. Those here are Kronecker products of a core, by
one of Paley's constructions or [1], and as many [[1, 1], [1, -1]] as it takes: of order 2, 4, 8, 12, 576 = 36 x 16, ...
Source: R. E. A. C. Paley, On orthogonal matrices, 1933; https://en.wikipedia.org/wiki/Paley_construction

Shape letters: n order, C channels.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

STEP = 64
"""Order of the powers of two that are multiplied with as a dense matrix, which is faster than halving them further."""


def known_order(n: int) -> bool:
    """True if `transform` knows a Hadamard matrix of this order."""
    return n > 0 and _core_order(n) is not None


def transform(x: Tensor, n: int) -> Tensor:
    """Multiplies runs of n numbers with a Hadamard matrix divided by sqrt(n), which is orthogonal.

    Args:
        x: float [..., C], C a multiple of n.
        n: an order that is known.

    Returns:
        The same shape and type: each run is a row vector times the matrix.
    """
    core = _core_order(n)
    assert core is not None
    result: Tensor = x.reshape(-1, n)
    after = n
    for order in _factors(core, n):
        after //= order
        h = matrix(order).to(x.device, x.dtype)
        result = torch.matmul(h.T, result.reshape(-1, order, after)).reshape(-1, n)
    return result.div_(n**0.5).reshape(x.shape)


def _factors(core: int, n: int) -> list[int]:
    """Orders whose Kronecker product is the matrix of order n."""
    factors, rest = [core] * (core > 1), n // core
    while rest > 1:
        factors.append(min(rest, STEP))
        rest //= factors[-1]
    return factors


@cache
def matrix(n: int) -> Tensor:
    """A Hadamard matrix: float64 [n, n] of 1 and -1. That of a power of two is Sylvester's."""
    core = _core_order(n)
    assert core is not None
    result = _paley(core) if core > 1 else torch.ones(1, 1, dtype=torch.float64)
    while len(result) < n:
        result = torch.kron(result, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return result


@cache
def _core_order(n: int) -> int | None:
    """The least order with a construction of its own that is n, or n over a power of two; None if there is none."""
    even = n & -n
    orders = [n // even << k for k in range(even.bit_length())]
    return next((m for m in orders if m == 1 or _paley_prime(m) is not None), None)


def _paley_prime(n: int) -> int | None:
    """The prime by which one of Paley's constructions gives order n."""
    for q, rest in ((n - 1, 3), (n // 2 - 1, 1)):
        if n % 4 == 0 and q % 4 == rest and q > 2 and all(q % d for d in range(2, int(q**0.5) + 1)):
            return q
    return None


def _paley(n: int) -> Tensor:
    """Paley's matrix of order q + 1, q = 3 mod 4, or 2 (q + 1), q = 1 mod 4: float64 [n, n]."""
    q = _paley_prime(n)
    assert q is not None
    squares = torch.full((q,), -1.0, dtype=torch.float64)
    squares[torch.arange(1, q) ** 2 % q] = 1.0
    squares[0] = 0.0
    apart = (torch.arange(q)[:, None] - torch.arange(q)) % q
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:], conference[1:, 0] = 1.0, -1.0 if q % 4 == 3 else 1.0
    conference[1:, 1:] = squares[apart]
    one = torch.eye(q + 1, dtype=torch.float64)
    if n == q + 1:
        return conference + one
    first, second = (torch.tensor(m, dtype=torch.float64) for m in ([[1, 1], [1, -1]], [[1, -1], [-1, -1]]))
    return torch.kron(conference, first) + torch.kron(one, second)
