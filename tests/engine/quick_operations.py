"""Operations of Triton's interpreter that remember: how types go together is found out once, and after that each is one
call of numpy. When it is learnt, an operation is compared with the interpreter's own, byte by byte.
"""

import functools
from typing import Any

import numpy

OPERATORS = {
    "__add__": numpy.add, "__radd__": numpy.add, "__sub__": numpy.subtract,
    "__mul__": numpy.multiply, "__rmul__": numpy.multiply,
    "__and__": numpy.bitwise_and, "__or__": numpy.bitwise_or, "__xor__": numpy.bitwise_xor,
    "__lshift__": numpy.left_shift, "__rshift__": numpy.right_shift,
    "__lt__": numpy.less, "__le__": numpy.less_equal, "__gt__": numpy.greater, "__ge__": numpy.greater_equal,
    "__eq__": numpy.equal, "__ne__": numpy.not_equal,
}  # fmt: skip
"""What numpy does for them, where both operands are of one type, or whole numbers with a sign."""


def remembering(compute: Any, operator: Any) -> Any:
    """An operator of tensors that goes the long way once for each two types, or type and number, and remembers what
    came of it: after that it is one call of numpy.
    """
    from triton.language import core
    from triton.runtime.interpreter import TensorHandle, interpreter_semantic

    tensor, constexpr, numbers = core.tensor, core.constexpr, {int, float, bool}
    # By the types' places in memory, and so these are kept: how to compute, what the array, the handle and the result
    # are, and the other operand where it is a number. None, where only the long way will do.
    known: dict[Any, tuple[Any, Any, Any, Any, Any, Any] | None] = {}

    def learn(key: Any, left: Any, right: Any) -> Any:
        result, how, known[key] = operator(left, right), compute, None
        constant = None if type(right) is tensor else numpy.array([right])
        # One bit wraps around; numpy says that true and true is true.
        if left.dtype.is_int1() and compute in (numpy.add, numpy.subtract):
            return result
        if left.dtype.is_ptr():
            width = max(1, left.handle.get_element_ty().primitive_bitwidth // 8)
            how = functools.partial(_shift, compute, width)
        elif constant is not None:
            same, other = interpreter_semantic.binary_op_type_checking_impl(left, right)
            if same is not left:
                return result
            constant = other.handle.data
        # Numpy widens whole numbers as Triton does, but not others.
        elif left.dtype is not right.dtype and not (left.dtype.is_int_signed() and right.dtype.is_int_signed()):
            return result
        array = how(left.handle.data, right.handle.data if constant is None else constant)
        if _equal(array, result.handle.data):
            types = left.type, getattr(right, "type", None)
            known[key] = how, array.dtype, result.handle.dtype, result.type, constant, types
        return result

    def operate(self: Any, other: Any) -> Any:
        kind = type(other)
        if kind is constexpr:
            other = other.value
            kind = type(other)
        if kind is tensor:
            key: Any = id(self.type), id(other.type)
        elif kind in numbers:
            # Minus zero equals zero.
            key = id(self.type), kind, other or str(other)
        else:
            return operator(self, other)
        if key not in known:
            return learn(key, self, other)
        way = known[key]
        if way is not None:
            how, array_type, handle_type, result_type, constant, _ = way
            array = how(self.handle.data, other.handle.data if constant is None else constant)
            # What is true or false may be held as whole numbers.
            if array.dtype is array_type:
                return tensor(TensorHandle(array, handle_type), result_type)
        return operator(self, other)

    return operate


def remembering_cast(cast: Any) -> Any:
    """`tensor.to`, that goes the long way once for each two types."""
    from triton.language import core
    from triton.runtime import interpreter
    from triton.runtime.interpreter import TensorHandle

    known: dict[Any, Any] = {}

    def quick_cast(self: Any, dtype: Any, **options: Any) -> Any:
        if options:
            return cast(self, dtype, **options)
        kind = getattr(dtype, "value", dtype)
        key = id(self.type), id(kind)
        if key not in known:
            result = cast(self, dtype)
            data = result.handle.data
            # A whole number may be held as one without a sign.
            usual = _is_plain(kind) and data.dtype == interpreter._get_np_dtype(kind)
            if usual and _is_plain(self.dtype) and _equal(self.handle.data.astype(data.dtype), data):
                known[key] = data.dtype, result.handle.dtype, result.type, (self.type, kind)
            return result
        array_type, handle_type, result_type, _ = known[key]
        return core.tensor(TensorHandle(self.handle.data.astype(array_type), handle_type), result_type)

    return quick_cast


def remembering_load(load: Any) -> Any:
    """`tl.load`, that goes the long way once for each types of pointers, mask, and what stands where that is false."""
    from triton.language import core
    from triton.runtime import interpreter

    tensor, constexpr = core.tensor, core.constexpr
    read, handle, name = interpreter._interpreter.load, interpreter.TensorHandle, interpreter._get_np_dtype
    known: dict[Any, Any] = {}
    everywhere: dict[Any, Any] = {}

    def learn(key: Any, pointer: Any, mask: Any, other: Any, policy: dict[str, Any]) -> Any:
        result = load(pointer, mask, other, **policy)
        known[key] = None
        shape, element = pointer.handle.data.shape, result.dtype
        if pointer.dtype.element_ty is not element or (mask is not None and mask.handle.data.shape != shape):
            return result
        array_type, instead = name(element), None
        if type(other) is tensor:
            if other.type is not result.type:
                return result
        elif other and not _is_plain(element):
            return result
        else:
            instead = numpy.full(shape, numpy.asarray(0 if other is None else other).astype(array_type))
        where = everywhere.setdefault(shape, numpy.ones(shape, dtype=bool)) if mask is None else mask.handle.data
        filling = other.handle.data if instead is None else instead
        if _equal(read(pointer.handle.data, where.astype(bool), filling, array_type), result.handle.data):
            types = pointer.type, getattr(mask, "type", None), getattr(other, "type", None)
            known[key] = array_type, instead, element, result.type, types
        return result

    def quick_load(pointer: Any, mask: Any = None, other: Any = None, **policy: Any) -> Any:
        if type(mask) is constexpr:
            mask = mask.value
        if type(other) is constexpr:
            other = other.value
        if not (mask is None or type(mask) is tensor):
            return load(pointer, mask, other, **policy)
        filling = id(other.type) if type(other) is tensor else (type(other), other or str(other))
        key = id(pointer.type), None if mask is None else id(mask.type), filling
        if key not in known:
            return learn(key, pointer, mask, other, policy)
        way = known[key]
        if way is None:
            return load(pointer, mask, other, **policy)
        array_type, instead, element, result_type, _ = way
        places = pointer.handle.data
        where = everywhere[places.shape] if mask is None else mask.handle.data
        if where.dtype != bool:
            where = where.astype(bool)
        array = read(places, where, other.handle.data if instead is None else instead, array_type)
        return tensor(handle(array, element), result_type)

    return quick_load


def _equal(one: Any, other: Any) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def _is_plain(dtype: Any) -> bool:
    """Whether numpy has the type: others are held as whole numbers."""
    name = getattr(dtype, "name", "")
    return name in {"fp16", "fp32", "fp64"} or name.lstrip("u") in {"int8", "int16", "int32", "int64"}


def _shift(compute: Any, width: int, pointers: Any, offsets: Any) -> Any:
    return compute(pointers, width * offsets.astype(numpy.uint64))
