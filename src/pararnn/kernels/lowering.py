"""Lower aten operations to the primitives that kernels compute; each operation has one rule.

Formulas follow PyTorch's documentation. Operands are expressions or numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

from pararnn.kernels.primitives import PRIMITIVES
from pararnn.tracing.expressions import Expression, Operand, make, rewrite

REDUCTIONS = frozenset(["dot", "mean"])  # over the channels of a group; in Triton alone
OF_GROUPS = frozenset("sum_all max_all min_all sum_part max_part min_part".split())
"""Reductions over the channels of a group, see `tracing.products`."""
OF_TILES = frozenset("matmul turned once total total0 total1 max0 max1 min0 min1".split())
"""Operations on tiles, see `tracing.tiles`; in Triton alone."""


class NotLowered(ValueError):
    """An operation has no rule; the message names it."""


def lower(roots: Iterable[Operand]) -> list[Operand]:
    """Rewrite expressions into primitives.

    Raises:
        NotLowered: An operation has no rule.
    """

    def rule(op: str, args: tuple[Operand, ...]) -> Operand:
        if op in _RULES:
            return _RULES[op](*args)
        if op in PRIMITIVES or op in REDUCTIONS | OF_GROUPS | OF_TILES:
            return make(op, *args)
        raise NotLowered(f"aten.{op} has no rule in pararnn.kernels.lowering")

    return rewrite(roots, rule)


def _primitive(name: str) -> Callable[..., Any]:
    return lambda *args: make(name, *args)


where, eq, ne, logical_xor = map(_primitive, ("where", "eq", "ne", "logical_xor"))
exp, exp2, expm1, log, log1p = map(_primitive, ("exp", "exp2", "expm1", "log", "log1p"))
sqrt, sin, sigmoid, tanh, erf = map(_primitive, ("sqrt", "sin", "sigmoid", "tanh", "erf"))
absolute, copysign, fmod = map(_primitive, ("abs", "copysign", "fmod"))
maximum, minimum, to_float = map(_primitive, ("maximum", "minimum", "to_float"))
rounded, trunc, power = map(_primitive, ("round", "trunc", "pow"))

_POWERS: dict[float, Callable[[Any], Operand]] = {
    0.5: sqrt,
    1.0: lambda x: x,
    2.0: lambda x: x * x,
    3.0: lambda x: x * x * x,
    -0.5: lambda x: 1.0 / sqrt(x),
    -1.0: lambda x: 1.0 / x,
    -2.0: lambda x: 1.0 / (x * x),
}


def _pow(base: Operand, exponent: Operand) -> Operand:
    known = isinstance(exponent, (int, float)) and isinstance(base, Expression)
    return _POWERS[exponent](base) if known and exponent in _POWERS else power(base, exponent)


def _clamp(x: Any, low: Any, high: Any) -> Any:
    # If a bound is an expression it may be NaN, which `where` would drop.
    if low is not None:
        x = maximum(x, low) if isinstance(low, Expression) else where(x < low, low, x)
    if high is not None:
        x = minimum(x, high) if isinstance(high, Expression) else where(x > high, high, x)
    return x


def _softplus(x: Any, beta: Any = 1, threshold: Any = 20) -> Any:
    return where(x * beta > threshold, x, log1p(exp(x * beta)) / beta)


def _elu(x: Any, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> Any:
    return where(x <= 0.0, expm1(x * input_scale) * (alpha * scale), x * scale)


def _elu_backward(g: Any, alpha: Any, scale: Any, input_scale: Any, is_result: Any, x: Any) -> Any:
    slope = x + alpha * scale if is_result else exp(x * input_scale) * (alpha * scale)
    return where(x <= 0.0, g * input_scale * slope, g * scale)


def _silu_backward(g: Any, x: Any) -> Operand:
    s = sigmoid(x)
    return g * (s * (1.0 + x * (1.0 - s)))


def _mish_backward(g: Any, x: Any) -> Operand:
    t = tanh(_softplus(x))
    return g * (t + x * sigmoid(x) * (1.0 - t * t))


def _gelu_backward(g: Any, x: Any) -> Operand:
    density = exp(x * x * -0.5) * (1.0 / math.sqrt(2.0 * math.pi))
    return g * (0.5 * (1.0 + erf(x * math.sqrt(0.5))) + x * density)


_GELU_SCALE, _GELU_CUBIC = math.sqrt(2.0 / math.pi), 0.044715


def _gelu_tanh_part(x: Any) -> Any:
    return tanh(_GELU_SCALE * (x + _GELU_CUBIC * (x * x * x)))


def _gelu_tanh_backward(g: Any, x: Any) -> Operand:
    t = _gelu_tanh_part(x)
    slope = _GELU_SCALE * (1.0 + 3.0 * _GELU_CUBIC * (x * x))
    return g * (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope)


def _logit(x: Any, eps: float | None) -> Operand:
    x = x if eps is None else _clamp(x, eps, 1.0 - eps)
    return log(x / (1.0 - x))


def _logit_backward(g: Any, x: Any, eps: float | None) -> Operand:
    low = 0.0 if eps is None else eps
    inside = (x >= low) & (x <= 1.0 - low)
    return where(inside, g / (x * (1.0 - x)), math.nan if eps is None else 0.0)


def _lerp(start: Any, end: Any, weight: Any) -> Operand:
    span = end - start
    near, far = start + weight * span, end - span * (1.0 - weight)
    size = absolute(weight) if isinstance(weight, Expression) else abs(weight)
    return where(size < 0.5, near, far)


def _logaddexp(exponential: Callable[..., Any], unit: float) -> Callable[..., Any]:
    def rule(a: Any, b: Any) -> Operand:
        tail = log1p(exponential(-absolute(a - b))) * unit
        equal_infinities = eq(a, b) & eq(absolute(a), math.inf)
        return where(equal_infinities, a, maximum(a, b) + tail)

    return rule


def _rest(a: Any, b: Any) -> tuple[Any, Any]:
    """`fmod(a, b)`, and whether its sign differs from that of b: a floored quotient is 1 less."""
    rest = fmod(a, b)
    return rest, ne(rest, 0.0) & logical_xor(rest < 0.0, b < 0.0)


def _remainder(a: Any, b: Any) -> Operand:
    rest, differ = _rest(a, b)
    return where(differ, rest + b, rest)


def _div_floor(a: Any, b: Any) -> Operand:
    """The floor of the exact quotient, not of the rounded quotient: 1 // 0.1 is 9."""
    rest, differ = _rest(a, b)
    quotient = rounded((a - rest) / b - to_float(differ))
    signed = where(eq(quotient, 0.0), copysign(0.0, a / b), quotient)
    return where(eq(b, 0.0), a / b, signed)


def _nan_to_num(x: Any, nan: Any, posinf: Any, neginf: Any) -> Operand:
    largest: Any = make("largest")
    x = where(ne(x, x), nan, x)
    x = where(eq(x, math.inf), largest if posinf is None else posinf, x)
    return where(eq(x, -math.inf), -largest if neginf is None else neginf, x)


_SIXTH = 0.1666666716337204  # float32's 1/6, which PyTorch uses in float64 as well


def _sign(x: Any) -> Any:
    return to_float(x > 0.0) - to_float(x < 0.0)


_RULES: dict[str, Callable[..., Any]] = {
    "detach": lambda x: x,
    "pow": _pow,
    "clamp": _clamp,
    "hardtanh": _clamp,
    "hardtanh_backward": lambda g, x, low, high: where((x > low) & (x < high), g, 0.0),
    "relu": lambda x: where(x <= 0.0, 0.0, x),
    "threshold": lambda x, threshold, value: where(x <= threshold, value, x),
    "threshold_backward": lambda g, x, threshold: where(x <= threshold, 0.0, g),
    "leaky_relu": lambda x, slope=0.01: where(x > 0.0, x, x * slope),
    "leaky_relu_backward": lambda g, x, slope, is_result: where(x > 0.0, g, g * slope),
    "elu": _elu,
    "celu": lambda x, alpha=1.0: _elu(x, alpha, 1.0, 1.0 / alpha),
    "selu": lambda x: _elu(x, 1.6732632423543772, 1.0507009873554805),
    "elu_backward": _elu_backward,
    "hardsigmoid": lambda x: _clamp(x + 3.0, 0.0, 6.0) / 6.0,
    "hardsigmoid_backward": lambda g, x: where((x > -3.0) & (x < 3.0), g * _SIXTH, 0.0),
    "hardswish": lambda x: x * _clamp(x + 3.0, 0.0, 6.0) / 6.0,
    "hardswish_backward": lambda g, x: where(
        x <= -3.0, 0.0, where(x < 3.0, g * (x / 3.0 + 0.5), g)
    ),
    "silu": lambda x: x * sigmoid(x),
    "silu_backward": _silu_backward,
    "mish": lambda x: x * tanh(_softplus(x)),
    "mish_backward": _mish_backward,
    "gelu": lambda x: 0.5 * x * (1.0 + erf(x * math.sqrt(0.5))),
    "gelu_backward": _gelu_backward,
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + _gelu_tanh_part(x)),
    "gelu_tanh_backward": _gelu_tanh_backward,
    "softplus": _softplus,
    "softplus_backward": lambda g, x, beta, threshold: where(
        x * beta > threshold, g, g * sigmoid(x * beta)
    ),
    "log_sigmoid": lambda x: minimum(x, 0.0) - log1p(exp(-absolute(x))),
    "log_sigmoid_backward": lambda g, x: g * sigmoid(-x),
    "sigmoid_backward": lambda g, y: g * ((1.0 - y) * y),
    "tanh_backward": lambda g, y: g * (1.0 - y * y),
    "logit": _logit,
    "logit_backward": _logit_backward,
    "softshrink": lambda x, bound: where(
        x > bound, x - bound, where(x < -bound, x + bound, x * 0.0)
    ),
    "softshrink_backward": lambda g, x, bound: where((x < -bound) | (x > bound), g, 0.0),
    "hardshrink": lambda x, bound: where((x >= -bound) & (x <= bound), 0.0, x),
    "hardshrink_backward": lambda g, x, bound: where((x < -bound) | (x > bound), g, 0.0),
    "lerp": _lerp,
    "reciprocal": lambda x: 1.0 / x,
    "rsqrt": lambda x: 1.0 / sqrt(x),
    "sign": _sign,
    "sgn": _sign,
    "remainder": _remainder,
    "div_floor": _div_floor,
    "frac": lambda x: x - trunc(x),
    "isnan": lambda x: ne(x, x),
    "isinf": lambda x: eq(absolute(x), math.inf),
    "isposinf": lambda x: eq(x, math.inf),
    "isneginf": lambda x: eq(x, -math.inf),
    "signbit": lambda x: copysign(1.0, x) < 0.0,
    "isfinite": lambda x: absolute(x) < math.inf,
    "nan_to_num": _nan_to_num,
    "sinc": lambda x: where(eq(x, 0.0), 1.0, sin(math.pi * x) / (math.pi * x)),
    "logaddexp": _logaddexp(exp, 1.0),
    "logaddexp2": _logaddexp(exp2, 1.0 / math.log(2.0)),
    "xlogy": lambda a, b: where(eq(a, 0.0) & eq(b, b), 0.0, a * log(b)),
    "heaviside": lambda x, value: where(eq(x, 0.0), value, to_float(x > 0.0)),
    "deg2rad": lambda x: x * (math.pi / 180.0),
    "rad2deg": lambda x: x * (180.0 / math.pi),
}
