"""What `triton_interpreter` leaves out changes nothing: each of its functions against Triton's."""

import itertools
import os

import numpy as np
import pytest

from .conftest import needs_triton

pytestmark = [
    needs_triton,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="there is no interpreter"),
]

TYPES = ("int1", "int8", "uint8", "int32", "uint32", "int64", "float16", "bfloat16")
TYPES += ("float32", "float64")
SHAPES = ((), (1,), (4,), (2, 1), (1, 4), (2, 4))
NUMBERS = (True, 0, -3, 2**31 - 1, 2**31, 2**40, 0.5, 1e300, float("nan"))


@pytest.fixture(autouse=True)
def known():
    import triton_interpreter

    if not triton_interpreter.is_known():
        pytest.skip("this version of Triton is run as it is")


def make(name, shape, pointer=False):
    """A tensor, made by none of the functions that are compared."""
    from triton.language import core
    from triton.runtime import interpreter

    dtype = core.pointer_type(getattr(core, name)) if pointer else getattr(core, name)
    data = np.arange(1, 1 + np.prod(shape, dtype=int)).reshape(shape or (1,))
    kind = interpreter._get_np_dtype.__wrapped__(dtype)
    handle = interpreter.TensorHandle(data.astype(kind), dtype)
    return core.tensor(handle, core.block_type(dtype, list(shape)) if shape else dtype)


def seen(value):
    """All of a result that kernels see, or of an error."""
    if isinstance(value, tuple):
        return [seen(v) for v in value]
    if isinstance(value, Exception):
        return type(value), str(value)
    handle = value.handle
    shape = [s.value for s in value.shape]
    kinds = str(value.type), type(value.type), str(value.dtype), str(handle.dtype)
    return kinds, shape, value.numel.value, handle.data.dtype, handle.data.tolist()


def outcome(function, *arguments, **options):
    try:
        return repr(seen(function(*arguments, **options)))
    except Exception as error:
        return repr(seen(error))


def operands(shapes=SHAPES):
    for name, shape in itertools.product(TYPES, shapes):
        yield make(name, shape)
    for shape in shapes:
        yield make("float32", shape, pointer=True)


def function(name):
    from triton.runtime.interpreter import interpreter_semantic

    return getattr(interpreter_semantic, name)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("division", [False, True])
def test_operands(division):
    ours = function("binary_op_type_checking_impl")
    tensors = list(operands([(), (4,), (2, 1), (1, 4)]))
    for lhs, rhs in itertools.product(tensors, [*tensors, *NUMBERS]):
        for pair in ((lhs, rhs), (rhs, lhs)):
            for given, named in (
                ((), {}),
                ((True,), {}),  # pointers are allowed
                ((False, False, False), {}),  # types may differ
                ((), {"arithmetic_check": False}),  # likewise
            ):
                options = {"div_or_mod": division, **named}
                expected = outcome(ours.__wrapped__, *pair, *given, **options)
                assert outcome(ours, *pair, *given, **options) == expected


def test_broadcast():
    ours = function("broadcast_impl_value")
    for pair in itertools.product(list(operands()), repeat=2):
        assert outcome(ours, *pair) == outcome(ours.__wrapped__, *pair)


def test_tensors():
    ours = function("make_tensor")
    for given in operands():
        found, expected = (make(given.handle, given.type) for make in (ours, ours.__wrapped__))
        assert vars(found).keys() == vars(expected).keys()
        assert seen(found) == seen(expected)
        assert found.dtype is expected.dtype


def test_types_of_blocks():
    from triton.language import core

    for name, shape in itertools.product(TYPES, SHAPES[1:]):
        dtype = getattr(core, name)
        for element, sizes in itertools.product(
            (dtype, core.pointer_type(dtype)), (list(shape), [core.constexpr(s) for s in shape])
        ):
            found, expected = core.block_type(element, sizes), object.__new__(core.block_type)
            core.block_type.__init__.__wrapped__(expected, element, sizes)
            assert found == expected
            assert vars(found).keys() == vars(expected).keys()
            for key in ("name", "numel", "element_ty"):
                assert getattr(found, key) == getattr(expected, key)
            assert [*map(type, found.shape)] == [*map(type, expected.shape)]
    for wrong in ([], [3], [2, 4.0]):
        both = [core.block_type.__init__, core.block_type.__init__.__wrapped__]
        raised = []
        for init in both:
            with pytest.raises((TypeError, ValueError)) as error:
                init(object.__new__(core.block_type), core.float32, wrong)
            raised.append(str(error.value))
        assert raised[0] == raised[1]


def test_types_of_numpy():
    from triton.runtime.interpreter import _get_np_dtype

    for given in operands():
        assert _get_np_dtype(given.type) == _get_np_dtype.__wrapped__(given.type)


def test_the_check_that_is_left_out_says_nothing():
    """In debug mode only, which is off."""
    from triton.runtime import interpreter

    left_out = interpreter.interpreter_builder.options
    assert not left_out.debug
    assert not left_out.sanitize_overflow
    assert interpreter.InterpreterOptions().sanitize_overflow
    assert not interpreter.InterpreterOptions().debug
