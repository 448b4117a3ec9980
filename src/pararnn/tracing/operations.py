"""Turns one aten call on scalars into an expression: overloads and defaults made explicit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pararnn.tracing.expressions import Expression, Operand, is_boolean, make

IDENTITIES = frozenset("clone alias contiguous lift_fresh lift_fresh_copy view_as conj".split())
MOVES = frozenset(
    "view _unsafe_view reshape unsqueeze squeeze expand permute transpose t select slice split "
    "split_with_sizes chunk unsafe_split unsafe_split_with_sizes unsafe_chunk unbind cat stack "
    "flip roll repeat index_select slice_scatter select_scatter narrow unflatten flatten movedim "
    "swapaxes clone".split()
)
_CREATION = {"zeros": 0.0, "ones": 1.0, "empty": 0.0, "zeros_like": 0.0, "ones_like": 1.0}
_CREATION |= {
    "_efficientzerotensor": 0.0,
    "new_zeros": 0.0,
    "zero": 0.0,
    "new_ones": 1.0,
    "empty_like": 0.0,
    "new_empty": 0.0,
}
_KEEP_BOOL = frozenset("where logical_and logical_or logical_xor logical_not to_float".split())
_UNTAGGED = frozenset(
    "hardswish hardswish_backward floor_divide leaky_relu leaky_relu_backward".split()
)
_LOGICAL = {"bitwise_and": "logical_and", "bitwise_or": "logical_or", "bitwise_xor": "logical_xor"}
_PLACEMENT = frozenset("layout device pin_memory memory_format non_blocking".split())
_WIDTH = {torch.float16: 1, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


class UnknownOperation(ValueError):
    """The operation is not one that works on every element by itself."""


def operation_name(func: Any) -> str:
    """The name of an aten operation without its overload: `add` for aten.add.Tensor."""
    return func._schema.name.split("::")[1]


def is_pointwise(func: Any) -> bool:
    """Whether PyTorch or this module knows the operation as working on each element by itself."""
    name = operation_name(func)
    known = name in _RULES or name in IDENTITIES or name in _UNTAGGED
    return known or torch.Tag.pointwise in func.tags


def creation_value(func: Any, args: tuple[Any, ...]) -> float | None:
    """The number that a creating operation (`zeros_like`, `full`) fills its result with."""
    name = operation_name(func)
    if name in ("full", "full_like", "new_full"):
        value = args[2] if name == "new_full" else args[1]
        return value if isinstance(value, bool) else float(value)
    if name == "scalar_tensor":
        return float(args[0])
    return _CREATION.get(name)


def express(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype
) -> Operand:
    """Express one call.

    Args:
        func: aten overload.
        args: Positional arguments; tensors replaced by expressions or numbers.
        kwargs: Keyword arguments likewise.
        dtype: Type that the graph works in; a cast to a narrower one rounds, others do nothing.
    """
    name = operation_name(func)
    if name in IDENTITIES:
        return args[0]
    values = named_arguments(func, args, kwargs)
    if not any(isinstance(v, Expression) for v in values.values()):
        return _evaluate(func, values)
    if name in ("_to_copy", "to", "prims_convert_element_type"):
        return _cast(values["self"], kwargs.get("dtype"), dtype)
    if name in _RULES:
        return _RULES[name](**values)
    plain = [v for k, v in values.items() if k != "dtype" and k not in _PLACEMENT]
    return apply(name, *plain)


def _evaluate(func: Any, values: dict[str, Any]) -> Any:
    """The result of a call on numbers alone."""
    given = {a.name: values[a.name] for a in func._schema.arguments}
    for argument in func._schema.arguments:
        if argument.type.isSubtypeOf(torch.TensorType.get()):
            number = given[argument.name]
            kind = torch.bool if isinstance(number, bool) else torch.float64
            given[argument.name] = torch.tensor(number, dtype=kind)
    for option in _PLACEMENT & given.keys():
        del given[option]
    names = [a.name for a in func._schema.arguments if a.kwarg_only]
    options = {name: given.pop(name) for name in names if name in given}
    result = func(*given.values(), **options)
    return tuple(r.item() for r in result) if isinstance(result, tuple) else result.item()


def apply(name: str, *args: Operand) -> Operand:
    """Make an expression, truth values turned into 0 and 1 where numbers are meant."""
    if name not in _KEEP_BOOL:
        args = tuple(make("to_float", a) if _is_bool_expression(a) else a for a in args)
    return make(name, *args)


def _is_bool_expression(operand: Operand) -> bool:
    return isinstance(operand, Expression) and operand.is_bool


def named_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, defaults filled in."""
    values = {}
    for i, argument in enumerate(func._schema.arguments):
        if i < len(args):
            values[argument.name] = args[i]
        elif argument.name in kwargs:
            values[argument.name] = kwargs[argument.name]
        else:
            values[argument.name] = argument.default_value
    return values


def _cast(operand: Operand, target: torch.dtype | None, dtype: torch.dtype) -> Operand:
    if target is None:
        return operand
    if target is torch.bool:
        return operand if is_boolean(operand) else make("ne", operand, 0.0)
    if is_boolean(operand):
        return make("to_float", operand)
    if not target.is_floating_point:
        return make("trunc", operand)
    return round_to(operand, target, dtype)


def round_to(operand: Operand, target: torch.dtype, dtype: torch.dtype) -> Operand:
    """Round to a type if it is narrower than the one that the graph works in."""
    if _WIDTH[target] >= _WIDTH[dtype]:
        return operand
    if not isinstance(operand, Expression):
        return torch.tensor(operand, dtype=target).item()
    name = f"to_{str(target).split('.')[1]}"
    return operand if operand.op in (name, "to_float") else make(name, operand)


def _scaled(operand: Operand, alpha: Operand) -> Operand:
    return apply("mul", operand, alpha)


def _add(self: Operand, other: Operand, alpha: Operand = 1) -> Operand:
    if is_boolean(self) and is_boolean(other):
        return make("logical_or", self, other)
    return apply("add", self, _scaled(other, alpha))


def _mul(self: Operand, other: Operand) -> Operand:
    if is_boolean(self) and is_boolean(other):
        return make("logical_and", self, other)
    return apply("mul", self, other)


def _div(self: Operand, other: Operand, rounding_mode: str | None = None) -> Operand:
    if rounding_mode == "floor":
        return apply("div_floor", self, other)
    quotient = apply("div", self, other)
    return make("trunc", quotient) if rounding_mode == "trunc" else quotient


def _clamp(self: Operand, min: Operand = None, max: Operand = None) -> Operand:
    return apply("clamp", self, min, max)


def _gelu(self: Operand, approximate: str) -> Operand:
    return make("gelu_tanh" if approximate == "tanh" else "gelu", self)


def _gelu_backward(grad_output: Operand, self: Operand, approximate: str) -> Operand:
    return make(f"gelu{'_tanh' if approximate == 'tanh' else ''}_backward", grad_output, self)


def _logical_not(self: Operand) -> Operand:
    return make("logical_not", self if is_boolean(self) else make("ne", self, 0.0))


def _logical(name: str) -> Callable[..., Operand]:
    def rule(self: Operand, other: Operand) -> Operand:
        sides = [s if is_boolean(s) else make("ne", s, 0.0) for s in (self, other)]
        return make(name, *sides)

    return rule


def _bitwise(name: str) -> Callable[..., Operand]:
    def rule(self: Operand, other: Operand) -> Operand:
        if not (is_boolean(self) and is_boolean(other)):
            raise UnknownOperation(f"{name} on integers")
        return make(_LOGICAL[name], self, other)

    return rule


def _where(condition: Operand, self: Operand, other: Operand) -> Operand:
    if not (is_boolean(self) and is_boolean(other)):
        self, other = (apply("mul", s, 1.0) if is_boolean(s) else s for s in (self, other))
    return make("where", condition, self, other)


def _round(self: Operand, decimals: int = 0) -> Operand:
    if decimals:
        scale = 10.0**decimals
        return make("div", make("round", make("mul", self, scale)), scale)
    return make("round", self)


def _nan_to_num(
    self: Operand, nan: float | None, posinf: float | None, neginf: float | None
) -> Operand:
    return make("nan_to_num", self, 0.0 if nan is None else nan, posinf, neginf)


_RULES: dict[str, Callable[..., Any]] = {
    "add": _add,
    "mul": _mul,
    "sub": lambda self, other, alpha=1: apply("sub", self, _scaled(other, alpha)),
    "rsub": lambda self, other, alpha=1: apply("sub", other, _scaled(self, alpha)),
    "div": _div,
    "true_divide": _div,
    "floor_divide": lambda self, other: _div(self, other, "floor"),
    "clamp": _clamp,
    "clamp_min": lambda self, min: _clamp(self, min=min),
    "clamp_max": lambda self, max: _clamp(self, max=max),
    "gelu": _gelu,
    "gelu_backward": _gelu_backward,
    "log_sigmoid_forward": lambda self: (make("log_sigmoid", self), 0.0),
    "log_sigmoid_backward": lambda grad_output, self, buffer: make(
        "log_sigmoid_backward", grad_output, self
    ),
    "logical_not": _logical_not,
    "bitwise_not": _logical_not,
    "logical_and": _logical("logical_and"),
    "logical_or": _logical("logical_or"),
    "logical_xor": _logical("logical_xor"),
    "bitwise_and": _bitwise("bitwise_and"),
    "bitwise_or": _bitwise("bitwise_or"),
    "bitwise_xor": _bitwise("bitwise_xor"),
    "where": _where,
    "masked_fill": lambda self, mask, value: _where(mask, value, self),
    "masked_fill_backward": lambda self, mask: _where(mask, 0.0, self),
    "round": _round,
    "nan_to_num": _nan_to_num,
    "square": lambda self: make("mul", self, self),
    "addcmul": lambda self, tensor1, tensor2, value=1: self + _scaled(tensor1, value) * tensor2,
    "addcdiv": lambda self, tensor1, tensor2, value=1: self + _scaled(tensor1, value) / tensor2,
    "detach": lambda self: make("detach", self),
    "fill": lambda self, value: value,
    "copy": lambda self, src, non_blocking=False: src,
    "_to_copy": lambda self: self,
    "_prelu_kernel": lambda self, weight: _where(
        make("gt", self, 0.0), self, apply("mul", weight, self)
    ),
}
