"""Triton's interpreter without what it does over and over: the same results in half the time.

Each operation of a kernel passes through its Python code. Most of that works out again what is
known from the types. `core/test_interpreter.py` compares both.
"""

import dataclasses
import functools
from types import SimpleNamespace

from triton import language
from triton.language import core
from triton.runtime import interpreter

SEMANTIC, BUILDER = interpreter.interpreter_semantic, interpreter.interpreter_builder
KEPT = {"int1", "int32", "int64", "fp32", "fp64"}  # two of these are computed with as they are


def is_known():
    """Whether this version has the functions below; Triton 3.6 and older ones have others."""
    return hasattr(SEMANTIC, "make_tensor")


def prepare():
    """Once per process, before any kernel runs."""
    patch_language_once()
    if not is_known():
        return
    check_no_overflow_in_vain()
    interpreter._get_np_dtype = numpy_types(interpreter._get_np_dtype)
    core.block_type.__init__ = types_of_blocks(core.block_type.__init__)
    SEMANTIC.make_tensor = tensors(SEMANTIC.make_tensor)
    SEMANTIC.binary_op_type_checking_impl = operands(SEMANTIC.binary_op_type_checking_impl)
    SEMANTIC.broadcast_impl_value = of_one_shape(SEMANTIC.broadcast_impl_value)


def patch_language_once():
    """It changes Triton's language at every call inside a kernel."""
    everything = {"tl": language, "core": core}
    interpreter._patch_lang(SimpleNamespace(__globals__=everything))
    interpreter._patch_lang = lambda _: SimpleNamespace(restore=lambda: None)


def check_no_overflow_in_vain():
    """It computes whole numbers twice to find an overflow, and says so in debug mode only."""
    if not BUILDER.options.debug:
        BUILDER.options = dataclasses.replace(BUILDER.options, sanitize_overflow=False)


def numpy_types(real):
    """It makes a table of all types each time."""
    known = {}

    @functools.wraps(real)
    def numpy_type(of):
        name = of.scalar.name
        if name not in known:
            known[name] = real(of)
        return known[name]

    return numpy_type


def types_of_blocks(real):
    """Blocks of one shape and type of entries differ in nothing."""
    known = {}

    @functools.wraps(real)
    def init(self, element_ty, shape):
        key = (element_ty.name, *shape, *map(type, shape))
        if key not in known:
            real(self, element_ty, shape)
            known[key] = {k: v for k, v in vars(self).items() if k != "element_ty"}
        else:
            self.__dict__.update(known[key], element_ty=element_ty)

    return init


def tensors(real):
    """Tensors of one type differ in their handle only."""
    known = {}

    @functools.wraps(real)
    def make_tensor(handle, type):
        key = (type.scalar.name, *type.shape) if type.is_block() else (type.name,)
        if key not in known:
            made = real(handle, type)
            own = ("handle", "type", "dtype")
            known[key] = {k: v for k, v in vars(made).items() if k not in own}
            return made
        made = core.tensor.__new__(core.tensor)
        made.__dict__.update(known[key], handle=handle, type=type, dtype=type.scalar)
        return made

    return make_tensor


def operands(real):
    """Two tensors of one type are not converted, and a number takes the type of a tensor."""

    def alike(value, of):
        """The value as a tensor of a type, None where that takes more."""
        if isinstance(value, core.tensor):
            return value if value.dtype.name == of.name else None
        fits = type(value) is int and (of.is_floating() or -(2**31) <= value < 2**31)
        fits = fits or (type(value) is float and of.is_floating())
        return SEMANTIC.scalar_constant(value, of) if fits and of.name != "int1" else None

    @functools.wraps(real)
    def checked(lhs, rhs, *arguments, **options):
        of = lhs.dtype if isinstance(lhs, core.tensor) else getattr(rhs, "dtype", None)
        simple = len(arguments) < 3 and options.get("arithmetic_check", True)
        if simple and of is not None and of.name in KEPT:
            left, right = alike(lhs, of), alike(rhs, of)
            if left is not None and right is not None:
                return SEMANTIC.broadcast_impl_value(left, right)
        return real(lhs, rhs, *arguments, **options)

    return checked


def of_one_shape(real):
    """Two tensors of one shape are not broadcast."""

    @functools.wraps(real)
    def broadcast(lhs, rhs):
        one, other = lhs.type, rhs.type
        if one.is_block() and other.is_block() and one.shape.values == other.shape.values:
            return lhs, rhs
        return real(lhs, rhs)

    return broadcast
