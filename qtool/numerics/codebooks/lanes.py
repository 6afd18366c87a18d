"""Lanes: `LANES` numbers of float32 that kernels compute with at once, as one value.

A search that branches by what it finds is not vectorized by compilers. Several searches that take the same branches
are, if kernels say so: `a + b`, `a - b` and `a * b` of lanes, and the functions here. LLVM spreads a value over as many
registers as the processor needs. Memory of lanes is an array float32 [.., LANES] in C order, whose rows are counted
through all dimensions.

How types and their operations are told to numba: https://numba.readthedocs.io/en/stable/extending/low-level.html
"""

from __future__ import annotations

import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

LANES = 16
"""A register of 512 bits, two of 256 or four of 128."""
FLAGS = ("contract", "nsz")
"""What may be computed otherwise: products are added without being rounded first, and zeros have no sign."""
VECTOR = ir.VectorType(ir.FloatType(), LANES)
ALIGNMENT = 4


class Lanes(types.Type):  # type: ignore[misc]
    """The type of lanes in kernels."""

    def __init__(self) -> None:
        super().__init__(name=f"Lanes({LANES})")


LANES_TYPE, POINTER, SMALL = Lanes(), types.CPointer(types.float32), types.CPointer(types.int8)


@register_model(Lanes)
class LanesModel(models.PrimitiveModel):  # type: ignore[misc]
    """How LLVM sees them."""

    def __init__(self, manager: Any, kind: Lanes) -> None:
        super().__init__(manager, kind, VECTOR)


@intrinsic
def address(_, array):  # type: ignore[no-untyped-def]
    """Where an array begins; whoever uses it keeps the array, and no access to it is counted or checked."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.make_array(signature.args[0])(context, builder, args[0]).data

    return types.CPointer(array.dtype)(array), generate


def row_of(builder: Any, pointer: Any, row: Any, vector: Any = VECTOR) -> Any:
    """The address of a row of memory."""
    first = builder.mul(row, ir.Constant(row.type, LANES))
    return builder.bitcast(builder.gep(pointer, [first]), vector.as_pointer())


@intrinsic
def load(_, pointer, row):  # type: ignore[no-untyped-def]
    """Lanes of a row of memory."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(row_of(builder, *args), align=ALIGNMENT)

    return LANES_TYPE(POINTER, types.intp), generate


@intrinsic
def load_small(_, pointer, row):  # type: ignore[no-untyped-def]
    """Lanes of a row of an array int8 [.., LANES]."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.IntType(8), LANES)
        return builder.sitofp(builder.load(row_of(builder, args[0], args[1], vector), align=1), VECTOR)

    return LANES_TYPE(SMALL, types.intp), generate


@intrinsic
def store(_, pointer, row, value):  # type: ignore[no-untyped-def]
    """Writes lanes into a row of memory."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], row_of(builder, *args[:2]), align=ALIGNMENT)
        return context.get_dummy_value()

    return types.void(POINTER, types.intp, LANES_TYPE), generate


def spread(builder: Any, x: Any) -> Any:
    """A number in all lanes."""
    none, zeros = ir.Constant(VECTOR, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(builder.insert_element(none, x, ir.Constant(ir.IntType(32), 0)), none, zeros)


@intrinsic
def number(_, pointer, i):  # type: ignore[no-untyped-def]
    """Number i of an array, in all lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return spread(builder, builder.load(builder.gep(args[0], [args[1]])))

    return LANES_TYPE(POINTER, types.intp), generate


@intrinsic
def splat(_, x):  # type: ignore[no-untyped-def]
    """A number in all lanes."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return spread(builder, args[0])

    return LANES_TYPE(types.float32), generate


@intrinsic
def any_less(_, a, b):  # type: ignore[no-untyped-def]
    """Whether a < b in one lane at least."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.bitcast(builder.fcmp_ordered("<", *args), ir.IntType(LANES))
        return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))

    return types.boolean(LANES_TYPE, LANES_TYPE), generate


@intrinsic
def where_less(_, a, b, x, y):  # type: ignore[no-untyped-def]
    """x where a < b, else y."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", *args[:2]), *args[2:])

    return LANES_TYPE(*[LANES_TYPE] * 4), generate


@intrinsic
def least_lane(_, a):  # type: ignore[no-untyped-def]
    """The first lane whose number is least; none of them is NaN."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        least, half = args[0], LANES // 2
        while half:
            mask = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [i ^ half for i in range(LANES)])
            other = builder.shuffle_vector(least, ir.Constant(VECTOR, ir.Undefined), mask)
            least = builder.select(builder.fcmp_ordered("<", least, other), least, other)
            half //= 2
        bits = builder.bitcast(builder.fcmp_ordered("==", args[0], least), ir.IntType(LANES))
        bits = builder.or_(bits, ir.Constant(bits.type, 1 << LANES - 1))  # whatever the numbers are, there is one
        return builder.zext(builder.cttz(bits, ir.Constant(ir.IntType(1), 1)), ir.IntType(64))

    return types.int64(LANES_TYPE), generate


def define(operation: Any, name: str) -> None:
    """Makes an operator of Python work on lanes, by LLVM's instruction of that name."""

    @intrinsic
    def compute(_, a, b):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, name)(*args, flags=FLAGS)

        return LANES_TYPE(LANES_TYPE, LANES_TYPE), generate

    @overload(operation)
    def of_lanes(a, b):  # type: ignore[no-untyped-def]
        both = isinstance(a, Lanes) and isinstance(b, Lanes)
        return (lambda a, b: compute(a, b)) if both else None  # noqa: PLW0108 - numba asks for a function of Python


for operation, name in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
    define(operation, name)
