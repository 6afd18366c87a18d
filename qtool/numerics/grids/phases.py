"""Real matrices as two complex ones whose entries are sums of 1, i, -1 and -i, each with a scale: Fairy2i.

A real matrix [[A, B], [C, D]] maps x = (p, q) as the complex numbers z = p + iq go to U z + V conj(z), with

    2 U = (A + D) + i (C - B)        2 V = (A - D) + i (B + C)

(Fairy2i, https://arxiv.org/abs/2512.02901). Every entry of U and of V is a sum of T terms, each the nearest of 1, i, -1
and -i to what the terms before leave, times one scale for the real and one for the imaginary axis.

Shape letters: N rows and K columns of the real matrix, T terms, n = N / 2, k = K / 2.
A code holds two bits a term, the first term lowest: 0, 1, 2, 3 for 1, i, -1, -i. A table has the sums of signs, -1, 0
or 1 of each term and axis, the first term counting least.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MOST = 3
"""Terms that are looked for."""
TURNS = 4
"""Of scales by least squares and codes for them, when a matrix is looked at that may be on such a grid."""
RIDGE = 1e-12
"""Of least squares, relative to the number of entries; a term that never goes along an axis has scale 0 there."""
PROOFS = 16
"""Entries that have to be what others with the same signs are, before that is no chance."""
ROUNDED = 4
"""Spacings of the largest entry within which numbers are taken for one that was rounded differently."""
AXES = ((1, 0), (0, 1), (-1, 0), (0, -1))
"""Real and imaginary parts of the four units."""


def split(w: Tensor) -> tuple[Tensor, Tensor]:
    """U and V of [N, K]: [2, n, k] each, real parts first."""
    n, k = w.shape[0] // 2, w.shape[1] // 2
    a, b, c, d = w[:n, :k], w[:n, k:], w[n:, :k], w[n:, k:]
    return torch.stack([a + d, c - b]) / 2, torch.stack([a - d, b + c]) / 2


def term(z: Tensor) -> Tensor:
    """The nearest unit to each complex number, int64 [...] of [2, ...].

    1 is nearest from -45 degrees to below 45, the others alike, as in the paper's program; for 0 it is 1.
    """
    re, im = z
    real = torch.where(re >= 0, (im >= -re) & (im < re) | (re == 0) & (im == 0), (im > re) & (im <= -re))
    return torch.where(real, torch.where(re >= 0, 0, 2), torch.where(im > 0, 1, 3))


def signs(codes: Tensor, terms: int) -> Tensor:
    """What each term adds on both axes in units of its scale: int64 [2, T, n, k], of -1, 0 and 1."""
    units = torch.stack([codes.long() >> 2 * t & 3 for t in range(terms)])
    return torch.tensor(AXES, device=codes.device)[units].movedim(-1, 0)


def nearest(z: Tensor, terms: int, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes term by term, each the nearest unit to what those before leave.

    Args:
        z: float64 [2, n, k].
        terms: T.
        scales: [2, T]; None: of each term and axis the mean length of what goes along it, as the paper has it.

    Returns:
        (uint8 [n, k], scales).
    """
    codes, used, rest = torch.zeros_like(z[0], dtype=torch.uint8), [], z
    for t in range(terms):
        unit = term(rest)
        if scales is None:
            along = [unit % 2 == axis for axis in (0, 1)]
            means = [(part.abs() * on).sum() / on.sum().clamp_min(1) for part, on in zip(rest, along, strict=True)]
            used.append(torch.stack(means))
        else:
            used.append(scales[:, t])
        codes |= (unit << 2 * t).to(torch.uint8)
        rest = rest - signs(unit, 1)[:, 0] * used[t].view(2, 1, 1)
    return codes, torch.stack(used, dim=1)


def least_squares(z: Tensor, codes: Tensor, terms: int) -> Tensor:
    """The best scales for some codes, float64 [2, T]."""
    found = []
    for part, sign in zip(z, signs(codes, terms), strict=True):
        basis = sign.reshape(terms, -1).double()
        normal = basis @ basis.T
        normal.diagonal().add_(RIDGE * basis.shape[1])
        right = (basis @ part.flatten())[:, None]
        found.append(torch.cholesky_solve(right, torch.linalg.cholesky(normal))[:, 0])
    return torch.stack(found)


def sums(u: Tensor, v: Tensor) -> Tensor:
    """What entries of the blocks A, B, C, D come to, by the signs of all terms: float32 [4, 3^T, 3^T].

    Args:
        u: scales of U, float64 [2, T].
        v: those of V.
    """
    terms = u.shape[1]
    index = torch.arange(3**terms, device=u.device)
    ends = torch.stack([index // 3**t % 3 - 1 for t in range(terms)]).double()
    (re_u, im_u), (re_v, im_v) = (u @ ends)[..., None], (v @ ends)[:, None]
    return torch.stack([re_u + re_v, im_v - im_u, im_u + im_v, re_u - re_v]).float()


def cells(codes: Tensor, terms: int) -> Tensor:
    """Where entries stand in the table of `sums`, int64 [N, K].

    Args:
        codes: of U and of V side by side, uint8 [n, 2 k].
        terms: T.
    """
    weights = 3 ** torch.arange(terms, device=codes.device)
    places = ((signs(codes, terms) + 1) * weights.view(1, -1, 1, 1)).sum(1)
    u, v = places.chunk(2, dim=2)
    re, im = u * 3**terms + v
    block = 9**terms
    return torch.cat([torch.cat([re, im + block], 1), torch.cat([im + 2 * block, re + 3 * block], 1)])


def rounded(w: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """Codes and table of a matrix by the paper's rule.

    Args:
        w: float32 [N, K], both even.
        terms: T.

    Returns:
        (uint8 [n, K], of U and of V side by side; float32 [4, 3^T, 3^T]).
    """
    (u, su), (v, sv) = (nearest(z, terms) for z in split(w.double()))
    return torch.cat([u, v], dim=1), sums(su, sv)


def may_be(w: Tensor, terms: int, spacing: float) -> bool:
    """Whether a matrix has so few values that it may be on such a grid.

    Entries of A and D at one place follow from the real parts of U and V there, those of B and C from the imaginary
    ones: 9^T pairs each, however they were rounded. And each of these parts is a sum of signs times scales, so 3^T
    values, off by what rounding made of the sums that are stored. Counting takes a hundredth of the time of
    `recognized`, and nearly nothing else has so few.

    Args:
        w: float32 [N, K], both even.
        terms: T.
        spacing: of numbers of the type that it is stored in, around 1.
    """
    if any(len(np.unique(pairs)) > 9**terms for pairs in corners(w)):
        return False
    width = ROUNDED * spacing * float(w.abs().max())
    for part in torch.cat(split(w.double())).flatten(1).sort().values.numpy():
        start = 0
        for _ in range(3**terms):
            start = int(part.searchsorted(part[start] + width, "right")) if start < len(part) else start
        if start < len(part):
            return False
    return True


def corners(w: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Entries of A with those of D, and of B with those of C, as one number a pair: complex64 [n k]."""
    n, k = w.shape[0] // 2, w.shape[1] // 2
    a, b, c, d = (part.numpy() for part in (w[:n, :k], w[:n, k:], w[n:, :k], w[n:, k:]))
    return (a + np.complex64(1j) * d).ravel(), (b + np.complex64(1j) * c).ravel()


def recognized(w: Tensor, terms: int) -> tuple[Tensor, Tensor] | None:
    """The same of a matrix that is on such a grid already, exactly, however its sums were rounded; None: it is not.

    Wherever signs agree, entries do: then a table of them says the matrix, whatever arithmetic made it.
    """
    if len(w) % 2 or w.shape[1] % 2 or not bool(w.isfinite().all()):
        return None
    found = []
    for z in split(w.double()):
        codes, scales = nearest(z, terms)
        for _ in range(TURNS):
            scales = least_squares(z, codes, terms)
            codes, _ = nearest(z, terms, scales)
        found.append((codes, scales))
    (u, su), (v, sv) = found
    codes = torch.cat([u, v], dim=1)
    table, cell = sums(su, sv).flatten(), cells(codes, terms)
    table[cell.flatten()] = w.flatten()
    used = torch.zeros_like(table, dtype=torch.bool)
    used[cell.flatten()] = True
    proven = w.numel() - int(used.sum()) >= PROOFS and torch.equal(table[cell], w)
    return (codes, table.view(4, 3**terms, -1)) if proven else None
