"""Triton's interpreter, made so fast that all of Model Runner V2 can be tested in it.

Nearly all of its time goes into the types and shapes of what it computes, which it finds out anew in every operation of
every program of a grid. Here they are found out once, and what is no operation at all, as to broadcast two operands of
one shape, is not gone through. What is computed stays the same: tests/kernels runs in it too.
"""

import functools
import inspect
import itertools
import math
from typing import Any

from tests.engine.quick_operations import OPERATORS, remembering, remembering_cast, remembering_load


def make_it_quick() -> None:
    """Call in a process that interprets Triton, before any kernel is."""
    _patch_the_language_for_good()
    _launch_lightly()
    _call_builtins_directly()
    _name_pointers_once()
    _make_block_types_once()
    _make_tensors_of_known_shapes()
    _leave_equal_types_alone()
    _name_types_once()
    _check_no_sums()
    _hold_arrays_lightly()


def _patch_the_language_for_good() -> None:
    """It replaces `tl`'s functions at each launch and each call of a device function, and takes them back after it."""
    from triton.runtime import interpreter

    patch, nothing_to_restore = interpreter._patch_lang, interpreter._LangPatchScope()
    # The modules' variables that kernels see, kept, as their places in memory are what is looked for.
    patched: dict[int, Any] = {}

    def patch_once(function: Any) -> Any:
        seen = function.__globals__
        if id(seen) not in patched:
            patched[id(seen)] = seen
            patch(function)
        return nothing_to_restore

    interpreter._patch_lang = patch_once


def _launch_lightly() -> None:
    """A launch finds out the kernel's form anew, and takes all memory to the host and back: here it is one."""
    from triton.runtime import interpreter, jit

    @functools.cache
    def form(function: Any) -> tuple[inspect.Signature, set[str]]:
        kinds = inspect.get_annotations(function).items()
        return inspect.signature(function), {name for name, kind in kinds if jit._normalize_ty(kind) == "constexpr"}

    def launch(self: Any, *args: Any, **options: Any) -> None:
        signature, constants = form(self.fn)
        options = {name: value for name, value in options.items() if name in signature.parameters}
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        for hook in self.pre_run_hooks:
            hook(*args, **options)
        interpreter._patch_lang(self.fn)
        values = {
            name: value if name in constants else interpreter._implicit_cvt(value)
            for name, value in bound.arguments.items()
        }
        grid = self.grid(values) if callable(self.grid) else self.grid
        grid = (*grid, 1, 1)[:3]
        interpreter.interpreter_builder.set_grid_dim(*grid)
        for place in itertools.product(*map(range, grid)):
            interpreter.interpreter_builder.set_grid_idx(*place)
            self.fn(**values)

    def initialise(self: Any, fn: Any, arg_names: Any, grid: Any, pre_run_hooks: Any = ()) -> None:
        self.fn, self.grid, self.pre_run_hooks = fn, grid, pre_run_hooks

    interpreter.GridExecutor.__init__, interpreter.GridExecutor.__call__ = initialise, launch


def _call_builtins_directly() -> None:
    """Two functions lie around each one of `tl`, to say that it is called from a kernel: here it is."""
    from triton.language import core
    from triton.runtime import interpreter

    def patch_attribute(owner: Any, name: str, member: Any, _builder: Any, scope: Any) -> None:
        function = getattr(member, "__wrapped__", member)

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return function(*args, **kwargs)

        if owner is core.tensor and name in OPERATORS:
            call = remembering(OPERATORS[name], call)
        elif name == "load" and inspect.ismodule(owner):
            call = remembering_load(call)
        elif name == "to" and owner is core.tensor:
            call = remembering_cast(call)
        scope.set_attr(owner, name, call)

    interpreter._patch_attr = patch_attribute

    unwrap, constexpr = core._unwrap_if_constexpr, core.constexpr
    never = {int, float, bool, str, type(None), core.tensor, core.dtype}

    def unwrap_at_a_look(value: Any) -> Any:
        kind = type(value)
        if kind is constexpr:
            return value.value
        return value if kind in never else unwrap(value)

    core._unwrap_if_constexpr = unwrap_at_a_look


def _name_pointers_once() -> None:
    """So that two of one kind are the same type."""
    from triton import language

    # As launches find it.
    language.str_to_ty = functools.cache(language.str_to_ty)


def _make_block_types_once() -> None:
    """There are few of them, and so two that are equal are the same one."""
    from triton.language import core

    block_type, initialise, to_ir = core.block_type, core.block_type.__init__, core.block_type.to_ir
    types: dict[Any, Any] = {}

    def new(cls: type, element_ty: Any, shape: Any) -> Any:
        sizes = tuple(getattr(size, "value", size) for size in getattr(shape, "values", shape))
        key = str(element_ty), getattr(element_ty, "address_space", None), sizes
        if key not in types:
            made = object.__new__(cls)
            # One that is refused is not to be found here the next time.
            initialise(made, element_ty, shape)
            types[key] = made
        return types[key]

    def to_ir_once(self: Any, builder: Any) -> Any:
        if not hasattr(self, "known_ir"):
            self.known_ir = to_ir(self, builder)
        return self.known_ir

    block_type.__new__ = staticmethod(new)
    block_type.__init__ = lambda *_, **__: None
    block_type.to_ir = to_ir_once


def _make_tensors_of_known_shapes() -> None:
    """A tensor's shape is that of its type, each size wrapped anew."""
    from triton.language import core

    no_shape, one = core.tuple([]), core.constexpr(1)

    def initialise(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        if not type.is_block():
            self.shape, self.numel = no_shape, one
            return
        if not hasattr(type, "known_shape"):
            sizes = [core.constexpr(size) for size in type.shape]
            type.known_shape = core.tuple(sizes), core.constexpr(math.prod(type.shape))
        self.shape, self.numel = type.known_shape

    core.tensor.__init__ = initialise


def _leave_equal_types_alone() -> None:
    """Operands of one type and shape are neither cast nor broadcast, and a number beside a tensor is made one once."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    tensor, broadcast = core.tensor, TritonSemantic.broadcast_impl_value
    check, cast = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.cast
    # By the other operand's type, and the number: as a tensor of that type, and the type.
    constants: dict[Any, tuple[Any, Any]] = {}

    def broadcast_others(self: Any, lhs: Any, rhs: Any) -> Any:
        one, other = lhs.type, rhs.type
        if one is other or not (one.is_block() or other.is_block()):
            return lhs, rhs
        if one.is_block() and other.is_block() and one.shape.values == other.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    def check_others(
        self: Any,
        lhs: Any,
        rhs: Any,
        allow_lhs_ptr: bool = False,
        allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> Any:
        kind = type(rhs)
        if type(lhs) is tensor and not div_or_mod:
            if kind is tensor:
                if lhs.dtype.is_ptr():
                    if allow_lhs_ptr and rhs.dtype.is_int():
                        return broadcast_others(self, lhs, rhs)
                elif lhs.type is rhs.type:
                    return lhs, rhs
            elif (kind is int or kind is float) and not lhs.dtype.is_ptr():
                # Minus zero equals zero.
                key = id(lhs.type), kind, rhs if rhs else str(rhs), arithmetic_check
                if key in constants:
                    return lhs, constants[key][0]
                left, right = check(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)
                if left is lhs:
                    # With its type, whose place in memory is the key.
                    constants[key] = right, lhs.type
                return left, right
        return check(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    def cast_others(self: Any, input: Any, dst_ty: Any, *rounding: Any, **options: Any) -> Any:
        return input if input.dtype is dst_ty.scalar else cast(self, input, dst_ty, *rounding, **options)

    TritonSemantic.broadcast_impl_value = broadcast_others
    TritonSemantic.binary_op_type_checking_impl = check_others
    TritonSemantic.cast = cast_others


def _name_types_once() -> None:
    """It makes a table of all types whenever one is looked up."""
    from triton.runtime import interpreter

    look_up, known = interpreter._get_np_dtype, {}

    def look_up_once(dtype: Any) -> Any:
        name = str(dtype.scalar)
        if name not in known:
            known[name] = look_up(dtype)
        return known[name]

    interpreter._get_np_dtype = look_up_once


def _check_no_sums() -> None:
    """Whether whole numbers overflow: compiled kernels are not asked that either."""
    from triton.runtime.interpreter import interpreter_builder

    object.__setattr__(interpreter_builder.options, "sanitize_overflow", False)


def _hold_arrays_lightly() -> None:
    """Each array is held with its type, and attributes that few have, and was looked at whether it fits: now where it
    leaves for memory."""
    from types import MappingProxyType

    import numpy
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    none: Any = MappingProxyType({})

    def initialise(self: Any, data: Any, dtype: Any, attr: Any = none) -> None:
        self.data, self.dtype, self.attr = data, dtype, attr

    def set_attr(self: Any, key: Any, value: Any) -> None:
        self.attr = {**self.attr, key: value}

    TensorHandle.__init__, TensorHandle.set_attr = initialise, set_attr

    everywhere: dict[Any, Any] = {}

    def mask_of(ptr: Any) -> Any:
        shape = ptr.data.shape
        if shape not in everywhere:
            everywhere[shape] = TensorHandle(numpy.ones(shape, dtype=bool), tl.int1)
        return everywhere[shape]

    InterpreterBuilder.create_load = lambda self, ptr, policy, volatile: self.create_masked_load(
        ptr, mask_of(ptr), None, policy, volatile
    )
    store = InterpreterBuilder.create_masked_store

    def store_what_fits(self: Any, ptrs: Any, value: Any, *rest: Any) -> Any:
        element = ptrs.get_element_ty()
        assert value.data.itemsize <= max(8, element.primitive_bitwidth) // 8, f"{value.data.dtype} into {element}"
        return store(self, ptrs, value, *rest)

    InterpreterBuilder.create_masked_store = store_what_fits
    InterpreterBuilder.create_store = lambda self, ptr, value, policy: self.create_masked_store(
        ptr, value, mask_of(ptr), policy
    )
