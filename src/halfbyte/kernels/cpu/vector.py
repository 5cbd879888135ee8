"""Sixteen lanes as a numba type: a block's arithmetic is written once, like the contract, and always vectorised.

`Vector` values live in registers only: kernels load them from arrays, combine them with + - * / & | ^ << >> and
comparisons, and store them. Every float operator is one IEEE operation on each lane; nothing is contracted or
reordered. The functions below also take scalars where that has a meaning, so that one rounding serves both. LLVM cuts
a vector to what the machine has: one AVX-512 register, two of AVX, four of SSE or NEON. Loads and stores of packed
data assume little endian.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numba.core.cgutils
import numba.extending
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types

_extending: Any = numba.extending
_cgutils: Any = numba.core.cgutils
LANES = 16
_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_F32 = ir.FloatType()


class Vector(types.Type):
    """Sixteen lanes of one scalar type."""

    def __init__(self, lane: Any, llvm_lane: ir.Type) -> None:
        self.lane = lane
        self.llvm = _vector(llvm_lane)
        super().__init__(name=f"Vector({lane})")


def _vector(lane: ir.Type, lanes: int = LANES) -> ir.Type:
    return ir.VectorType(lane, lanes)


FLOATS = Vector(types.float32, _F32)
INTS = Vector(types.int32, _I32)
MASK = Vector(types.boolean, _I1)


def _model(manager: Any, vector: Vector) -> Any:
    return _extending.models.PrimitiveModel(manager, vector, vector.llvm)


_extending.register_model(Vector)(_model)


def _is_float(t: Any) -> bool:
    return t == FLOATS or isinstance(t, types.Float)


def _common(a: Any, b: Any) -> Any:
    """Type of a binary operation on a and b, of which either may be a scalar; None where they do not mix."""
    if _is_float(a) != _is_float(b):
        return None
    if isinstance(a, Vector) or isinstance(b, Vector):
        return FLOATS if _is_float(a) else INTS
    return types.float32 if _is_float(a) else types.int64


def _convert(context: Any, builder: Any, value: Any, source: Any, target: Any) -> Any:
    """A scalar becomes a scalar of another width, or all lanes of a vector; a vector stays."""
    if source == target:
        return value
    if not isinstance(target, Vector):
        return context.cast(builder, value, source, target)
    value = context.cast(builder, value, source, target.lane)
    one = builder.insert_element(ir.Constant(target.llvm, ir.Undefined), value, _I32(0))
    return builder.shuffle_vector(one, one, _indices([0] * LANES))


def _indices(lanes: list[int]) -> Any:
    return ir.Constant(_vector(_I32, len(lanes)), lanes)


# --- operators ------------------------------------------------------------------------------------------------------


def _define(function: Any, emit: Callable[[Any, Any, Any, Any], Any], takes: str, gives: Vector | None = None) -> None:
    """Give an operator its meaning on two vectors, and on a vector with a scalar, of `takes`: "floats", "ints"."""

    def typer(context: Any) -> Any:
        def result(a: Any, b: Any) -> Any:
            common = _common(a, b)
            if not isinstance(common, Vector) or ("floats" if common == FLOATS else "ints") not in takes:
                return None
            return gives or common

        return result

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        common = _common(*signature.args)
        a, b = (_convert(context, builder, arg, t, common) for arg, t in zip(args, signature.args, strict=True))
        return emit(builder, common == FLOATS, a, b)

    _extending.type_callable(function)(typer)
    for left, right in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        _extending.lower_builtin(function, left, right)(lower)


def _arithmetic(float_op: str, int_op: str) -> Any:
    return lambda builder, floats, a, b: getattr(builder, float_op if floats else int_op)(a, b)


def _comparison(sign: str) -> Any:
    return lambda builder, floats, a, b: (builder.fcmp_ordered if floats else builder.icmp_signed)(sign, a, b)


_define(operator.add, _arithmetic("fadd", "add"), "floats ints")
_define(operator.sub, _arithmetic("fsub", "sub"), "floats ints")
_define(operator.mul, _arithmetic("fmul", "mul"), "floats ints")
_define(operator.truediv, _arithmetic("fdiv", ""), "floats")
_define(operator.and_, _arithmetic("", "and_"), "ints")
_define(operator.or_, _arithmetic("", "or_"), "ints")
_define(operator.xor, _arithmetic("", "xor"), "ints")
_define(operator.lshift, _arithmetic("", "shl"), "ints")
_define(operator.rshift, _arithmetic("", "lshr"), "ints")
_define(operator.lt, _comparison("<"), "floats ints", MASK)
_define(operator.gt, _comparison(">"), "floats ints", MASK)
_define(operator.le, _comparison("<="), "floats ints", MASK)


# --- lane-wise functions, of vectors and of scalars -----------------------------------------------------------------


def _intrinsic(function: Callable[..., Any]) -> Any:
    return _extending.intrinsic(prefer_literal=True)(function)


def _lanewise(x: Any, scalar: Any, vector: Vector, emit: str) -> Any:
    """A function of one argument: scalar of type `scalar` or a vector → the lane type of `vector`, or `vector`."""
    target = vector if isinstance(x, Vector) else vector.lane

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = args[0] if isinstance(x, Vector) else context.cast(builder, args[0], x, scalar)
        return getattr(builder, emit)(value, context.get_value_type(target))

    return target(x), code


@_intrinsic
def bits(context: Any, x: Any) -> Any:
    """float32 → the int32 of the same bits."""
    return _lanewise(x, types.float32, INTS, "bitcast")


@_intrinsic
def from_bits(context: Any, x: Any) -> Any:
    """The low 32 bits of an integer → the float32 of the same bits."""
    return _lanewise(x, types.int32, FLOATS, "bitcast")


@_intrinsic
def to_float(context: Any, x: Any) -> Any:
    """int32 → float32."""
    return _lanewise(x, types.int32, FLOATS, "sitofp")


@_intrinsic
def to_int(context: Any, x: Any) -> Any:
    """float32 → int32, towards zero; the value must fit."""
    return _lanewise(x, types.float32, INTS, "fptosi")


@_intrinsic
def where(context: Any, condition: Any, a: Any, b: Any) -> Any:
    """The lanes of a where condition holds, of b elsewhere."""
    common = _common(a, b)
    if condition == MASK and not isinstance(common, Vector):
        common = FLOATS if _is_float(a) else INTS

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        chosen, other = (_convert(context, builder, v, t, common) for v, t in ((args[1], a), (args[2], b)))
        return builder.select(args[0], chosen, other)

    return common(condition, a, b), code


@_intrinsic
def int_lanes(context: Any, x: Any) -> Any:
    """The same integer in all lanes."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _convert(context, builder, args[0], x, INTS)

    return INTS(x), code


@_intrinsic
def permuted_xor(context: Any, x: Any, distance: Any) -> Any:
    """Lane i of the result is lane i ^ distance of x; distance is a literal."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lanes = [i ^ distance.literal_value for i in range(LANES)]
        return builder.shuffle_vector(args[0], args[0], _indices(lanes))

    return x(x, distance), code


@_intrinsic
def lane_signs(context: Any, pattern: Any) -> Any:
    """Integers with only the sign bit, set in lane i where bit i of the literal pattern is."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(INTS.llvm, [-(2**31) if pattern.literal_value >> i & 1 else 0 for i in range(LANES)])

    return INTS(pattern), code


# --- reductions -----------------------------------------------------------------------------------------------------


@_intrinsic
def maximum_of(context: Any, x: Any) -> Any:
    """Largest lane of signed integers."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_I32, [INTS.llvm])
        name = f"llvm.vector.reduce.smax.v{LANES}i32"
        return builder.call(_cgutils.get_or_insert_function(builder.module, kind, name), args)

    return types.int32(INTS), code


# --- memory ---------------------------------------------------------------------------------------------------------


def _pointer(context: Any, builder: Any, array: Any, index: Any, value: Any, pointee: ir.Type) -> Any:
    data = context.make_array(array)(context, builder, value).data
    return builder.bitcast(builder.gep(data, [index]), pointee.as_pointer())


def _read(array: Any, emit: Callable[[Any, Any, Any, int], Any]) -> Any:
    """float32 arrays give floats, those of narrower unsigned integers give ints."""
    lane = {types.float32: _F32, types.int32: _I32, types.uint16: _I16, types.uint8: _I8}[array.dtype]
    vector = FLOATS if lane == _F32 else INTS

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def pointer(index: Any, pointee: ir.Type) -> Any:
            return _pointer(context, builder, array, index, args[0], pointee)

        result = emit(builder, pointer, (lane, *args[1:]), array.dtype.bitwidth // 8)
        return builder.zext(result, INTS.llvm) if lane in (_I16, _I8) else result

    return vector, code


@_intrinsic
def load(context: Any, array: Any, start: Any) -> Any:
    """array[start + i] for lanes i; float32 as floats, integers as ints."""

    def emit(builder: Any, pointer: Any, args: Any, size: int) -> Any:
        lane, first = args
        return builder.load(pointer(first, _vector(lane)), align=size)

    vector, code = _read(array, emit)
    return vector(array, types.int64), code


@_intrinsic
def item(context: Any, array: Any, index: Any) -> Any:
    """array[index], an index that is never negative."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, array, args[1], args[0], context.get_value_type(array.dtype))
        return builder.load(pointer, align=array.dtype.bitwidth // 8)

    return array.dtype(array, types.int64), code


@_intrinsic
def gather(context: Any, array: Any, start: Any, step: Any) -> Any:
    """array[start + i·step] for lanes i; float32 as floats, integers as ints."""

    def emit(builder: Any, pointer: Any, args: Any, size: int) -> Any:
        lane, first, stride = args
        result = ir.Constant(_vector(lane), ir.Undefined)
        for i in range(LANES):
            item = builder.load(pointer(builder.add(first, builder.mul(stride, _I64(i))), lane), align=size)
            result = builder.insert_element(result, item, _I32(i))
        return result

    vector, code = _read(array, emit)
    return vector(array, types.int64, types.int64), code


@_intrinsic
def transpose(context: Any, array: Any, start: Any) -> Any:
    """Transpose 256 float32 from array[start] on as a 16×16 matrix, in place, by sub-blocks of 8, 4, 2, 1."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, first = args
        starts = [builder.add(first, _I64(i * LANES)) for i in range(LANES)]
        pointers = [_pointer(context, builder, array, start, value, FLOATS.llvm) for start in starts]
        rows = [builder.load(pointer, align=4) for pointer in pointers]
        for distance in (8, 4, 2, 1):
            for low in (i for i in range(LANES) if not i & distance):
                a, b = rows[low], rows[low + distance]
                upper = [i if not i & distance else LANES + i - distance for i in range(LANES)]
                lower = [i + distance if not i & distance else LANES + i for i in range(LANES)]
                rows[low] = builder.shuffle_vector(a, b, _indices(upper))
                rows[low + distance] = builder.shuffle_vector(a, b, _indices(lower))
        for row, pointer in zip(rows, pointers, strict=True):
            builder.store(row, pointer, align=4)
        return context.get_dummy_value()

    return types.void(array, types.int64), code


@_intrinsic
def multiply_high(context: Any, x: Any, factor: Any) -> Any:
    """High 32 bits of the unsigned product of each lane with an integer."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        wide = _vector(_I64)
        y = _convert(context, builder, args[1], factor, INTS)
        product = builder.mul(builder.zext(args[0], wide), builder.zext(y, wide))
        return builder.trunc(builder.lshr(product, ir.Constant(wide, [32] * LANES)), INTS.llvm)

    return INTS(x, factor), code


@_intrinsic
def store(context: Any, array: Any, start: Any, x: Any) -> Any:
    """array[start + i] = lane i; ints lose their high bits where the array is narrower."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, first, lanes = args
        size = array.dtype.bitwidth // 8
        if x == INTS:
            lanes = builder.trunc(lanes, _vector(ir.IntType(8 * size)))
        builder.store(lanes, _pointer(context, builder, array, first, value, lanes.type), align=size)
        return context.get_dummy_value()

    return types.void(array, types.int64, x), code


@_intrinsic
def put(context: Any, array: Any, index: Any, x: Any) -> Any:
    """array[index] = x, a scalar, at an index that is never negative; integers lose their high bits."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = context.cast(builder, args[2], x, array.dtype)
        pointer = _pointer(context, builder, array, args[1], args[0], value.type)
        builder.store(value, pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.int64, x), code


@_intrinsic
def store_nibbles(context: Any, array: Any, start: Any, x: Any) -> Any:
    """Eight bytes from array[start] on: even lanes in the low nibble, odd lanes in the high one; lanes are 0..15."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, first, lanes = args
        pairs = builder.bitcast(builder.trunc(lanes, _vector(_I8)), _vector(_I16, 8))
        high = builder.lshr(pairs, ir.Constant(pairs.type, [4] * 8))
        joined = builder.trunc(builder.or_(pairs, high), _vector(_I8, 8))
        builder.store(joined, _pointer(context, builder, array, first, value, joined.type), align=1)
        return context.get_dummy_value()

    return types.void(array, types.int64, x), code


@_intrinsic
def load_nibbles(context: Any, array: Any, start: Any) -> Any:
    """The sixteen nibbles of eight bytes from array[start] on, low ones in even lanes."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value, first = args
        read = builder.load(_pointer(context, builder, array, first, value, _vector(_I8, 8)), align=1)
        pairs = builder.zext(read, _vector(_I16, 8))
        spread = builder.or_(pairs, builder.shl(pairs, ir.Constant(pairs.type, [4] * 8)))
        spread = builder.and_(spread, ir.Constant(pairs.type, [0x0F0F] * 8))
        return builder.zext(builder.bitcast(spread, _vector(_I8)), INTS.llvm)

    return INTS(array, types.int64), code


@_intrinsic
def halves(context: Any, words: Any) -> Any:
    """Eight integers of 32 bits → their 16-bit halves as sixteen lanes, low half first."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        joined = ir.Constant(_vector(_I32, 8), ir.Undefined)
        for i in range(8):
            word = context.cast(builder, builder.extract_value(args[0], i), words.dtype, types.int32)
            joined = builder.insert_element(joined, word, _I32(i))
        return builder.zext(builder.bitcast(joined, _vector(_I16)), INTS.llvm)

    return INTS(words), code
