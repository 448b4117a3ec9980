"""The operations that kernels compute, and how C and Triton write them: one row for each.

`lowering` expresses every other operation in these. A new primitive is a row here, and a function
in `c/runtime.h` or `triton/functions.py` where a row calls one that is not yet there. PyTorch's
operation of the same name is its reference.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Primitive:
    """How an operation is written; every `{}` stands for the next operand.

    Attributes:
        c: In C. `real` is the type of the arithmetic, `C(x)` a number of that type, and `F(name)`
            the function of math.h for it.
        triton: In Triton. `{real}` is the type of the arithmetic and `{largest}` its largest
            number. A function that is called by name alone comes from `triton/functions.py`.
        half: In Triton, where results have half precision.
    """

    c: str
    triton: str
    half: str

    @property
    def operands(self) -> int:
        """How many it takes."""
        return self.triton.count("{}")


def called(text: str) -> str | None:
    """The function of `triton/functions.py` that a text calls: `tanh` for "tanh({})"."""
    name = text.partition("(")[0]
    return name if name.isidentifier() else None


def _row(c: str, triton: str | None = None, half: str | None = None) -> Primitive:
    triton = c if triton is None else triton
    return Primitive(c, triton, triton if half is None else half)


def _of_libraries(names: str, operands: str) -> dict[str, Primitive]:
    """Functions that math.h and libdevice have by the same names."""
    return {n: _row(f"F({n})({operands})", f"{n}({operands})") for n in names.split()}


PRIMITIVES: dict[str, Primitive] = {
    "add": _row("{} + {}"),
    "sub": _row("{} - {}"),
    "mul": _row("{} * {}"),
    "div": _row("{} / {}"),
    "neg": _row("-{}"),
    "abs": _row("F(fabs)({})", "tl.abs({})"),
    "lt": _row("{} < {}"),
    "le": _row("{} <= {}"),
    "gt": _row("{} > {}"),
    "ge": _row("{} >= {}"),
    "eq": _row("{} == {}"),
    "ne": _row("{} != {}"),
    "logical_and": _row("{} & {}"),
    "logical_or": _row("{} | {}"),
    "logical_xor": _row("{} ^ {}"),
    "logical_not": _row("!{}", "{} == 0"),
    "where": _row("{} ? {} : {}", "tl.where({}, {}, {})"),
    "exp": _row("pr_exp({})", "exp({})", "fast_exp({})"),
    "expm1": _row("pr_expm1({})", "expm1({})"),
    "log": _row("pr_log({})", "log({})"),
    "log1p": _row("pr_log1p({})", "log1p({})"),
    "tanh": _row("pr_tanh({})", "tanh({})", "fast_tanh({})"),
    "sigmoid": _row("pr_sigmoid({})", "sigmoid({})", "fast_sigmoid({})"),
    "maximum": _row("pr_maximum({}, {})", "maximum({}, {})"),
    "minimum": _row("pr_minimum({}, {})", "minimum({}, {})"),
    "round": _row("F(rint)({})", "rint({})"),
    **_of_libraries("exp2 log2 log10 sqrt sin cos tan asin acos atan sinh cosh", "{}"),
    **_of_libraries("asinh acosh atanh erf erfc floor ceil trunc", "{}"),
    **_of_libraries("atan2 pow fmod hypot copysign fmax fmin", "{}, {}"),
    # Rounded to a narrower type as PyTorch does it: from float32.
    "to_float": _row("{} ? C(1) : C(0)", "({}).to({real})"),
    "to_float32": _row("pr_to_float32({})", "({}).to(tl.float32).to(tl.float32).to({real})"),
    "to_float16": _row("pr_to_float16({})", "({}).to(tl.float32).to(tl.float16).to({real})"),
    "to_bfloat16": _row("pr_to_bfloat16({})", "({}).to(tl.float32).to(tl.bfloat16).to({real})"),
    "largest": _row("LARGEST", "tl.full([], {largest}, {real})"),
}
