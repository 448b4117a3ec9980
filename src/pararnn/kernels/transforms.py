"""Evaluate recurrences under the transforms of `torch.func`, and with forward-mode tangents.

The operators support reverse mode only. For elementwise recurrences, this module calls the same
kernels under a transform: an ensemble becomes more channels, and tangents follow a linear
recurrence. All other recurrences, and derivatives of gradients, run step by step as PyTorch
operations, which every transform supports.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pararnn.kernels import operators
from pararnn.kernels.channels import Channels
from pararnn.planning.plan import BackendChoice
from pararnn.planning.settings import Solver
from pararnn.solvers.problem import Problem
from pararnn.tracing.derivatives import Recurrence
from pararnn.tracing.expressions import Operand, leaf, make
from pararnn.tracing.step import Layout, step_of_channels


def solve(
    inputs: Sequence[Tensor], initial: Tensor, starts: Tensor | None, request: str
) -> list[Tensor]:
    """The states; the arguments are those of `pararnn::solve`."""
    path = operators.request_of(request).path
    # make_fx, linearize and other tracers cannot see into `_Solve`
    recorded = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    if recorded or not isinstance(path, Channels):
        return operators.loop(inputs, initial, starts, request)
    count = path.layout.num_drive_inputs
    return list(_Solve.apply(request, count, starts, initial, *inputs))


def _tracked(rule: Callable[..., Any]) -> Callable[..., Any]:
    """Run a `jvp` rule with forward mode on, for tangents of tangents; PyTorch turns it off."""

    @functools.wraps(rule)
    def tracked(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            return rule(ctx, *tangents)

    return tracked


def _vjp(function: Callable[..., Any], *given: Any) -> tuple[Any, Callable[..., Any]]:
    """`torch.func.vjp` without auxiliary results: the values, and the pull-back."""
    values, pull = torch.func.vjp(function, *given)[:2]
    return values, pull


def _without_tangents(ctx: Any) -> list[Any]:
    """The saved tensors, without their tangents."""
    saved = ctx.saved_tensors
    return [t if t is None else forward_ad.unpack_dual(t).primal for t in saved]


class _Solve(torch.autograd.Function):
    """`(request, number of inputs with drives, starts, initial, *inputs) -> states`."""

    @staticmethod
    def forward(
        request: str, count: int, starts: Tensor | None, initial: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        found = operators.run_solve(inputs, initial, starts, request)
        return tuple(found[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.request, ctx.count, *tensors = inputs
        ctx.inputs = len(tensors) - 2
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        starts, initial, *rest = ctx.saved_tensors
        inputs, states = rest[: ctx.inputs], rest[ctx.inputs :]
        *found, of_initial = _Adjoint.apply(
            ctx.request, ctx.count, ctx.inputs, starts, initial, *inputs, *states, *grads
        )
        return None, None, None, of_initial, *found

    @staticmethod
    @_tracked
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        starts, initial, *rest = _without_tangents(ctx)
        inputs, states = rest[: ctx.inputs], rest[ctx.inputs :]
        of_initial, *of_inputs = _filled(tangents[3:], [initial, *inputs])
        path = operators.request_of(ctx.request).path
        assert isinstance(path, Channels)
        problem, moved = (
            path.flat_problem(t, i, starts) for t, i in ((inputs, initial), (of_inputs, of_initial))
        )
        rows, offsets = _linear(problem, moved, states)
        drives = torch.stack([*(entry for row in rows for entry in row), *offsets], 2)
        linear = _linear_step(len(states), path.planner.backend, path.planner.solver)
        found = _Solve.apply(linear, 1, starts, of_initial, drives.unsqueeze(3))
        return tuple(f.to(s.dtype) for f, s in zip(found, states, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: Any, request: str, count: int, *tensors: Any) -> Any:
        size, dims = info.batch_size, in_dims[2:]
        run = functools.partial(_Solve.apply, request, count)
        if dims[0] is not None:
            return _one_by_one(run, size, dims, tensors)
        starts, initial, *inputs = tensors
        axes = [2, *([3] * count), *([1] * (len(inputs) - count))]
        pairs = zip([initial, *inputs], dims[1:], axes, strict=True)
        states = run(starts, *(_joined(t, d, axis, size) for t, d, axis in pairs))
        return tuple(s.unflatten(2, (size, -1)) for s in states), (2,) * len(states)


class _Adjoint(torch.autograd.Function):
    """The adjoint of `_Solve`: gradients of the inputs, then of `initial`.

    Arguments: `(request, number of inputs with drives, number of inputs, starts, initial, *inputs,
    *states, *gradients of states)`. Its own derivatives treat the states as functions of the other
    arguments.
    """

    @staticmethod
    def forward(
        request: str, count: int, total: int, starts: Tensor | None, initial: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        inputs, (states, grads) = rest[:total], _halves(rest[total:])
        found = operators.run_adjoint(inputs, initial, starts, states, list(grads), request)
        # no views: PyTorch wants the tangent of a view to be a view
        return tuple(f.clone() if f._is_view() else f for f in found)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.request, ctx.count, ctx.total, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gradients, given, skipped = _gradients_of_loop(ctx, ctx.saved_tensors)
        of_initial, *found = _vjp(gradients, *given)[1](grads)
        inputs, of_grads = found[: ctx.total], found[ctx.total :]
        return None, None, None, None, of_initial, *inputs, *([None] * skipped), *of_grads

    @staticmethod
    @_tracked
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        gradients, given, skipped = _gradients_of_loop(ctx, _without_tangents(ctx))
        of_given = list(tangents[4:])
        del of_given[1 + ctx.total : 1 + ctx.total + skipped]
        return _pushed(gradients, given, _filled(of_given, given))

    @staticmethod
    def vmap(info: Any, in_dims: Any, request: str, count: int, total: int, *tensors: Any) -> Any:
        size, dims = info.batch_size, in_dims[3:]
        run = functools.partial(_Adjoint.apply, request, count, total)
        if dims[0] is not None:
            return _one_by_one(run, size, dims, tensors)
        starts, initial, *rest = tensors
        of_inputs = [*([3] * count), *([1] * (total - count))]
        axes = [2, *of_inputs, *([2] * (len(rest) - total))]
        pairs = zip([initial, *rest], dims[1:], axes, strict=True)
        found = run(starts, *(_joined(t, d, axis, size) for t, d, axis in pairs))
        axes = [*of_inputs, 2]
        apart = (f.unflatten(axis, (size, -1)) for f, axis in zip(found, axes, strict=True))
        return tuple(apart), tuple(axes)


def _filled(tangents: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Tangents, with zeros for None."""
    pairs = zip(tangents, like, strict=True)
    return [torch.zeros_like(x) if t is None else t for t, x in pairs]


def _halves(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]


def _joined(tensor: Tensor, dim: int | None, axis: int, size: int) -> Tensor:
    """Merge the ensemble's axis `dim` into an axis of each member; None repeats the tensor."""
    if dim is None:
        shape = (*tensor.shape[:axis], size, *tensor.shape[axis:])
        return tensor.unsqueeze(axis).expand(shape).flatten(axis, axis + 1)
    return tensor.movedim(dim, axis).flatten(axis, axis + 1)


def _one_by_one(
    run: Callable[..., Sequence[Tensor]],
    size: int,
    dims: Sequence[int | None],
    tensors: Sequence[Tensor | None],
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Run the members of an ensemble one after another: each has its own starts."""
    pairs = list(zip(tensors, dims, strict=True))
    found = [
        run(*(t if t is None or d is None else t.select(d, i) for t, d in pairs))
        for i in range(size)
    ]
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True)), (0,) * len(found[0])


def _gradients_of_loop(
    ctx: Any, saved: Sequence[Tensor]
) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor], int]:
    """`_Adjoint` as a function of (initial, *inputs, *gradients of states), step by step.

    Returns:
        The function, its arguments, and the number of states, which it computes itself.
    """
    starts, initial, *rest = saved
    inputs, (states, grads) = rest[: ctx.total], _halves(rest[ctx.total :])

    def gradients(initial: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        def loop(initial: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            return tuple(operators.loop(inputs, initial, starts, ctx.request))

        _, pull = _vjp(loop, initial, *rest[: ctx.total])
        of_initial, *of_inputs = pull(rest[ctx.total :])
        return (*of_inputs, of_initial)

    return gradients, [initial, *inputs, *grads], len(states)


def _pushed(
    function: Callable[..., tuple[Tensor, ...]],
    given: Sequence[Tensor],
    tangents: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Tangents of a function by reverse mode twice: outside `torch.func`, forward does not nest."""
    values, pull = _vjp(function, *given)
    zeros = tuple(torch.zeros_like(v) for v in values)
    (found,) = _vjp(lambda u: pull(u), zeros)[1](tuple(tangents))
    return found


def _linear(
    problem: Problem, tangents: Problem, states: Sequence[Tensor]
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """The linear recurrence of the tangents, for all times: rows of Jacobians, and offsets."""
    before = problem.states_before([s.to(problem.dtype) for s in states])
    shape, count = problem.drives[0].shape, len(before)
    fixed = [c.expand(shape) for c in problem.coefficients]
    new, pull = _vjp(problem.recurrence.function, *before, *problem.drives, *fixed)
    moved = [*tangents.drives, *tangents.coefficients]
    rows, offsets = [], []
    for i in range(count):
        found = pull(tuple(torch.full_like(n, float(i == j)) for j, n in enumerate(new)))
        rows.append(list(found[:count]))
        products = (f * m for f, m in zip(found[count:], moved, strict=True))
        offsets.append(functools.reduce(torch.add, products))
    return rows, offsets


@functools.lru_cache(maxsize=32)
def _linear_step(components: int, backend: BackendChoice, solver: Solver | None) -> str:
    """Register the step `t_i = b_i + sum_j J_ij t_j`; its drives are the rows of J, then b."""
    count, step = components**2, []
    for i in range(components):
        new: Operand = leaf("drive", count + i)
        for j in range(components):
            new = make("add", make("mul", leaf("drive", i * components + j), leaf("state", j)), new)
        step.append(new)
    places = tuple((0, slot) for slot in range(count + components))
    recurrence = Recurrence(tuple(step), len(places), 0, {})
    linear = step_of_channels(recurrence, Layout(places, ()))
    return operators.register(linear, backend, solver)
