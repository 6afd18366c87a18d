"""Every operation on an input is made up for by the weight, whatever it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool import registry
from qtool.errors import CheckpointError
from qtool.ops._base import InputOp
from qtool.ops.hadamard import Hadamard
from qtool.ops.kronecker import Kronecker
from qtool.ops.orthogonal import Orthogonal
from qtool.ops.permutation import Permutation
from qtool.ops.reassembly import Reassembly
from qtool.ops.scale import Scale
from qtool.ops.shift import Shift

HEADS, DIM, REPEAT = 3, 4, 2
C = HEADS * DIM


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


ORDER = torch.tensor([2, 0, 1, 3, 7, 6, 5, 4, 8, 10, 9, 11])
SIGNS = torch.tensor([1, -1, -1, 1, 1, 1, -1, 1, -1, 1, 1, 1], dtype=torch.int8)
OPS: dict[str, InputOp] = {
    "scale": Scale(randn(C).exp()),
    "permutation": Permutation(ORDER),
    "hadamard": Hadamard(DIM, SIGNS),
    "orthogonal": Orthogonal(torch.linalg.qr(randn(HEADS, DIM, DIM)).Q),
    "shift": Shift(randn(C)),
    "reassembly": Reassembly(ORDER, ORDER, torch.full((C,), 0.5)),
    "kronecker": Kronecker(randn(HEADS, 2, 2), randn(2, 2)),
}
FIRST = randn(1, C)[0]
"""An input; what becomes of its first numbers is written out below."""
EXPECTED = {
    "scale": FIRST[0] / OPS["scale"].data()[1]["factors"][0],
    "permutation": FIRST[2],
    "hadamard": (FIRST[0] - FIRST[1] - FIRST[2] + FIRST[3]) / 2,
    "orthogonal": sum(FIRST[i] * OPS["orthogonal"].data()[1]["matrices"][0, i, 0] for i in range(DIM)),
    "reassembly": FIRST[2],
    "shift": FIRST[0] - OPS["shift"].data()[1]["amounts"][0],
    "kronecker": sum(
        FIRST[2 * i + j] * OPS["kronecker"].data()[1]["left"][0, i, 0] * OPS["kronecker"].data()[1]["right"][j, 0]
        for i in range(2)
        for j in range(2)
    ),
}


def test_all_are_tested() -> None:
    assert sorted(OPS) == registry.names("ops")


@pytest.mark.parametrize("name", OPS)
def test_the_weight_makes_up_for_it(name: str) -> None:
    op, x, w, b = OPS[name], randn(2, 5, C), randn(7, C), randn(7)
    found = op.apply(x) @ op.fold(w).T + b + op.bias(w)
    torch.testing.assert_close(found, x @ w.T + b, rtol=0, atol=1e-12)
    assert not torch.allclose(op.apply(x), x)
    torch.testing.assert_close(op.apply(FIRST)[0], torch.as_tensor(EXPECTED[name]), rtol=0, atol=1e-12)
    assert op.adds == bool(op.bias(w).any())


@pytest.mark.parametrize("name", OPS)
def test_rows_that_write_the_input(name: str) -> None:
    op, x, w, b = OPS[name], randn(5, 6), randn(C, 6), randn(C)
    torch.testing.assert_close(x @ op.mix(w.T) + op.apply(b), op.apply(x @ w.T + b), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OPS)
def test_lengths(name: str) -> None:
    op, x = OPS[name], randn(5, C)
    same = torch.allclose(op.apply(x).norm(dim=1), x.norm(dim=1))
    assert op.orthogonal == (same and name != "reassembly")  # ours only sorts, others split and merge
    assert (op.width, op.run) == (C, 1 if name in ("scale", "shift") else DIM)


@pytest.mark.parametrize("name", OPS)
def test_spread_over_heads_that_are_read_several_times(name: str) -> None:
    op, x = OPS[name], randn(5, C)

    def repeated(x: Tensor) -> Tensor:
        return x.view(5, HEADS, DIM).repeat_interleave(REPEAT, 1).reshape(5, -1)

    torch.testing.assert_close(op.spread(REPEAT, DIM).apply(repeated(x)), repeated(op.apply(x)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OPS)
def test_its_data_are_all_there_is(name: str) -> None:
    op = OPS[name]
    plain, tensors = op.data()
    again = type(op).load(plain, {key: tensor.clone() for key, tensor in tensors.items()})
    assert again == op
    assert hash(again) == hash(op)
    first = next(iter(tensors))
    other = tensors[first].flip(0)
    assert type(op).load(plain, tensors | {first: other}) != op
    with pytest.raises(CheckpointError, match=f"an input's {name} is damaged"):
        type(op).load(plain, {})


@pytest.mark.parametrize(
    "make",
    [
        lambda: Scale(torch.tensor([1.0, 0.0])),
        lambda: Scale(torch.tensor([1.0, torch.inf])),
        lambda: Permutation(torch.tensor([0, 2])),
        lambda: Permutation(torch.tensor([1, 1])),
        lambda: Hadamard(3, SIGNS),
        lambda: Hadamard(8, SIGNS),
        lambda: Hadamard(4, SIGNS * 2),
        lambda: Orthogonal(torch.ones(1, 2, 2)),
        lambda: Orthogonal(torch.eye(2)),
        lambda: Orthogonal(torch.eye(2)[None] * 1.01),
        lambda: Shift(torch.tensor([torch.nan])),
        lambda: Reassembly(ORDER, ORDER + 1, torch.ones(C)),
        lambda: Reassembly(ORDER, ORDER.int(), torch.ones(C)),
        lambda: Reassembly(ORDER, ORDER, torch.zeros(C)),
        lambda: Kronecker(torch.ones(3, 2, 1), torch.ones(1, 1)),
        lambda: Kronecker(torch.ones(2, 2), torch.ones(1, 1)),
        lambda: Kronecker(torch.full((1, 1, 1), torch.nan), torch.ones(1, 1)),
    ],
)
def test_nonsense_is_refused(make) -> None:
    with pytest.raises(ValueError, match=r"are|has|is known"):
        make()


def test_channels_are_split_exactly_and_pairs_merged_as_far_as_they_are_alike() -> None:
    """Channel 0 in three parts, in place of 1 and 3; 1 is merged into 2 and 3 into 4."""
    op = Reassembly(
        torch.tensor([0, 0, 2, 0, 4]), torch.tensor([0, 0, 1, 0, 3]), torch.tensor([1 / 6, 1 / 6, 0.5, 1 / 6, 0.5])
    )
    x, w = randn(7, 5), randn(3, 5)
    found = op.apply(x) @ op.fold(w).T
    pairs = ((2, 1), (4, 3))
    lost = sum(torch.outer(x[:, a] - x[:, b], w[:, a] - w[:, b]) / 2 for a, b in pairs)
    torch.testing.assert_close(found + lost, x @ w.T, rtol=0, atol=1e-6)
    torch.testing.assert_close(op.apply(x)[:, [0, 1, 3]], (x[:, :1] / 3).expand(7, 3), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("m", "a", "b"), [(1, 3, 4), (3, 2, 5), (4, 6, 1)])
def test_kronecker_is_a_block_diagonal_matrix_of_products_and_gradients_go_through(m: int, a: int, b: int) -> None:
    left, right = randn(m, a, a).requires_grad_(), randn(b, b).requires_grad_()
    op, x = Kronecker(left, right), randn(2, 3, m * a * b)
    whole = torch.block_diag(*(torch.kron(one, right) for one in left))
    torch.testing.assert_close(op.apply(x), x @ whole, rtol=0, atol=1e-12)
    torch.testing.assert_close(op.fold(x), x @ torch.linalg.inv(whole).T, rtol=1e-9, atol=1e-9)
    assert torch.autograd.gradcheck(lambda p, q: Kronecker(p, q).apply(x), (left, right))
    assert torch.autograd.gradcheck(lambda p, q: Kronecker(p, q).fold(x), (left, right), atol=1e-4)


def test_a_matrix_without_an_inverse_cannot_be_made_up_for() -> None:
    with pytest.raises(ValueError, match="no inverse"):
        Kronecker(torch.ones(1, 2, 2), torch.ones(1, 1)).fold(torch.ones(1, 2))
