"""An example of one step, to compare ways to compute its values and gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pararnn.tracing.capture import ROWS, recordable
from pararnn.tracing.recorder import is_differentiable, mapped
from pararnn.tracing.step import in_type
from pararnn.tracing.traced import Traced

_LEAST = 1e-3  # what gradients are compared relative to, at least, of the largest of them


@dataclass(frozen=True)
class Example:
    """What one step is run on.

    Attributes:
        tensors: Those of the step, by name.
        inputs: What differs over time.
        state: Components.
        cotangents: What arrives at the new components from outside, and from later steps.
        handed: What arrives at the result of the readout; None if there is none.
    """

    tensors: dict[str, Tensor]
    inputs: tuple[Tensor, ...]
    state: tuple[Tensor, ...]
    cotangents: tuple[list[Tensor], list[Tensor]]
    handed: Tensor | None = None

    @property
    def sources(self) -> list[tuple[str, Tensor]]:
        """What has a gradient, with what messages call it; the components of the state first."""
        found = [(f"component {i} of the state", s) for i, s in enumerate(self.state)]
        found += [("x" if not i else f"drive {i}", x) for i, x in enumerate(self.inputs)]
        return [(name, t) for name, t in [*found, *self.tensors.items()] if t.requires_grad]

    @property
    def total(self) -> list[Tensor]:
        """What arrives at the new components in all."""
        return [a + b for a, b in zip(*self.cotangents, strict=True)]


def draw(
    traced: Traced,
    device: torch.device,
    dtype: torch.dtype,
    positive: bool = False,
) -> Example:
    """Random numbers to run a step on, the same at every call.

    Args:
        traced: The step.
        device: Where to run it.
        dtype: Of everything that is floating point. In the step's own type the tensors are its
            very own; in another one they are copies, with small numbers in place of zeros, behind
            which gradients could hide.
        positive: States and inputs have no negative numbers.
    """
    generator = torch.Generator("cpu").manual_seed(0)

    def numbers(shape: Sequence[int], kind: torch.dtype) -> Tensor:
        if not is_differentiable(kind):
            rows = torch.arange(shape[0], device="cpu") % 2  # most tables have entries 0 and 1
            return rows.view(-1, *[1] * (len(shape) - 1)).expand(*shape).to(device, kind)
        wide = torch.complex128 if kind.is_complex else torch.float64
        x = torch.rand(tuple(shape), generator=generator, dtype=wide, device="cpu")
        x = in_type(x if positive else 2 * x - 1, dtype).to(device)
        return x.requires_grad_().clone()  # no leaf, into which autograd lets nobody write

    def widened(tensor: Tensor) -> Tensor:
        copy = in_type(tensor.detach(), dtype).clone()
        if tensor.requires_grad and tensor.dim():
            copy += 0.1 * numbers(tensor.shape, tensor.dtype).detach().abs() * (copy == 0)
        return copy.requires_grad_(tensor.requires_grad)

    capture = traced.capture
    tensors = {name: recordable(tensor) for name, tensor in traced.subject.tensors.items()}
    size = (ROWS[0], capture.hidden_size)
    given = tuple(numbers((ROWS[0], *i.shape), i.dtype) for i in traced.given)
    count = range(capture.num_components)
    state, *terms = ([numbers(size, dtype) for _ in count] for _ in range(3))
    if dtype is not capture.dtype:
        tensors = {name: widened(tensor) for name, tensor in tensors.items()}
    cotangents = [[c.detach() for c in term] for term in terms]
    handed = None
    if traced.readout is not None:
        handed = numbers((ROWS[0], *traced.readout.shape), dtype).detach()
    return Example(tensors, given, tuple(state), (cotangents[0], cotangents[1]), handed)


def differing(expected: dict[str, Tensor], found: dict[str, Tensor], tolerance: float) -> list[str]:
    """The names under which two tensors differ where both are finite."""
    apart, sizes = {}, {}
    for name, reference in expected.items():
        apart[name] = (found[name] - reference).norm().item()
        sizes[name] = reference.norm().item()
        if not math.isfinite(apart[name]):
            finite = reference.isfinite() & found[name].isfinite()
            apart[name] = (found[name] - reference)[finite].norm().item()
            sizes[name] = reference[finite].norm().item()
    least = _LEAST * max(sizes.values())
    return [name for name in expected if apart[name] > tolerance * (sizes[name] + least)]


def gradients(
    outputs: Sequence[Tensor], cotangents: Sequence[Tensor], inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Gradients of the inputs; zeros for those that have no influence."""
    terms = [
        (o * c.to(o.dtype).conj()).sum()
        for o, c in zip(outputs, cotangents, strict=True)
        if o.requires_grad
    ]
    found: Sequence[Tensor | None] = [None] * len(inputs)
    if terms and inputs:
        # One number: of gradients that it is given, autograd checks shapes with sympy (0.3 s)
        total = functools.reduce(torch.add, (t.real if t.is_complex() else t for t in terms))
        found = torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, found, strict=True)]


class InType:
    """Runs modules of operations, with every type they name replaced by `dtype` unless None."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype

    def __call__(self, module: fx.GraphModule, given: Sequence[Tensor]) -> list[Tensor]:
        """The results of a module."""
        if self.dtype is None:
            return list(module(*given))
        values: dict[fx.Node, Any] = {}
        arguments = iter(given)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(arguments)
            elif node.op == "output":
                return list(fx.map_arg(node.args[0], values.__getitem__))
            else:
                values[node] = self.call(node, values)
        raise AssertionError("graph without output")

    def call(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """The result of one operation."""
        args, kwargs = mapped(node, values.__getitem__)
        kind: Any = kwargs.get("dtype")
        if self.dtype is not None and kind is not None and is_differentiable(kind):
            wide = self.dtype.to_complex() if kind.is_complex else self.dtype
            kwargs = {**kwargs, "dtype": wide}
        function: Any = node.target
        return function(*args, **kwargs)
