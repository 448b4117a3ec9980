"""Derivatives of a step, by recording PyTorch's own autograd on it.

There is no second set of derivative rules: the step is run on example scalars with autograd, the
recorder writes down what autograd does, and the recording is read back as expressions.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pararnn.tracing.expressions import (
    LEAVES,
    Expression,
    Operand,
    leaf,
    serialize,
    topological,
)
from pararnn.tracing.modes import untransformed
from pararnn.tracing.operations import creation_value, express, is_pointwise
from pararnn.tracing.recorder import aten, mapped, record


@dataclass(frozen=True)
class Recurrence:
    """One channel of an elementwise recurrence: all that a solver or a backend has to know.

    Attributes:
        step: New components as expressions of leaves `state`, `drive` and `coefficient`.
        num_drives: How many drives the step may refer to.
        num_coefficients: Likewise for coefficients.
        names: Names for readable sources; they change nothing.
    """

    step: tuple[Operand, ...]
    num_drives: int
    num_coefficients: int
    names: dict[Expression, str]

    @property
    def num_components(self) -> int:
        """Tensors in the state."""
        return len(self.step)

    @functools.cached_property
    def function(self) -> Callable[..., tuple[Tensor, ...]]:
        """The step on tensors: `(*states, *drives, *coefficients) -> states`."""
        return torch_function(self.step, self.leaves)

    @functools.cached_property
    def key(self) -> str:
        """Equal keys, equal functions."""
        sizes = f"{self.num_components} {self.num_drives} {self.num_coefficients}"
        return f"{sizes}\n{serialize(self.step)}"

    @functools.cached_property
    def leaves(self) -> list[Expression]:
        """The components of the state, drives and coefficients: what `step` is a function of."""
        counts = {
            "state": self.num_components,
            "drive": self.num_drives,
            "coefficient": self.num_coefficients,
        }
        return [leaf(kind, i) for kind, count in counts.items() for i in range(count)]

    @functools.cached_property
    def adjoints(self) -> list[Expression]:
        """What `vjp` is a function of besides."""
        return [leaf("adjoint", i) for i in range(self.num_components)]

    @functools.cached_property
    def jacobian(self) -> tuple[tuple[Operand, ...], ...]:
        """`jacobian[i][j]`: derivative of new component i in old component j."""
        return self._derivatives[0]

    @functools.cached_property
    def vjp(self) -> tuple[Operand, ...]:
        """Gradients in states, drives and coefficients, given leaves `adjoint`."""
        return self._derivatives[1]

    @functools.cached_property
    def _derivatives(self) -> tuple[tuple[tuple[Operand, ...], ...], tuple[Operand, ...]]:
        first = _alive.setdefault(self.key, self)  # such as the layer before: it has derived them
        return untransformed(lambda: _derive(self)) if first is self else first._derivatives


_alive: weakref.WeakValueDictionary[str, Recurrence] = weakref.WeakValueDictionary()


def _derive(
    recurrence: Recurrence,
) -> tuple[tuple[tuple[Operand, ...], ...], tuple[Operand, ...]]:
    components = recurrence.num_components
    leaves = [*recurrence.leaves, *recurrence.adjoints]
    function = torch_function(recurrence.step, leaves)

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        primals, adjoints = values[:-components], values[-components:]
        outputs = [o if o.requires_grad else o + primals[0] * 0 for o in function(*values)]
        rows = [_gradients(o, primals[:components]) for o in outputs]
        products = [o * a for o, a in zip(outputs, adjoints, strict=True)]
        total = functools.reduce(torch.add, products)
        return (*(g for row in rows for g in row), *_gradients(total, primals))

    # On the CPU, where autograd runs in this thread and the recorder sees who calls it.
    with torch.device("cpu"), torch.inference_mode(False), torch.enable_grad():
        inputs = {
            f"{node.op}_{node.args[0]}": torch.full(
                (1,), 0.5, dtype=torch.float64, requires_grad=node.op != "adjoint"
            )
            for node in leaves
        }
        graph, constants = record(run, inputs, "the derivative")
    operands = _read(graph, dict(zip(inputs, leaves, strict=True)), constants)
    rows = [operands[i * components : (i + 1) * components] for i in range(components)]
    return tuple(map(tuple, rows)), tuple(operands[components * components :])


def _gradients(output: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(output, inputs, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)]


def _read(graph: fx.Graph, leaves: dict[str, Expression], constants: list[Tensor]) -> list[Operand]:
    graph.eliminate_dead_code()
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = leaves[node.target]
        elif node.op == "get_attr":
            constant = constants[int(node.target.split("_")[1])]
            values[node] = constant.flatten()[0].item()
        elif node.op == "output":
            return [values[n] for n in node.args[0]]
        elif not hasattr(node.target, "_schema"):
            values[node] = values[node.args[0]][node.args[1]]
        elif (fill := creation_value(node.target, node.args)) is not None:
            values[node] = fill
        elif node.target in (aten.expand.default, aten.detach.default):
            values[node] = values[node.args[0]]
        else:
            args, kwargs = mapped(node, values.__getitem__)
            values[node] = express(node.target, args, kwargs, torch.float64)
    raise AssertionError("graph without output")


_TORCH: dict[str, Callable[..., Any]] = {
    "to_float": lambda x, like: x.to(like.dtype) if x.dtype is torch.bool else x,
    "to_float32": lambda x: x.to(torch.float32).to(x.dtype),
    "to_float16": lambda x: x.to(torch.float16).to(x.dtype),
    "to_bfloat16": lambda x: x.to(torch.bfloat16).to(x.dtype),
    "gelu": lambda x: torch.nn.functional.gelu(x),
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "gelu_backward": lambda g, x: aten.gelu_backward(g, x),
    "gelu_tanh_backward": lambda g, x: aten.gelu_backward(g, x, approximate="tanh"),
    "log_sigmoid": lambda x: torch.nn.functional.logsigmoid(x),
    "log_sigmoid_backward": lambda g, x: g * torch.sigmoid(-x),
    "clamp": lambda x, low, high: aten.clamp(x, low, high),
    "polygamma": lambda n, x: torch.polygamma(int(n), x),
    "detach": torch.Tensor.detach,
    "div_floor": functools.partial(torch.div, rounding_mode="floor"),
}


@functools.lru_cache(maxsize=1024)
def is_operation(op: object) -> bool:
    """Whether it is the name of something that `torch_callable` evaluates on each element."""
    if not isinstance(op, str) or not op.isidentifier():
        return False
    packet = None if op.startswith("__") else getattr(aten, op, None)
    overloads = [getattr(packet, o) for o in packet.overloads()] if packet is not None else []
    return op in _TORCH or any(is_pointwise(o) and not o._schema.is_mutable for o in overloads)


_OF_TENSORS = frozenset(
    "gelu gelu_tanh gelu_backward gelu_tanh_backward log_sigmoid log_sigmoid_backward".split()
)


def torch_callable(op: str) -> Callable[..., Any]:
    """What evaluates an operation of the expressions on tensors."""
    return _TORCH.get(op) or getattr(torch, op, None) or getattr(aten, op)


def _takes_tensor(node: Expression, position: int) -> bool:
    """Whether PyTorch wants a tensor where a number would do for the expressions."""
    if not isinstance(node.args[position], (int, float)):
        return False
    if node.op == "where":  # of two numbers it would be of the default type
        return not any(isinstance(a, Expression) for a in node.args[1:])
    if node.op == "clamp":
        return position == 0 or any(isinstance(a, Expression) for a in node.args[1:])
    if node.op in ("add", "sub", "mul", "div", "polygamma"):
        return False
    return position == 0 or node.op in _OF_TENSORS or _is_always_tensor(node.op, position)


@functools.cache
def _is_always_tensor(op: str, position: int) -> bool:
    if op in _TORCH:
        return False
    packet = getattr(aten, op)
    schemas = [getattr(packet, o)._schema.arguments for o in packet.overloads()]
    kinds = [[str(a.type) for a in s] for s in schemas if not s[-1].is_out]
    at = [k[position] for k in kinds if "Tensor" in k and position < len(k)]
    return all(k == "Tensor" for k in at)


def torch_source(roots: Sequence[Operand], inputs: Sequence[Expression], name: str) -> str:
    """Print expressions as a Python function of their leaves."""
    variables = {node: f"{node.op}_{node.args[0]}" for node in inputs}
    lines = [f"def {name}({', '.join(variables.values())}):"]
    show = lambda o: variables[o] if isinstance(o, Expression) else _constant(o)  # noqa: E731

    like = next(iter(variables.values()))

    def fill(operand: Operand) -> str:
        return (
            show(operand) if isinstance(operand, Expression) else f"fill({show(operand)}, {like})"
        )

    for node in topological(roots):
        if node.op not in LEAVES:
            arguments = [
                fill(a) if _takes_tensor(node, i) else show(a) for i, a in enumerate(node.args)
            ]
            if node.op == "to_float":
                arguments.append(like)
            variables[node] = f"v{len(variables)}"
            lines.append(f"    {variables[node]} = {node.op}({', '.join(arguments)})")
    results = map(fill, roots)
    lines.append(f"    return ({', '.join(results)},)")
    return "\n".join(lines) + "\n"


def _fill(value: float, like: Tensor) -> Tensor:
    return like.new_full((), value, dtype=torch.bool if isinstance(value, bool) else like.dtype)


def _constant(value: Operand) -> str:
    if (isinstance(value, float) and value in (float("inf"), float("-inf"))) or value != value:
        return f"float('{value}')"
    return repr(value)


def torch_function(
    roots: Sequence[Operand], inputs: Sequence[Expression]
) -> Callable[..., tuple[Tensor, ...]]:
    """Compile expressions into a function of tensors, one per leaf in `inputs`, in that order."""
    source = torch_source(roots, inputs, "evaluate")
    order = topological(roots)
    scope: dict[str, Any] = {n.op: torch_callable(n.op) for n in order if n.op not in LEAVES}
    scope["fill"] = _fill
    exec(compile(source, "<pararnn expressions>", "exec"), scope)
    evaluate = scope["evaluate"]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        results = evaluate(*values)
        like = values[0]
        return tuple(
            r.to(like.dtype).expand_as(like) if r.shape != like.shape else r for r in results
        )

    return function
