"""Checks of what a layer is called with, and the form that solvers take it in."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

State = Tensor | tuple[Tensor, ...]


def check_tensors(name: str, state: State | None) -> None:
    """Refuse a state with something else than tensors in it."""
    for part in state if isinstance(state, tuple) else () if state is None else (state,):
        if not isinstance(part, Tensor):
            raise TypeError(
                f"{name} must be a tensor or a tuple of tensors, got {describe(state)}"
                f"{'' if part is state else f' with {describe(part)} in it'}."
            )


def check_real(name: str, part: Tensor) -> None:
    """Refuse complex numbers in a state."""
    if part.is_complex():
        raise TypeError(
            f"{name} is of {part.dtype}, but a state is of real numbers; pass real and imaginary "
            "part as two components."
        )


def shapes_of(state: State | None, single: bool) -> tuple[tuple[int, ...], ...]:
    """Shapes of a state's tensors without the batch; numbers also where the compiler has symbols.

    Args:
        state: The state.
        single: Whether it may be that of a single sequence, without a batch axis.
    """
    parts = state if isinstance(state, tuple) else () if state is None else (state,)
    shapes = [tuple([operator.index(n) for n in part.shape]) for part in parts]
    if single and not (all(len(s) > 1 and s[0] == 1 for s in shapes)):
        return tuple(shapes)
    return tuple([s[1:] if len(s) > 1 else s for s in shapes])


def batched(state: State | None, shapes: Sequence[tuple[int, ...]]) -> State | None:
    """The state of a single sequence with a batch axis; one that has it already is left as it is.

    Args:
        state: The state.
        shapes: Of its tensors, without the batch.
    """
    if state is None:
        return None
    parts = state if isinstance(state, tuple) else (state,)
    if len(parts) == len(shapes):
        pairs = zip(parts, shapes, strict=True)
        parts = tuple([p.unsqueeze(0) if p.dim() == len(shape) else p for p, shape in pairs])
    return parts if isinstance(state, tuple) else parts[0]


def sizes_in(name: str, shape: Any) -> tuple[int, ...]:
    """A shape as numbers."""
    try:
        return tuple([operator.index(size) for size in shape])
    except TypeError:
        seen = describe(shape) if isinstance(shape, Tensor) else repr(shape)
        raise TypeError(f"{name} must be sizes, such as x.shape, got {seen}.") from None


def shape_of(*sizes: str | int) -> str:
    """A shape of names and numbers, in words."""
    return f"({', '.join(map(str, sizes))})"


def check_cell(cell: object) -> None:
    """Refuse objects that are not cells."""
    if isinstance(cell, type) and issubclass(cell, nn.Module):
        raise TypeError(
            f"cell is the class {cell.__name__}; pass an instance of it: RNN({cell.__name__}(...))."
        )
    if isinstance(cell, nn.RNNBase):
        raise TypeError(
            f"cell is a whole layer, {type(cell).__name__}, that runs over time by itself; use "
            f"pararnn.parallelize(layer), or a cell: RNN(nn.{type(cell).__name__}Cell(...))."
        )
    if not isinstance(cell, nn.Module):
        raise TypeError(
            f"cell must be an nn.Module with forward(x, state), got {type(cell).__name__}; for a "
            "plain function use pararnn.scan."
        )
    try:
        inspect.signature(cell.forward).bind("x", "state")
    except TypeError as error:
        raise TypeError(
            f"{type(cell).__name__} is no cell: its forward cannot be called with (x, state), the "
            f"input and the state of one step ({error}). A cell returns the new state, as "
            "nn.GRUCell does."
        ) from None


def describe(state: Any) -> str:
    """What was passed for a state, in words."""
    if isinstance(state, Tensor):
        return f"a tensor of shape {tuple(state.shape)}"
    if isinstance(state, (tuple, list)):
        return f"a {type(state).__name__} of {len(state)}"
    return f"a {type(state).__name__}"


def map_state(state: State | None, function: Any) -> State | None:
    """A function of every component, in the same form."""
    if state is None:
        return None
    return tuple(function(s) for s in state) if isinstance(state, tuple) else function(state)


def by_row(rows: Tensor, like: Tensor) -> Tensor:
    """Values of rows, shape (rows,), as (rows, 1, ...) with the axes of another tensor."""
    return rows.view(-1, *[1] * (like.dim() - 1))


def other_axes(batch_first: bool) -> str:
    """What to do if a call looks as if batch and time of x were taken for each other."""
    order = "(batch, time, ...)" if batch_first else "(time, batch, ...)"
    return f" The layer takes x as {order}; if yours is not, pass batch_first={not batch_first}."


def check_resets(
    resets: Any, layout: tuple[int, ...], cu_seqlens: Tensor | None, batch_first: bool
) -> None:
    """Refuse resets that are not booleans in the layout of x, as the user passed it."""
    if resets is None:
        return
    if not isinstance(resets, Tensor):
        raise TypeError(f"resets must be a tensor of booleans, got {describe(resets)}.")
    if cu_seqlens is not None:
        raise ValueError("pass resets or cu_seqlens, not both.")
    if resets.dtype is not torch.bool or resets.shape != layout:
        turned = resets.shape != layout and tuple(resets.shape) == tuple(layout)[::-1]
        raise ValueError(
            f"resets has shape {tuple(resets.shape)} and type {resets.dtype}; pass booleans of "
            f"shape {tuple(layout)}, laid out like x.{other_axes(batch_first) if turned else ''}"
        )


def num_sequences(batch: int, cu_seqlens: Tensor | None) -> int:
    """The number of initial states."""
    if cu_seqlens is None:
        return batch
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor, got {describe(cu_seqlens)}.")
    kind = cu_seqlens.dtype
    if kind.is_floating_point or kind.is_complex or kind is torch.bool:
        raise TypeError(f"cu_seqlens must be integers, got {kind}.")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; pass boundaries (0, ..., time), one "
            "more than there are sequences."
        )
    return cu_seqlens.shape[0] - 1


def check_boundaries(x: Tensor, cu_seqlens: Tensor | None) -> None:
    """Refuse boundaries that are not those of the steps of x (batch, time, ...)."""
    if cu_seqlens is None:
        return
    batch, time = x.shape[:2]
    ends = cu_seqlens.to(x.device).long()
    begins, ends = ends[:-1], ends[1:]
    valid = (begins[0] == 0) & (ends[-1] == time) & (begins <= ends).all()
    wanted = "cu_seqlens must rise from 0 to the number of steps"
    if torch.compiler.is_compiling() and batch == 1:  # to name their number would fix it
        torch._assert_async(valid, f"{wanted} of an x of batch 1.")
    elif batch != 1 or not valid:
        raise ValueError(
            f"{wanted} {time} of an x of batch 1 (here {batch}), got {cu_seqlens.tolist()}."
        )


def starts_of(
    x: Tensor, resets: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Where sequences start and end.

    Returns:
        `starts` as in `Problem`; and with `cu_seqlens` the last step of every sequence, -1 for one
        without steps.
    """
    if resets is None and cu_seqlens is None:
        return None, None
    batch, time = x.shape[:2]
    if resets is not None:
        rows = torch.arange(batch, dtype=torch.int32, device=x.device).unsqueeze(1)
        begin = torch.arange(time, device=x.device) == 0
        others = torch.where(begin, rows, -1)
        return torch.where(resets.to(x.device), batch + rows, others).contiguous(), None
    assert cu_seqlens is not None
    ends = cu_seqlens.to(x.device).long()
    begins, ends = ends[:-1], ends[1:]
    steps = torch.arange(time, device=x.device)
    rows = torch.searchsorted(ends, steps, right=True)  # the sequence that a step belongs to
    starts = torch.where(begins[rows] == steps, rows, -1).int()
    return starts.unsqueeze(0), torch.where(begins < ends, ends - 1, -1)


def components_of(
    name: str,
    state: State | None,
    rows: int,
    x: Tensor,
    shapes: tuple[tuple[int, ...], ...],
    dtype_of: Callable[[], torch.dtype],
    batch_first: bool | None = None,
) -> tuple[Tensor, ...]:
    """The components of a state, after a check; zeros if there is no state.

    Args:
        name: What messages call it.
        state: The state.
        rows: Rows that it must have.
        x: The input.
        shapes: Of every component, without the rows.
        dtype_of: The type of zeros where x has whole numbers.
        batch_first: How the user passed x, which is (batch, time, ...) here; None for one step.
    """
    count = len(shapes)
    if state is None:
        dtype = x.dtype if x.is_floating_point() else dtype_of()
        first, device = shapes[0], x.device
        zero = torch.zeros(rows, *first, dtype=dtype, device=device)
        if shapes.count(first) == count:
            return (zero,) * count
        return tuple([torch.zeros(rows, *s, dtype=dtype, device=device) for s in shapes])
    parts = state if isinstance(state, tuple) else (state,)
    if len(parts) != count or isinstance(state, tuple) != (count > 1):
        wanted = "one tensor" if count == 1 else f"a tuple of {count} tensors"
        shown = " and ".join(str((rows, *shape)) for shape in dict.fromkeys(shapes))
        seen = f"{len(parts)} in a tuple" if isinstance(state, tuple) else "one tensor"
        raise ValueError(f"{name} must be {wanted} of shape {shown}, got {seen}.")
    for i, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
        fits = part.dim() == len(shape) + 1 and part.shape[0] == rows and part.shape[1:] == shape
        if not fits or part.is_complex():
            which = name if count == 1 else f"component {i} of {name}"
            check_real(which, part)
            last = "hidden_size" if len(shape) == 1 else "*state_shape"
            turned = batch_first is not None and tuple(part.shape) == (x.shape[1], *shape)
            more = other_axes(bool(batch_first)) if turned else ""
            raise ValueError(
                f"{which} has shape {tuple(part.shape)} but x needs {(rows, *shape)}; pass "
                f"(rows, {last}), or None for zeros.{more}"
            )
        if part.device != x.device:
            raise ValueError(f"{name} is on {part.device} but x is on {x.device}; move one.")
    return parts
